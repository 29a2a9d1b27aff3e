"""A sparse teacher's probabilities as targets of a dense student.

moe ablate --suite=configs/ablations/distillation.py --workdir=/tmp/lab --jobs=2
"""

from moe.configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant


def get_suite(size: str) -> Suite:
    """Dense from scratch; a Mixtral-style teacher; dense from the teacher's weights, with and without soft targets."""
    variants = {
        "teacher": Variant(common.moe(size, "mixtral", 16, 2, **common.DROPLESS)),
        "dense": Variant({}),
        "warm_start": Variant(
            {}, starts_from="teacher", note="the teacher's weights outside the experts; hard targets"
        ),
        "distilled": Variant(
            {"distill.soft_share": 0.25},
            starts_from="teacher",
            teacher="teacher",
            note="the same start; a quarter of the loss on the teacher's probabilities",
        ),
    }
    return common.suite(
        size,
        name="distillation",
        question="How much of a sparse model's gain does a dense student keep?",
        variants=variants,
        seeds=(5, 6, 7, 8, 9),
        comparisons={
            "distillation against the same warm start": Comparison(
                "warm_start", ("distilled",), common.FLOPS_AND_PARAMETERS
            ),
            "equal active FLOPs": Comparison("dense", ("teacher", "warm_start", "distilled"), ("steps", "flops")),
        },
    )
