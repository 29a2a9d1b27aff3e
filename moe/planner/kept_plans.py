"""Plans that were compiled and are kept with the configs, and the best of them for a slice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe.config import Config, ConfigError, load_python_file
from moe.config.parse import from_config_dict
from moe.dispatch import quantized
from moe.planner import calibration, counts, excess
from moe.planner.counts import Counts
from moe.planner.kinds import kind_of
from moe.planner.plan import Plan, cost_words
from moe.planner.topology import all_names, of_slices, tpu_name
from moe.system import shipped
from moe.system.atomic_files import sole_writer, write_atomic
from moe.system.escaping import markdown_table, markdown_text
from moe.system.foreign_files import Amount, Fields, Interval, Positive, kept_whole, read_rows

_Row = dict[str, Any]

_FIELDS = (
    "topology", "platform", "chips", "tokens", "step_seconds", "step_interval", "counted_seconds", "mfu",
    "tokens_per_second_per_chip", "memory_total", "exposed_seconds", "floor_seconds", "chip_steps", "kernel_seconds",
    "kernel_low", "kernel_high", "limits", "counts", "compile_seconds", "bound", "cost", "versions", "commit", "prices",
)  # fmt: skip


class _Kept(Fields):
    """Fields of a kept plan that are read."""

    config: str
    topology: str
    flags: dict[str, Any]
    slices: list[str]
    commit: str
    platform: Literal["tpu", "gpu"]
    chips: Positive
    tokens: Positive
    counted_seconds: Positive
    exposed_seconds: Amount
    chip_steps: Amount
    floor_seconds: Amount
    limits: dict[str, Amount]
    counts: Counts
    kernel_seconds: Amount
    kernel_low: Amount
    kernel_high: Amount
    step_seconds: Positive
    step_interval: Interval
    mfu: Amount
    tokens_per_second_per_chip: Positive
    memory_total: Positive
    capacity: Positive
    compile_seconds: Amount
    bound: str
    cost: str
    versions: list[str]
    prices: str


_KEPT = kept_whole(_Kept)

#: Field with the precision of the matmuls' operands.
_PRECISION = "model.low_precision"


def row(plan: Plan, config: str, flags: dict[str, Any], hardware: str = "") -> _Row:
    """A plan as a row of the file. A low-precision plan has names of its own, such as ``h100:32x8-float8``, so that
    the plain name of a slice never changes the arithmetic.

    Args:
        plan: to keep.
        config: name of the file in configs/, with its argument if it had one.
        flags: fields of the config that were set on the command line.
        hardware: its name there, or one of the names of a plan that is kept.
    """
    figures = plan.to_json()
    kept = {"config": config, "flags": flags}
    topology = of_slices(plan.topology, plan.num_slices)
    suffix = suffix_of(flags.get(_PRECISION, "none"))
    named = hardware.removesuffix(suffix)
    names = {topology} if plan.num_slices > 1 else all_names(topology) | {named or topology}
    kept["slices"] = sorted(name + suffix for name in names)
    return (
        kept | {"capacity": plan.memory.capacity} | {name: figures[name] for name in _FIELDS} | {"topology": topology}
    )


def _precision(kept: _Row) -> str:
    return kept["flags"].get(_PRECISION, "none")


def suffix_of(precision: str) -> str:
    """Suffix of the names of plans of this precision."""
    return "" if precision == "none" else f"-{precision}"


def read(path: Path) -> list[_Row]:
    """All kept plans; empty without the file. Raises ConfigError if the file holds something else."""
    return read_rows(path, _KEPT) if path.exists() else []


def keep(path: Path, new: _Row) -> None:
    """Add a plan to the file, replacing one of the same config, slice and flags."""
    same = ("config", "topology", "flags")
    with sole_writer(path):
        rows = [old for old in read(path) if any(old[name] != json.loads(json.dumps(new))[name] for name in same)]
        rows.append(new)
        rows.sort(key=lambda each: (each["config"], each["topology"], -each["tokens_per_second_per_chip"]))
        write_atomic(path, json.dumps(rows, indent=1) + "\n")


def recounted(kept: _Row, known: list[_Row]) -> _Row:
    """A kept plan counted by today's prices, with its interval, rate, MFU and cost.

    Args:
        kept: a row.
        known: published steps, from :func:`moe.planner.calibration.rows`.
    """
    kind = kind_of(kept["topology"])
    kept_counts = Counts.model_validate(kept["counts"])
    priced = counts.price(kept_counts, kind)
    step = priced.counted
    kernels = calibration.kernel_width(step, priced.kernels, priced.kernels_low, priced.kernels_high)
    pipeline = kept["flags"].get("mesh.pipeline", 1) > 1
    interval = calibration.interval(step, priced.floor, calibration.width(kind, kernels, known, pipeline=pipeline))
    slower = step / kept["step_seconds"]
    return kept | {
        "step_seconds": step,
        "step_interval": list(interval),
        "counted_seconds": step,
        "exposed_seconds": priced.exposed,
        "floor_seconds": priced.floor,
        "kernel_seconds": priced.kernels,
        "kernel_low": priced.kernels_low,
        "kernel_high": priced.kernels_high,
        "limits": counts.limits(kept_counts, priced),
        "bound": priced.bound,
        "mfu": kept["mfu"] / slower,
        "tokens_per_second_per_chip": kept["tokens_per_second_per_chip"] / slower,
        "chip_steps": calibration.steps_of(kind, known),
        "cost": cost_words(kept["tokens"], kept["chips"], kept["platform"], (step, *interval)),
        "prices": calibration.prices(),
    }


def stale(rows: Sequence[_Row], known: list[_Row]) -> list[str]:
    """Kept plans whose step or interval is not that of today's prices, as "config on slice"."""

    def figures(kept: _Row) -> list[float]:
        return [kept["step_seconds"], *kept["step_interval"], kept["mfu"], kept["tokens_per_second_per_chip"]]

    return [
        f"{kept['config']} on {kept['topology']}"
        for kept in rows
        if not np.allclose(figures(kept), figures(recounted(kept, known)), rtol=1e-6, atol=0)
    ]


def recount(path: Path, page: Path) -> None:
    """Count all kept plans of a file by today's prices and published steps; ``page`` as in :func:`write_table`."""
    with sole_writer(path):
        write_atomic(path, json.dumps([recounted(kept, calibration.rows()) for kept in read(path)], indent=1) + "\n")
    write_table(path, page)


def write_table(path: Path, page: Path) -> None:
    """Write the table of a file's plans between the marks of a page.

    Raises:
        ConfigError: the page has no marks.
    """
    before, start, rest = page.read_text().partition("<!-- plans: made by moe plan --record -->\n")
    _, end, after = rest.partition("<!-- end of plans -->")
    if not start or not end:
        raise ConfigError(f"{page}: has no marks around the table of plans")
    write_atomic(page, f"{before}{start}\n{table(read(path))}\n\n{end}{after}")


def best(rows: Sequence[_Row], config: str, topology: str) -> _Row | None:
    """The kept plan of a config with the most tokens per second on a slice, given by any of its names."""
    alike = [each for each in rows if each["config"] == config and tpu_name(topology) in each["slices"]]
    return max(alike, key=lambda each: each["tokens_per_second_per_chip"], default=None)


def best_of_precisions(rows: Sequence[_Row], config: str, topology: str) -> dict[str, _Row]:
    """The :func:`best` plan of a slice for each precision with kept plans, by the suffix of its name."""
    suffixes = [suffix_of(precision) for precision in ("none", *quantized.TYPES)]
    return {suffix: kept for suffix in suffixes if (kept := best(rows, config, topology + suffix)) is not None}


def mfu_of_chip(rows: Sequence[_Row], kind: str) -> tuple[list[str], tuple[float, float, float]]:
    """Configs of the kept plans of a chip, and their MFU: the mean, and the ends of the intervals of their steps.

    8-bit plans are left out, since the MFU is a share of the peak in bfloat16, which their matmuls may exceed.

    Args:
        kind: of the chip, such as "v5p".

    Raises:
        ConfigError: no such plan is kept.
    """
    plans = [each for each in rows if kind_of(each["topology"]) == kind and not suffix_of(_precision(each))]
    if not plans:
        raise ConfigError(f"--topology={kind}: no plan without 8-bit matmuls is kept; give --mfu")
    low = min(each["mfu"] * each["step_seconds"] / each["step_interval"][1] for each in plans)
    high = max(each["mfu"] * each["step_seconds"] / each["step_interval"][0] for each in plans)
    names = list(dict.fromkeys(each["config"] for each in plans))
    return names, (low, sum(each["mfu"] for each in plans) / len(plans), high)


def words(kept: _Row) -> str:
    """Settings of a kept plan as flags of main.py."""
    return " ".join(f"--config.{name}={value}" for name, value in kept["flags"].items())


def sentence(kept: _Row) -> str:
    """A kept plan in a line."""
    return f"{_time(kept)}; compiled at commit {kept['commit']}"


def _time(kept: _Row) -> str:
    """Step, MFU and rate of a kept plan, with the intervals of the first two."""
    low, high = kept["step_interval"]
    step, mfu = kept["step_seconds"], 100 * kept["mfu"]
    return (
        f"step {step:.3g} s ({low:.3g} to {high:.3g}), MFU {mfu:.1f} % ({mfu * step / high:.1f} to "
        f"{mfu * step / low:.1f}), {kept['tokens_per_second_per_chip']:,.0f} tokens/s per {_unit(kept)}"
    )


def _compared(kept: _Row) -> str:
    """Published steps of a kept plan's chip, and what of the plan is not read from its compiled program."""
    steps = kept["chip_steps"]
    words = f"{steps} published step{'s' * (steps > 1)} of this chip"
    words = words if steps else calibration.of_chip(kind_of(kept["topology"]), 0)
    return words if kept["counts"].get("memory") else f"{words}; {_IN_PART}"


#: Plans whose program was not kept: their exchange and all but their kernels were counted by earlier prices.
_IN_PART = "kernels counted by their shapes, other work and exchange as they were compiled"


def _unit(kept: _Row) -> str:
    return "GPU" if kept["platform"] == "gpu" else "chip"


def page(kept: _Row) -> str:
    """A kept plan as text: what it is, where it comes from, its memory and its time."""
    unit = _unit(kept)
    precision = _precision(kept)
    arithmetic = "" if precision == "none" else f", matrix products in {precision}"
    return "\n".join(
        (
            f"{kept['config']} on {kept['topology']}: {kept['chips']} {unit}s{arithmetic}; {kept['tokens']:,} tokens "
            "per step",
            f"  A kept plan, read and not made: compiled in {kept['compile_seconds']:.0f} s at commit {kept['commit']} "
            f"by {', '.join(kept['versions'])}",
            f"  memory    {kept['memory_total'] / 2**30:.1f} GiB of {kept['capacity'] / 2**30:.0f} per {unit} (fact)",
            f"  time      {_time(kept)} (estimate, 80 % intervals)",
            f"            {kept['cost']}",
            f"  compared  {_compared(kept)}",
            f"  bound by  {kept['bound']}",
            f"  its floor {counts.share_words(kept['limits'], kept['step_seconds'])} of the step: the largest of its "
            "FLOPs at peak, its bytes at memory bandwidth and its exchanges on the busiest links",
            *(f"            {reason}" for reason in _reasons(kept)),
            f"  settings  {words(kept) or 'those of the config'}",
        )
    )


def config_of(kept: Mapping[str, Any]) -> Config:
    """Config of a kept plan: a shipped file with the plan's settings."""
    name, _, argument = kept["config"].partition(":")
    fields: Any = load_python_file(shipped.CONFIGS / f"{name}.py").get_config(*[argument] if argument else [])
    fields.update_from_flattened_dict(kept["flags"])
    return from_config_dict(fields)


def _reasons(kept: _Row, most: int = 5) -> list[str]:
    """Instructions that keep a plan far from its floor (:func:`moe.planner.excess.reasons`)."""
    step = Counts.model_validate(kept["counts"])
    return excess.reasons(step, kind_of(kept["topology"]), kept["step_seconds"], kept["limits"], most)


def table(rows: Sequence[_Row]) -> str:
    """All kept plans as a Markdown table."""
    head = (
        "config", "devices", "settings", "memory, GiB", "step, s", "MFU", "of its floor", "steps compared",
        "tokens/s per chip", "commit",
    )  # fmt: skip
    cells = []
    for kept in rows:
        (low, high) = kept["step_interval"]
        step = kept["step_seconds"]
        mfu = 100 * kept["mfu"]
        config, topology, commit = (markdown_text(kept[name]) for name in ("config", "topology", "commit"))
        flags = [f"{name}={value}".replace("`", "'") for name, value in kept["flags"].items()]
        cells.append((
            config, topology, ", ".join(f"`{flag}`" for flag in flags) or "as in the config",
            f"{kept['memory_total'] / 2**30:.1f} of {kept['capacity'] / 2**30:.0f}",
            f"{step:.3g} ({low:.3g} to {high:.3g})", f"{mfu:.1f} % ({mfu * step / high:.1f} to {mfu * step / low:.1f})",
            counts.share_words(kept["limits"], step), str(kept["chip_steps"] or "none"),
            f"{kept['tokens_per_second_per_chip']:,.0f}", commit,
        ))  # fmt: skip
    lines = [markdown_table(head, cells)]
    versions = sorted({", ".join(kept["versions"]) for kept in rows})
    lines += ["", f"Versions: {markdown_text('; '.join(versions))}.", "", _COLUMNS]
    cells = [
        (
            markdown_text(kept["config"]),
            markdown_text(kept["topology"]) + suffix_of(_precision(kept)),
            f"{100 * max(kept['limits'].values()) / kept['step_seconds']:.0f} %",
            markdown_text("; ".join(_reasons(kept, 4))),
        )
        for kept in rows
        if max(kept["limits"].values()) < kept["step_seconds"] / 2
    ]
    if cells:
        lines += ["", _FAR, "", markdown_table(("config", "devices", "of its floor", "instructions"), cells)]
    return "\n".join(lines)


_FAR = """## Far from the floor

Instructions that take plans to less than half of their floor, those first that lose most seconds beyond their own limit
(their FLOPs at peak or their bytes at memory bandwidth). `moe plan` names them for every plan below three quarters."""

#: Meaning of two columns of the table.
_COLUMNS = f"""*Of its floor*: the largest of a step's FLOPs at peak, its bytes at memory bandwidth and its exchanges on
the busiest links, over the step; "at least" for a program of which the last two were not kept, and which has its
{_IN_PART}.
*Steps compared*: published steps of that chip which the planner was held against."""
