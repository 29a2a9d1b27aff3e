"""Experts copied from a trained dense model, against experts from scratch, and against more dense training.

python scripts/ablate.py --suite=configs/ablations/upcycling.py --workdir=/tmp/upcycling
"""

from configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant


def get_suite(size: str) -> Suite:
    """A dense parent, then as many steps again on other text: upcycled (top-2 of 8), from scratch, dense."""
    moe = common.moe(size, "mixtral", 8, 2, common.hidden(size))
    again = {"optimizer.learning_rate": common.base(size).optimizer.learning_rate / 2}
    variants = {
        "parent": Variant({}, note="dense"),
        "scratch": Variant({**moe, **again}, seed_offset=1000),
        "upcycled": Variant({**moe, **again}, starts_from="parent", seed_offset=1000),
        "dense_continued": Variant(again, starts_from="parent", seed_offset=1000),
    }
    return Suite(
        name="upcycling",
        question="Is a dense checkpoint a head start for a sparse model?",
        base=common.base(size),
        variants=variants,
        seeds=(0, 1, 2),
        primary=common.primary(size),
        comparisons={
            "equal FLOPs and parameters, beside the parent's": Comparison(
                "scratch", ("upcycled",), common.FLOPS_AND_PARAMETERS
            ),
            "equal steps": Comparison("dense_continued", ("upcycled",), ("steps",)),
        },
    )
