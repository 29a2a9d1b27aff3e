"""1 to 128 experts of one size, top-1, dropless: more parameters at equal FLOPs.

moe ablate --suite=configs/ablations/num_experts.py --workdir=/tmp/lab --jobs=2

Shares the runs of 1 and 8 experts with switch_vs_mixtral.py in the same workdir.
"""

from moe.configs.ablations import common
from moe.configs.ablations.switch_vs_mixtral import SAME
from moe.lab.suite import Comparison, Suite, Variant


def get_suite(size: str) -> Suite:
    """Switch's gate without jitter; one expert is the dense FFN."""
    variants = {"experts_1": Variant({}, note="dense")}
    for count in (4, 8, 16, 64, 128):
        moe = common.moe(size, "switch", count, 1, **SAME, **common.DROPLESS)
        # An expert axis of 8 needs 8 experts.
        mesh = {"mesh.expert": count} if size == "pod" and count < 8 else {}
        variants[f"experts_{count}"] = Variant({**moe, **mesh}, rate_from="" if count == 8 else "experts_8")
    return common.suite(
        size,
        name="num_experts",
        question="How far do more experts lower the loss at equal FLOPs?",
        variants=variants,
        seeds=(5, 6, 7, 8, 9),
        experts={name: int(name.removeprefix("experts_")) for name in variants},
        comparisons={
            # The router's columns: 128 are 4 % of the FLOPs of so narrow a model.
            "equal active FLOPs": Comparison("experts_1", tuple(variants)[1:], ("steps", "flops"), tolerance=0.1)
        },
    )
