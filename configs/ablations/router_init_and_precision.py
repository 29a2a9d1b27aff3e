"""The scale of the initial weights, and the precision of the model and of its router, at the start of training.

moe ablate --suite=configs/ablations/router_init_and_precision.py --workdir=/tmp/lab --jobs=2
"""

from moe.configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant


def get_suite(size: str) -> Suite:
    """Switch's layer with matrices of scale 1.0 and 0.1; float32, bfloat16, and bfloat16 with a float32 router."""
    moe = common.moe(size, "switch", 8, 1)
    rounded = {**moe, "model.dtype": "bfloat16"}
    full = {**moe, "model.dtype": "float32"}
    variants = {
        "init_1.0": Variant(full, note="float32, initial scale 1.0"),
        "init_0.1": Variant({**full, "model.init_scale": 0.1}, note="float32, initial scale 0.1"),
        "selective": Variant(rounded, note="bfloat16, the router in float32"),
        "bfloat16": Variant({**rounded, "model.moe.router_dtype": "bfloat16"}, note="bfloat16, router included"),
    }
    return common.suite(
        size,
        name="router_init_and_precision",
        question="Do small initial weights and a float32 router make training start better and steadier?",
        variants=variants,
        seeds=(5, 6, 7, 8, 9),
        comparisons={
            "equal FLOPs and parameters": Comparison("init_1.0", tuple(variants)[1:], common.FLOPS_AND_PARAMETERS)
        },
    )
