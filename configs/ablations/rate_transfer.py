"""Whether one learning rate serves three widths and three numbers of experts, with and without muP.

python scripts/ablate.py --suite=configs/ablations/rate_transfer.py --workdir=/tmp/lab --jobs=2

Never run so far: seven arms, each with a sweep of its own over seven rates; about nine core-hours. The answer is in the
table of the sweeps: without muP the best rate falls with the width, with it the best rate of width 64 stays the best.
E has no factor in muP, so arms that differ in E alone are the same with and without it.
"""

from typing import Any

from configs.ablations import common
from moe.lab.suite import Comparison, Suite, Sweep, Variant

#: Widths over the base config's.
FACTORS = (1, 2, 4)
#: E of the base width; one expert is the dense model.
EXPERTS, NUM_EXPERTS, K = (1, 16, 64), 16, 2
#: Factors on the base config's rate.
RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def _wide(size: str, factor: int, **model: Any) -> dict[str, Any]:
    """Top-2 of 16 experts in a model so many times as wide as the base config, with more heads of its size."""
    base: Any = common.base(size).model
    grown = {name: factor * base[name] for name in ("d_model", "num_heads", "num_kv_heads", "d_ff")} | model
    moe = common.moe(size, "mixtral", NUM_EXPERTS, K, factor * base.d_ff // K, **common.DROPLESS)
    return {f"model.{name}": value for name, value in grown.items()} | moe


def get_suite(size: str) -> Suite:
    """Three widths without muP, the two wider ones with it, and two other numbers of experts at the base width."""
    unit = int(common.base(size).model.d_model)
    base = _wide(size, 1)
    arms = {f"plain_d{unit * factor}": _wide(size, factor) for factor in FACTORS}
    arms |= {f"mup_d{unit * factor}": _wide(size, factor, base_d_model=unit) for factor in FACTORS[1:]}
    arms["e1"] = {name: value for name, value in base.items() if not name.startswith("model.moe.")}
    arms |= {f"e{number}": base | {"model.moe.num_experts": number} for number in EXPERTS[1:] if number != NUM_EXPERTS}
    rate = float(common.sweep(size).learning_rates[1])
    return common.suite(
        size,
        name="rate_transfer",
        question="Does one learning rate serve widths 64, 128 and 256, and 1, 16 and 64 experts?",
        variants={name: Variant(overrides) for name, overrides in arms.items()},
        seeds=(5, 6, 7),
        horizons=(1000,) if size == "laptop" else (),
        sweep=Sweep(tuple(factor * rate for factor in RATES), seeds=(100, 101)),
        comparisons={
            f"width {unit * factor}": Comparison(
                f"plain_d{unit * factor}", (f"mup_d{unit * factor}",), common.FLOPS_AND_PARAMETERS
            )
            for factor in FACTORS[1:]
        }
        | {"experts": Comparison(f"plain_d{unit}", ("e1", "e64"), ("steps",))},
    )
