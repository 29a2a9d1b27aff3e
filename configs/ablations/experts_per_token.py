"""Experts per token alone: 1, 2 and 4 with one gate, at equal FLOPs and parameters, and of the same experts.

moe ablate --suite=configs/ablations/experts_per_token.py --workdir=/tmp/lab --jobs=2
"""

from moe.configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant


def get_suite(size: str) -> Suite:
    """DeepSeekMoE's gate (softmax probabilities as weights, for any K) without shared experts, dropless."""
    own = {"losses.balance": 0.01, **common.DROPLESS}
    arms = {f"k{k}": common.moe(size, "deepseek_moe", 8 * k, k, **own) for k in (1, 2, 4)}
    width = common.hidden(size) // 4
    arms |= {f"k{k}_of_32": common.moe(size, "deepseek_moe", 32, k, width, **own) for k in (1, 2)}
    return common.suite(
        size,
        name="experts_per_token",
        question="Does a token gain from more experts, at equal FLOPs and at the FLOPs that they cost?",
        variants={name: Variant(moe, rate_from="" if name == "k2" else "k2") for name, moe in arms.items()},
        seeds=(5, 6, 7, 8, 9),
        comparisons={
            "equal FLOPs and parameters": Comparison("k1", ("k2", "k4"), common.FLOPS_AND_PARAMETERS),
            "the same 32 experts": Comparison("k1_of_32", ("k2_of_32", "k4"), ("steps", "total_parameters")),
        },
    )
