"""Experts copied from a trained dense model, against experts from scratch, and against more dense training.

moe ablate --suite=configs/ablations/upcycling.py --workdir=/tmp/lab --jobs=2

An upcycled run of n steps has cost its parent's n dense steps too: from scratch with twice the steps is its match in
FLOPs, and is the next horizon's run where the horizons double.
"""

from typing import Any

from moe.configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant


def get_suite(size: str) -> Suite:
    """A dense parent, then as many steps again on other text: upcycled (top-2 of 8), from scratch, dense continued.

    Upcycled also with noise, with half of the hidden units drawn anew, and as shards of a quarter of the FFN, top-8 of
    32, without and with virtual groups: the same active and total parameters but for the router's.
    """
    moe = common.moe(size, "mixtral", 8, 2, common.hidden(size), **common.DROPLESS)
    shards = common.moe(size, "mixtral", 32, 8, common.hidden(size) // 4, **common.DROPLESS)
    starts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "upcycled": (moe, {}),
        "upcycled_noise": (moe, {"expert_noise": 0.05}),
        "drop_upcycled": (moe, {"drop_share": 0.5}),
        "granular": (shards, {"expert_scale": 4.0}),
        "virtual_groups": (shards, {"expert_scale": 4.0, "virtual_groups": True}),
    }
    longest = common.base(size).train.num_steps
    variants = {
        "parent": Variant({}, note="dense"),
        "scratch": Variant(moe, seed_offset=1000),
        **{
            name: Variant(
                fields | {f"start.{field}": value for field, value in start.items()},
                starts_from="parent",
                seed_offset=1000,
                rate_scale=0.5,
            )
            for name, (fields, start) in starts.items()
        },
        "dense_continued": Variant({}, starts_from="parent", seed_offset=1000, rate_scale=0.5),
    }
    return common.suite(
        size,
        name="upcycling",
        question="Is a dense checkpoint a head start for a sparse model, its own cost counted?",
        variants=variants,
        seeds=(5, 6, 7, 8, 9),
        horizons=(longest // 4, longest // 2, longest),
        comparisons={
            "equal FLOPs and parameters, beside the parent's": Comparison(
                "scratch", ("upcycled",), common.FLOPS_AND_PARAMETERS
            ),
            "ways of upcycling, equal steps": Comparison(
                "upcycled", tuple(name for name in starts if name != "upcycled"), ("steps",)
            ),
            "equal steps": Comparison("dense_continued", ("upcycled",), ("steps",)),
        },
    )
