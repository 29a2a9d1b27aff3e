"""A sparse teacher's probabilities as targets of a dense student.

python scripts/ablate.py --suite=configs/ablations/distillation.py --workdir=/tmp/distillation
"""

from configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant


def get_suite(size: str) -> Suite:
    """Dense alone, a Mixtral-style teacher, and the dense model started from it and taught by it."""
    variants = {
        "teacher": Variant(common.moe(size, "mixtral", 16, 2)),
        "dense": Variant({}),
        "distilled": Variant(
            {"distill.soft_share": 0.25},
            starts_from="teacher",
            teacher="teacher",
            note="starts with the teacher's other weights; a quarter of the loss on its probabilities",
        ),
    }
    return Suite(
        name="distillation",
        question="How much of a sparse model's gain does a dense student keep?",
        base=common.base(size),
        variants=variants,
        seeds=(0, 1, 2),
        primary=common.primary(size),
        comparisons={
            "equal FLOPs and parameters of the student": Comparison(
                "dense", ("distilled",), common.FLOPS_AND_PARAMETERS
            ),
            "equal active FLOPs": Comparison("dense", ("teacher",), ("steps", "flops")),
        },
    )
