"""Width × experts: the law L(N, E) of Clark et al. 2022, top-1 without drops, and whether one rate serves all widths.

python scripts/ablate.py --suite=configs/ablations/scaling_law.py --workdir=/tmp/lab --jobs=2

Shares the runs of width 64 with num_experts.py in the same workdir. Never run so far: about 14 core-hours for three
seeds on idle CPU cores, of which width 256 takes ten.
"""

import dataclasses
from typing import Any

from moe.configs.ablations import common
from moe.configs.ablations.switch_vs_mixtral import SAME
from moe.lab.suite import Comparison, Suite, Variant
from moe.models.flops import count_parameters

#: Times the width of the suites' model → numbers of experts.
_POINTS = {1: (1, 4, 16, 64), 2: (1, 4, 16, 64), 4: (1, 4, 16)}


def get_suite(size: str) -> Suite:
    """Switch's gate without jitter; one expert is the dense FFN."""
    base: Any = common.base(size)
    variants, experts = dict[str, Variant](), dict[str, int]()
    for times, counts in _POINTS.items():
        wider = {f"model.{name}": times * base.model[name] for name in ("d_model", "head_dim", "d_ff") if times > 1}
        dense = f"width_{times}_experts_1"
        for count in counts:
            moe = common.moe(size, "switch", count, 1, times * base.model.d_ff, **SAME, **common.DROPLESS)
            mesh = {"mesh.expert": count} if size == "pod" and 1 < count < 8 else {}
            name = f"width_{times}_experts_{count}"
            own = {**wider, **moe, **mesh} if count > 1 else wider
            variants[name] = Variant(own, note="dense" if count == 1 else "", rate_from="" if count == 1 else dense)
            experts[name] = count
    suite = common.suite(
        size,
        name="scaling_law",
        question="How does the gain of more experts change with the width of the model?",
        variants=variants,
        seeds=(5, 6, 7),
        sweep=common.sweep(size),
        experts=experts,
        comparisons={
            f"width × {times}": Comparison(
                f"width_{times}_experts_1",
                tuple(f"width_{times}_experts_{count}" for count in counts[1:]),
                ("steps", "flops"),
                tolerance=0.1,
            )
            for times, counts in _POINTS.items()
        },
    )
    sizes = {name: count_parameters(suite.config(f"{name.rpartition('_')[0]}_1").model)[0] for name in variants}
    return dataclasses.replace(suite, sizes=sizes)
