"""How top-1 routing explores: not at all, by jitter of the router's input, or by sampling the expert.

moe ablate --suite=configs/ablations/exploration.py --workdir=/tmp/lab --jobs=2

Shares argmax and jitter with switch_vs_mixtral.py in the same workdir.
"""

from moe.configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant


def get_suite(size: str) -> Suite:
    """Switch's layer with three exploration rules."""
    arms = {
        "argmax": (common.moe(size, "switch", 8, 1, jitter=0.0), "most probable expert, no noise"),
        "jitter": (common.moe(size, "switch", 8, 1, jitter=0.01), "router input times uniform noise in [0.99, 1.01]"),
        "sampled": (common.moe(size, "switch_sampled", 8, 1), "expert drawn from the softmax"),
    }
    return common.suite(
        size,
        name="exploration",
        question="Does a top-1 router need to explore?",
        variants={
            name: Variant(moe, rate_from="" if name == "argmax" else "argmax", note=note)
            for name, (moe, note) in arms.items()
        },
        seeds=(5, 6, 7, 8, 9),
        comparisons={
            "equal FLOPs and parameters": Comparison("argmax", ("jitter", "sampled"), common.FLOPS_AND_PARAMETERS)
        },
    )
