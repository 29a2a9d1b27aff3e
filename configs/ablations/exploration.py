"""How top-1 routing explores: not at all, by jitter of the router's input, or by sampling the expert.

python scripts/ablate.py --suite=configs/ablations/exploration.py --workdir=/tmp/exploration
"""

from configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant


def get_suite(size: str) -> Suite:
    """Switch's layer with three exploration rules."""
    variants = {
        "argmax": Variant(common.moe(size, "switch", 8, 1, jitter=0.0)),
        "jitter": Variant(common.moe(size, "switch", 8, 1, jitter=0.01), note="uniform [0.99, 1.01]"),
        "sampled": Variant(common.moe(size, "switch_sampled", 8, 1), note="expert drawn from the softmax"),
    }
    return Suite(
        name="exploration",
        question="Does a top-1 router need to explore?",
        base=common.base(size),
        variants=variants,
        seeds=(0, 1, 2, 3, 4),
        horizons=common.horizons(size),
        sweep=common.sweep(size),
        comparisons={
            "equal FLOPs and parameters": Comparison("argmax", ("jitter", "sampled"), common.FLOPS_AND_PARAMETERS)
        },
    )
