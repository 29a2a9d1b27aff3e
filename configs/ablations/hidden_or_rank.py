"""Smaller hidden size or low rank: eight experts with fewer parameters, and dense against sparse mixtures of eight.

    moe ablate --suite=configs/ablations/hidden_or_rank.py --workdir=/tmp/lab --jobs=2

Experts of rank r are one FFN plus a product of rank r for each matrix (`model.moe.expert_rank`), merged before they
are applied, so that they cost the FLOPs of the FFN. Rank 19 has the total parameters of eight experts of half the
width, rank 45 those of eight of full width. All gates weigh by the softmax over all experts, dropless, at initial scale
0.1; balance weight 0.01 where experts are selected. 2,000 steps, five seeds that no run had used when claims 75 to 80
were registered; rate 0.004, not swept. 40 runs of two to eight minutes: 2.5 core-hours on one idle core.
"""

from typing import Any

from moe.configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant

#: Arms of the question; the others compare dense and sparse mixtures, and follow.
ARMS = ("dense", "full", "half", "low_rank", "high_rank")


def of_base(size: str, base: Any, name: str, steps: int) -> Suite:
    """The suite on a base config."""
    hidden = common.hidden(base)
    # 1 + 8·r·(D + F)/(D·F) FFNs are 4, as of eight experts of half the width, and 8.
    low, high = (round(share * base.model.d_model * hidden / (8 * (base.model.d_model + hidden))) for share in (3, 7))

    def arm(k: int, d_ff: int, note: str, rank: int = 0) -> Variant:
        own: dict[str, Any] = {"losses.balance": 0.01, **common.DROPLESS}
        own |= {"expert_rank": rank} if rank else {}
        return scaled(common.moe(base, "deepseek_moe", 8, k, d_ff, **own), note)

    def mixture(d_ff: int, note: str) -> Variant:
        return scaled(common.moe(base, "dense_mixture", 8, 8, d_ff, **common.DROPLESS), note)

    def scaled(fields: dict[str, Any], note: str) -> Variant:
        return Variant({**fields, "model.init_scale": common.PAPERS_INIT_SCALE}, note=note)

    of_equal_total = ("steps", "flops", "total_parameters")
    return common.suite(
        size,
        name=name,
        question="At equal total parameters and FLOPs, are experts of half the hidden size or of low rank better, and "
        "what does a selection cost against a softmax over all experts?",
        base=base,
        variants={
            "dense": scaled({}, "one FFN"),
            "full": arm(1, hidden, "top-1 of 8 experts of width F"),
            "half": arm(2, hidden // 2, "top-2 of 8 experts of width F/2"),
            "low_rank": arm(1, hidden, f"top-1 of 8 experts of width F that share an FFN, rank {low}", low),
            "high_rank": arm(1, hidden, f"top-1 of 8 experts of width F that share an FFN, rank {high}", high),
            "thin_mixture": mixture(hidden // 8, "softmax over all 8 experts of width F/8"),
            "top2": arm(2, hidden, "top-2 of 8 experts of width F"),
            "mixture": mixture(hidden, "softmax over all 8 experts of width F"),
        },
        seeds=tuple(range(85, 90)),
        horizons=(steps,),
        fixed_seeds=True,
        headline=ARMS,
        comparisons={
            "total parameters of 8 experts of half the width, equal FLOPs": Comparison(
                "half", ("low_rank",), of_equal_total
            ),
            "total parameters of 8 experts, equal FLOPs": Comparison("full", ("high_rank",), of_equal_total),
            "equal FLOPs": Comparison("dense", (*ARMS[1:], "thin_mixture"), ("steps", "flops")),
            "equal total parameters": Comparison("mixture", ("top2", "full"), ("steps", "total_parameters")),
        },
    )


def get_suite(size: str) -> Suite:
    """Width 64 and 2,000 steps."""
    return of_base(size, common.base(size), "hidden_or_rank", 2000 if size == "laptop" else 20_000)
