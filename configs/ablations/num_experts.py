"""1, 4, 16 and 64 experts of one size, top-1: more parameters at equal FLOPs, by horizon.

python scripts/ablate.py --suite=configs/ablations/num_experts.py --workdir=/tmp/num_experts
"""

from configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant


def get_suite(size: str) -> Suite:
    """Switch's layer; one expert is the dense FFN."""
    width = common.hidden(size) // 2
    base = common.base(size)
    base.model.d_ff = width
    variants = {"experts_1": Variant({}, note="dense")}
    for count in (4, 16, 64):
        moe = common.moe(size, "switch", count, 1, width)
        # An expert axis of 8 needs 8 experts.
        mesh = {"mesh.expert": count} if size == "pod" and count < 8 else {}
        variants[f"experts_{count}"] = Variant({**moe, **mesh})
    return Suite(
        name="num_experts",
        question="How far do more experts lower the loss at equal FLOPs?",
        base=base,
        variants=variants,
        seeds=(0, 1, 2, 3, 4),
        horizons=common.horizons(size),
        sweep=common.sweep(size),
        experts={name: int(name.removeprefix("experts_")) for name in variants},
        comparisons={
            "equal active FLOPs": Comparison("experts_1", tuple(variants)[1:], ("steps", "flops"), tolerance=0.05)
        },
    )
