"""The scale of the initial weights, and the precision of the model and of its router, at the start of training.

python scripts/ablate.py --suite=configs/ablations/router_init_and_precision.py --workdir=/tmp/init
"""

from configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant


def get_suite(size: str) -> Suite:
    """Switch's layer with matrices of scale 1.0 and 0.1; float32, bfloat16, and bfloat16 with a float32 router."""
    moe = common.moe(size, "switch", 8, 1)
    rounded = {**moe, "model.dtype": "bfloat16"}
    full = {**moe, "model.dtype": "float32"}
    start = common.horizons(size)[0]
    variants = {
        "init_1.0": Variant(full, note="float32"),
        "init_0.1": Variant({**full, "model.init_scale": 0.1}, note="float32"),
        "selective": Variant(rounded, note="bfloat16, the router in float32"),
        "bfloat16": Variant({**rounded, "model.moe.router_dtype": "bfloat16"}, note="bfloat16, router included"),
    }
    return Suite(
        name="router_init_and_precision",
        question="Do small initial weights and a float32 router make training start better and steadier?",
        base=common.base(size),
        variants=variants,
        seeds=(0, 1, 2, 3, 4),
        horizons=(start,),
        sweep=common.sweep(size, start, factors=(0.5, 1.0, 2.0, 4.0)),  # short runs want larger rates
        comparisons={
            "equal FLOPs and parameters": Comparison("init_1.0", tuple(variants)[1:], common.FLOPS_AND_PARAMETERS)
        },
    )
