"""moe advise --chip_hours=10000 --topology=v5p-128: what to train for a budget, with a region.

Published scaling laws turn the budget into width, tokens, experts, K, granularity, rate and batch, and say where they
extrapolate; the kept plans (configs/plans.json) turn chip-hours into FLOPs; the lab's runs say how many seeds show a
gain. --tokens or --flops are budgets too. docs/advice.md shows a page and what it rests on.
"""

import math
from typing import Any

from absl import flags

from moe.programs import cli
from moe.system import shipped

_HOURS = flags.DEFINE_float("chip_hours", None, "Budget in hours of one chip; needs --topology.", 1e-3, 1e12)
_TOKENS = flags.DEFINE_float("tokens", None, "Budget in training tokens, taken as compute-optimal.", 1e6, 1e18)
_FLOPS = flags.DEFINE_float("flops", None, "Budget in FLOPs of the training.", 1e12, 1e36)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Chips, such as v5p-128 or h100:8x8: their speed and memory.")
_MFU = flags.DEFINE_float("mfu", None, "MFU to assume; default: that of the kept plans.", 1e-3, 1.0)
_TOLERANCE = flags.DEFINE_float("tolerance", 0.01, "Relative rise of the loss that bounds a region.", 0.0, 1.0)
_GAIN = flags.DEFINE_float("gain", 0.01, "Gain that the seeds should show, as a share of the loss.", 1e-5, 1.0)

#: Runs from which spreads are taken, besides the early ones.
_NOW = shipped.RESULTS / "switch_vs_mixtral"
_EARLY = shipped.RESULTS / "early"
#: Width of the early runs.
_EARLY_WIDTH = 128
#: Tokens per step of the early runs.
_EARLY_TOKENS = 2048


def main() -> None:
    """Print the page."""
    from moe.config import ConfigError
    from moe.lab import advice, published_laws

    if sum(flag.value is not None for flag in (_HOURS, _TOKENS, _FLOPS)) != 1:
        raise ConfigError("give one of --chip_hours, --tokens and --flops")
    cli.only_with(_HOURS.value is not None, "is read only with --chip_hours", _MFU)
    where = _chips(str(_TOPOLOGY.value)) if _TOPOLOGY.value else None
    if _HOURS.value is not None:
        if where is None:
            raise ConfigError("--chip_hours: needs --topology")
        budget = _of_hours(_HOURS.value, *where[:2])
    elif _TOKENS.value is not None:
        compute = published_laws.ling_compute(_TOKENS.value)
        budget = advice.Budget(
            compute, compute, compute, f"those for which Ling's law takes {_TOKENS.value:.3g} tokens"
        )
    else:
        compute = float(_FLOPS.value or 0)
        budget = advice.Budget(compute, compute, compute, "as given")
    memory = None if where is None else float(where[1].memory) * where[2]
    measured, own = _measured() if (_EARLY / "results.parquet").exists() else ([], {})
    measured = _measured_now() + measured
    settings: dict[str, Any] = {"tolerance": float(_TOLERANCE.value or 0), "gain": float(_GAIN.value or 0)}
    print(advice.render(budget, memory=memory, measured=measured, own=own, **settings))


def _chips(name: str) -> tuple[str, Any, int]:
    """(generation, chip, number of chips) of a topology, without asking a compiler."""
    from moe.config import ConfigError
    from moe.planner.kinds import KINDS
    from moe.planner.topology import tpu_name
    from moe.system.fields import whole_number

    kind, _, shape = tpu_name(name).partition(":")
    chip, sizes = KINDS.get(kind), shape.split("x")
    if chip is None or not all(whole_number(size) for size in sizes):
        known = ", ".join(sorted(KINDS))
        raise ConfigError(f"--topology={name}: must be chips and a shape, as v5p:4x4x4 or h100:8x8; chips are {known}")
    return kind, chip, math.prod(map(int, sizes))


def _of_hours(hours: float, kind: str, chip: Any) -> Any:
    """FLOPs of chip-hours, by the MFU of kept plans of the same chip."""
    from moe.lab import advice
    from moe.planner import kept_plans

    seconds = 3600 * hours * chip.peak
    if _MFU.value:
        return advice.Budget(*(seconds * _MFU.value,) * 3, why=f"{hours:,.0f} chip-hours at an MFU of {_MFU.value:g}")
    names, (low, middle, high) = kept_plans.mfu_of_chip(kept_plans.read(shipped.PLANS), kind)
    of = ", ".join(names)
    why = f"{hours:,.0f} chip-hours of {kind} at the MFU of the plans of {of}, {middle:.2f} ({low:.2f} to {high:.2f})"
    return advice.Budget(seconds * low, seconds * middle, seconds * high, why)


def _measured() -> tuple[list[Any], dict[tuple[int, int], float]]:
    """Spreads of differences from dense, and mean losses by experts and tokens, of the early runs."""
    import pandas as pd

    from moe.lab import advice

    keys = ["suite", "variant", "steps", "seed"]
    wanted = [*keys, "compared", "step", "quantity", "domain", "value"]
    final = [("quantity", "==", "loss"), ("domain", "==", "primary"), ("compared", "==", True)]
    frame = pd.read_parquet(_EARLY / "results.parquet", columns=wanted, filters=final)
    frame = frame[frame.step == frame.steps]
    runs = pd.read_parquet(_EARLY / "runs.parquet", columns=[*keys, "seconds"]).drop_duplicates(keys)
    frame = frame.merge(runs, how="left", on=keys)
    compared = frame[frame.suite == "switch_vs_mixtral"]
    losses: dict[tuple[str, int], dict[int, tuple[float, float]]] = {}
    columns: list[Any] = [compared[name].tolist() for name in ("variant", "steps", "seed", "value", "seconds")]
    for arm, steps, seed, loss, seconds in zip(*columns, strict=True):
        losses.setdefault((arm, int(steps)), {})[int(seed)] = float(loss), float(seconds) / 3600
    counted = frame[frame.suite == "num_experts"].groupby(["variant", "steps"]).value.mean()
    own = {
        (int(str(arm).removeprefix("experts_")), int(steps) * _EARLY_TOKENS): float(loss)
        for (arm, steps), loss in counted.items()
    }
    return advice.spreads(losses, _EARLY_WIDTH, "dense"), own


def _measured_now() -> list[Any]:
    """Spreads of differences from dense of the suite that compares Switch and Mixtral."""
    from moe.lab import advice
    from moe.lab.records import DIVERGED, read_all

    losses: dict[int, dict[tuple[str, int], dict[int, tuple[float, float]]]] = {}
    for record in read_all(_NOW):
        if record.status != DIVERGED:
            of_arm = losses.setdefault(record.form["d_model"], {}).setdefault((record.variant, record.steps), {})
            of_arm[record.seed] = record.primary_loss, record.seconds / 3600
    return [spread for width, runs in sorted(losses.items()) for spread in advice.spreads(runs, width, "dense")]


def run() -> None:
    """The program."""
    cli.run(
        main,
        examples=(
            "moe advise --chip_hours=10000 --topology=v5p-128",
            "moe advise --tokens=1e11",
        ),
    )
