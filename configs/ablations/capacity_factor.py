"""Capacity factors in training, for top-1 and top-2, and in evaluation of the same frozen models.

moe ablate --suite=configs/ablations/capacity_factor.py --workdir=/tmp/lab --jobs=2

Shares the runs at factor 1.25 with switch_vs_mixtral.py in the same workdir.
"""

from moe.configs.ablations import common
from moe.configs.ablations.switch_vs_mixtral import SAME
from moe.lab.suite import Comparison, Suite, Variant

FACTORS = (0.75, 1.0, 1.25, 2.0)


def get_suite(size: str) -> Suite:
    """top-1 of 8 experts, top-2 of 16 half as wide, and top-2 of top-1's own experts (twice the FLOPs)."""
    variants = {
        f"top{k}_{factor}": Variant(
            common.moe(size, gate, 8 * k, k, **SAME, **{**common.DROPPING, "capacity.train": factor}),
            rate_from="" if factor == 1.25 else f"top{k}_1.25",
            probes=("eval_capacity",),
        )
        for factor in FACTORS
        for k, gate in ((1, "switch"), (2, "mixtral"))
    }
    same = common.moe(size, "mixtral", 8, 2, common.hidden(size), **SAME, **common.DROPPING)
    variants["dense"] = Variant({}, note="one FFN")
    variants["top2_same_experts_1.25"] = Variant(same, rate_from="top2_1.25")
    others = tuple(f"top{k}_{factor}" for factor in FACTORS for k in (1, 2) if (k, factor) != (1, 1.25))
    return common.suite(
        size,
        name="capacity_factor",
        question="What do dropped tokens cost, in training and in evaluation, with one choice and with two?",
        variants=variants,
        seeds=(5, 6, 7, 8, 9),
        dropping_differs="the capacity factor is the factor",
        comparisons={
            "equal active FLOPs and parameters": Comparison("top1_1.25", others, common.FLOPS_AND_PARAMETERS),
            "equal active FLOPs": Comparison("dense", ("top1_1.25", *others), ("steps", "flops")),
            "same experts": Comparison("top1_1.25", ("top2_same_experts_1.25",), ("steps", "total_parameters")),
        },
    )
