"""Capacity factors in training, for top-1 and top-2, and in evaluation of the same frozen models.

python scripts/ablate.py --suite=configs/ablations/capacity_factor.py --workdir=/tmp/capacity_factor
"""

from typing import Any

from configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant

FACTORS = (0.75, 1.0, 1.25, 2.0)


def get_suite(size: str) -> Suite:
    """top-1 of 8 experts, top-2 of 16 half as wide, and top-2 of top-1's own experts (twice the FLOPs)."""
    variants = {}
    for factor in FACTORS:
        for k, gate in ((1, "switch"), (2, "mixtral")):
            fields: dict[str, Any] = {
                "capacity_factor": factor,
                "load_balancing_weight": 0.01,
                "eval_capacity_factor": 2.0,
            }
            variants[f"top{k}_{factor}"] = Variant(
                common.moe(size, gate, 8 * k, k, **fields), probes=("eval_capacity",)
            )
    same: dict[str, Any] = {"capacity_factor": 1.25, "load_balancing_weight": 0.01, "eval_capacity_factor": 2.0}
    variants["top2_same_experts_1.25"] = Variant(common.moe(size, "mixtral", 8, 2, common.hidden(size), **same))
    others = tuple(f"top{k}_{factor}" for factor in FACTORS for k in (1, 2) if (k, factor) != (1, 1.25))
    return Suite(
        name="capacity_factor",
        question="What do dropped tokens cost, in training and in evaluation, with one choice and with two?",
        base=common.base(size),
        variants=variants,
        seeds=(0, 1, 2, 3, 4),
        horizons=common.horizons(size),
        sweep=common.sweep(size),
        comparisons={
            "equal active FLOPs and parameters": Comparison("top1_1.25", others, common.FLOPS_AND_PARAMETERS),
            "same experts": Comparison("top1_1.25", ("top2_same_experts_1.25",), ("steps", "total_parameters")),
        },
    )
