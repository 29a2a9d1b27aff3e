"""A sparse teacher's probabilities as targets of a dense student.

python scripts/ablate.py --suite=configs/ablations/distillation.py --workdir=/tmp/distillation
"""

from configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant


def get_suite(size: str) -> Suite:
    """Dense from scratch; a Mixtral-style teacher; dense from the teacher's weights, with and without soft targets."""
    variants = {
        "teacher": Variant(common.moe(size, "mixtral", 16, 2, dispatch="dropless", eval_capacity_factor=-1)),
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
    return Suite(
        name="distillation",
        question="How much of a sparse model's gain does a dense student keep?",
        base=common.base(size),
        variants=variants,
        seeds=(0, 1, 2, 3, 4),
        horizons=common.horizons(size),
        sweep=common.sweep(size),
        comparisons={
            "distillation against the same warm start": Comparison(
                "warm_start", ("distilled",), common.FLOPS_AND_PARAMETERS
            ),
            "equal active FLOPs": Comparison("dense", ("teacher", "warm_start", "distilled"), ("steps", "flops")),
        },
    )
