"""Whether the main contrasts hold at three times the size: width 128, 8,000 steps.

python scripts/ablate.py --suite=configs/ablations/width.py --workdir=/tmp/lab --jobs=2

Never run so far: about 45 minutes a run on one idle CPU core, 19 core-hours for five seeds of four arms and the sweep.
"""

import dataclasses
from typing import Any

from moe.configs.ablations import common, switch_vs_mixtral
from moe.lab.suite import Comparison, Suite, Variant

#: Hidden sizes of experts.
_WIDTHS = ("model.moe.d_ff", "model.moe.shared_d_ff")


def _wider(arm: Variant) -> Variant:
    fields = {name: 2 * value if name in _WIDTHS else value for name, value in arm.overrides.items()}
    return dataclasses.replace(arm, overrides=fields)


def get_suite(size: str) -> Suite:
    """Dense, top-1 with drops, top-2 without and DeepSeekMoE of switch_vs_mixtral, twice as wide."""
    base: Any = common.base(size)
    if size == "laptop":
        base.model.update(d_model=128, head_dim=32, d_ff=512)
    names = ("dense", "top1_drop", "top1_free", "top2_free", "deepseek_moe")
    arms = switch_vs_mixtral.get_suite(size).variants
    wider = {name: _wider(arms[name]) if size == "laptop" else arms[name] for name in names}
    return common.suite(
        size,
        name="width",
        question="Do the effects of a second expert and of dropless training hold at twice the width?",
        base=base,
        variants=wider,
        seeds=(5, 6, 7, 8, 9),
        sweep=common.sweep(size),
        headline=tuple(name for name in names if name != "top1_free"),
        dropping_differs="dropping is one of the factors",
        comparisons={"equal active FLOPs": Comparison("dense", names[1:], ("steps", "flops"))},
    )
