"""Switch against Mixtral, taken apart: experts per token × dropping, beside the dense model and the papers' constants.

    moe ablate --suite=configs/ablations/switch_vs_mixtral.py --workdir=/tmp/lab --jobs=2

Every sparse arm has eight times the dense model's FFN parameters and uses an eighth of them for a token. About ten
minutes a run on one idle CPU core: 15 core-hours for ten seeds. A pilot on seed 100, which no comparison uses, gave
3.514 (dense), 3.374 (top1_drop), 3.381 (top1_free with 16 experts) and 3.321 (top2_free).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from moe.configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant

#: Notes on the arms with the constants of Switch's and Mixtral's papers.
SWITCH = "Switch's constants with 8 experts: top-1 of 8, capacity factor 1.25, jitter 0.01, balance weight 0.01"
MIXTRAL = (
    "Mixtral's gate and loss weight with 16 experts of half the width (released: 8 of full width): top-2 of 16, "
    "softmax over the two, dropless, balance weight 0.02"
)
#: Of the four arms that differ in two things alone: one balance weight, no jitter, no noise.
SAME: dict[str, Any] = {"losses.balance": 0.01, "jitter": 0.0}


def two_by_two(size: str) -> dict[str, Variant]:
    """top-1 of 8 and top-2 of 16 half as wide, each at capacity factor 1.25 and dropless."""
    arms = {}
    for k, gate in ((1, "switch"), (2, "mixtral")):
        for name, fields in (("drop", common.DROPPING), ("free", common.DROPLESS)):
            arms[f"top{k}_{name}"] = Variant(
                common.moe(size, gate, 8 * k, k, **SAME, **fields),
                rate_from="" if name == "free" else f"top{k}_free",
                probes=("specialisation", "saturation") if (k, name) == (2, "free") else (),
                note=f"top-{k} of {8 * k}, {'capacity factor 1.25' if name == 'drop' else 'dropless'}",
            )
    return arms


def get_suite(size: str) -> Suite:
    """Dense; the four; DeepSeekMoE; and layers with Switch's, Mixtral's and GShard's constants, at equal parameters."""
    fine = common.hidden(size) // 4  # DeepSeekMoE: quarter-size experts, one of four shared
    routed = 31 if size == "laptop" else 32  # a mesh's expert axis must divide it
    factors = two_by_two(size)
    published = {
        "deepseek_moe": Variant(
            common.moe(
                size,
                "deepseek_moe",
                routed,
                3,
                fine,
                **{"shared_d_ff": fine, "losses.balance": 0.01},
                **common.DROPLESS,
            ),
            probes=("shared_expert",),
            note=f"3 of {routed} fine-grained experts and one shared, dropless",
        ),
        "switch": Variant(
            common.moe(size, "switch", 8, 1),
            rate_from="top1_free",
            note=f"{SWITCH}; initial scale 1.0 (paper: 0.1)",
        ),
        "mixtral": Variant(
            common.moe(size, "mixtral", 16, 2, **common.DROPLESS),
            rate_from="top2_free",
            note=f"{MIXTRAL}; initial scale 1.0",
        ),
        "gshard": Variant(
            common.moe(size, "gshard", 16, 2),
            rate_from="top2_free",
            note="GShard's gate, capacity and loss weight with 16 experts of half the width: top-2, the second expert "
            "used with a probability set by its weight",
        ),
    }
    sparse = (*factors, *published)
    return common.suite(
        size,
        name="switch_vs_mixtral",
        question="At equal active and total parameters, is Mixtral's layer better than Switch's, and by what: the "
        "second expert, or no dropped tokens?",
        variants={"dense": Variant({}, note="one FFN"), **factors, **published},
        seeds=tuple(range(5, 15)),
        fixed_seeds=True,
        headline=("dense", *factors),
        dropping_differs="dropping is one of the two factors",
        comparisons={
            "equal active FLOPs": Comparison("dense", sparse, ("steps", "flops")),
            "equal active and total parameters": Comparison(
                "top1_drop",
                tuple(name for name in sparse if name != "top1_drop"),
                ("steps", "active_parameters", "total_parameters"),
            ),
        },
    )


def with_arms(size: str, arms: Sequence[str]) -> Suite:
    """The suite with these of its arms only, in this order."""
    whole = get_suite(size)
    return dataclasses.replace(
        whole,
        variants={name: whole.variants[name] for name in arms},
        comparisons={
            title: Comparison(c.baseline, tuple(a for a in c.variants if a in arms), c.equal, c.tolerance)
            for title, c in whole.comparisons.items()
        },
    )
