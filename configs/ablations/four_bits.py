"""Experts trained for 4 bits beside bfloat16: matrices rounded to MXFP4 or INT4, with a straight-through gradient.

    moe ablate --suite=configs/ablations/four_bits.py --workdir=/tmp/lab --jobs=2

Runs of one seed start from the same parameters and see the same batches, as in `precision`. Fifteen runs of about eight
minutes: two core-hours. No run had used seeds 80 to 84 when claims 73 and 74 were registered.
"""

from moe.configs.ablations import common
from moe.configs.ablations.switch_vs_mixtral import two_by_two
from moe.lab.suite import Comparison, Suite, Variant


def get_suite(size: str) -> Suite:
    """Top-2 of 16, dropless, in bfloat16 at initial scale 0.1: experts as stored, in MXFP4, in INT4."""
    layer = two_by_two(size)["top2_free"].overrides
    narrow = {**layer, "model.dtype": "bfloat16", "model.init_scale": common.PAPERS_INIT_SCALE}
    kinds = ("mxfp4", "int4")
    rounded = {
        kind: Variant({**narrow, "model.fake_quantize": kind}, note=f"experts rounded to {kind}", rate_from="bfloat16")
        for kind in kinds
    }
    return common.suite(
        size,
        name="four_bits",
        question="What does training the experts for 4 bits cost?",
        variants={"bfloat16": Variant(narrow, note="experts in bfloat16"), **rounded},
        horizons=(2000,),
        seeds=tuple(range(80, 85)),
        comparisons={"equal except for the experts' bits": Comparison("bfloat16", kinds, common.FLOPS_AND_PARAMETERS)},
    )
