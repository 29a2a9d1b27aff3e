"""Whether one learning rate serves three widths and three numbers of experts, with and without muP.

moe ablate --suite=configs/ablations/rate_transfer.py --workdir=/tmp/lab --jobs=2

Short: 2 layers, 300 steps of 1,024 tokens, so that 52 runs take about two hours on a CPU core. The sweep finds
the best rate of each arm; arms that end in _shared take width 64's instead, and claims 30 to 32 are on what that costs.
E has no factor in muP, so arms that differ in E alone are the same with and without it.
"""

from typing import Any

from moe.config import Changes
from moe.configs.ablations import common
from moe.lab.suite import Comparison, Suite, Sweep, Variant

#: Widths over the base config's.
FACTORS = (1, 2, 4)
NUM_EXPERTS, K = 16, 2
#: Factors on the base config's rate.
RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def base(size: str) -> Changes:
    """The suites' dense model, on a laptop with two of its layers and a seventh of its steps' tokens."""
    config = common.base(size)
    if size == "laptop":
        config.model.update(num_layers=2, scan_layers=True)
        config.train.update(batch_size=8, num_steps=300)
    return config


def _wide(size: str, factor: int, **model: Any) -> dict[str, Any]:
    """Top-2 of 16 experts in a model so many times as wide as the base config, with more heads of its size."""
    narrow: Any = base(size).model
    grown = {name: factor * narrow[name] for name in ("d_model", "num_heads", "num_kv_heads", "d_ff")} | model
    moe = common.moe(size, "mixtral", NUM_EXPERTS, K, factor * narrow.d_ff // K, **common.DROPLESS)
    return {f"model.{name}": value for name, value in grown.items()} | moe


def get_suite(size: str) -> Suite:
    """Three widths without muP, the two wider ones with it, and two other numbers of experts at the base width."""
    unit = int(base(size).model.d_model)
    narrow, widest, first = _wide(size, 1), FACTORS[-1] * unit, f"plain_d{unit}"
    arms = {f"plain_d{unit * factor}": _wide(size, factor) for factor in FACTORS}
    arms |= {f"mup_d{unit * factor}": _wide(size, factor, base_d_model=unit) for factor in FACTORS[1:]}
    arms["e1"] = {name: value for name, value in narrow.items() if not name.startswith("model.moe.")}
    arms["e64"] = narrow | {"model.moe.num_experts": 4 * NUM_EXPERTS}
    variants = {name: Variant(overrides) for name, overrides in arms.items()}
    shared = (f"plain_d{widest}", f"mup_d{widest}", "e1", "e64")
    variants |= {f"{name}_shared": Variant(arms[name], rate_from=first) for name in shared}
    rate = float(common.base(size).optimizer.learning_rate)
    same = common.FLOPS_AND_PARAMETERS
    return common.suite(
        size,
        name="rate_transfer",
        question="Does one learning rate serve widths 64, 128 and 256, and 1, 16 and 64 experts?",
        base=base(size),
        variants=variants,
        seeds=(5, 6),
        heldout_rows=64,
        warmup_share=0.1,
        sweep=Sweep(tuple(factor * rate for factor in RATES), seeds=(100,)),
        headline=tuple(name for name in variants if name.endswith(f"{widest}") or name.endswith(f"{widest}_shared")),
        comparisons={
            f"width {unit * factor}": Comparison(f"plain_d{unit * factor}", (f"mup_d{unit * factor}",), same)
            for factor in FACTORS[1:]
        }
        | {f"{name} at the rate of {first}": Comparison(name, (f"{name}_shared",), same) for name in shared}
        | {"experts": Comparison(first, ("e1", "e64"), ("steps",))},
    )
