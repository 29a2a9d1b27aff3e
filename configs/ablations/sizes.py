"""Dense, Switch's and Mixtral's arms at one width: what size_32 to size_128 and length_w32_t4 to length_w48_t16 share.

The suites of sizes have 32 tokens for each active parameter, those of lengths 4 to 128 with their own decay.

Every width has four heads, experts and FFNs of four times the width (Mixtral's of half of that), and initial scale 0.1.
Rates follow muP from width 64, which `rate_transfer` supports for widths 64 to 256; each width still tries half and
twice the rate on one reserved seed. A width's runs are compared at its own number of steps; the slope of a contrast in
log N, and what it predicts for another width, are on the page of sizes (`moe ablate --claims`).
"""

import dataclasses
from typing import Any

from moe.configs.ablations import common, paper_scale, switch_vs_mixtral
from moe.lab.suite import Comparison, Suite, Sweep, Variant

BASE = 64
ARMS = ("dense", "switch", "mixtral")
SEEDS = tuple(range(55, 60))
#: Width → steps of 2,048 tokens, 32 tokens for each active parameter of the dense model; 8,000 at width 64.
STEPS = {32: 3000, 48: 5200, 64: 8000, 96: 15000, 128: 24000}


def _at_width(overrides: dict[str, Any], width: int) -> dict[str, Any]:
    """Overrides of an arm of width 64 with its experts grown to another width."""
    fields = dict(overrides)
    if (d_ff := fields.get("model.moe.d_ff")) is not None:
        fields["model.moe.d_ff"] = d_ff * width // BASE
    return fields


def _base_and_arms(size: str, width: int) -> tuple[Any, dict[str, Variant]]:
    """The base config and arms of one width; the pod has the base model's, as no other was planned for it."""
    base: Any = common.base(size)
    arms = paper_scale.at_papers_scale(switch_vs_mixtral.with_arms(size, ARMS).variants)
    if size == "laptop":
        base.model.update(d_model=width, head_dim=width // 4, d_ff=4 * width)
        base.train.num_steps = STEPS[width]
        if width != BASE:
            base.model.update(base_d_model=BASE, base_head_dim=BASE // 4)
        arms = {
            name: Variant(_at_width(dict(arm.overrides), width), note=f"{arm.note}, width {width}")
            for name, arm in arms.items()
        }
    return base, {name: Variant(arm.overrides, note=arm.note) for name, arm in arms.items()}


#: Fields of every suite of widths or lengths.
_SHARED: dict[str, Any] = {
    "fixed_seeds": True,
    "dropping_differs": "each layer has its own paper's capacity",
    "comparisons": {
        "equal active FLOPs": Comparison("dense", ("switch", "mixtral"), ("steps", "flops")),
        "equal active and total parameters": Comparison(
            "switch", ("mixtral",), ("steps", "active_parameters", "total_parameters")
        ),
    },
}


def at_width(size: str, width: int, seeds: tuple[int, ...]) -> Suite:
    """The suite of one width, 32 tokens for each active parameter."""
    base, arms = _base_and_arms(size, width)
    rate = float(base.optimizer.learning_rate)
    return common.suite(
        size,
        name=f"size_{width}",
        question=f"How far apart are dense, Switch's and Mixtral's arms at width {width}?",
        base=base,
        variants=arms | {"switch": dataclasses.replace(arms["switch"], rate_from="mixtral")},
        seeds=seeds,
        sweep=Sweep((rate / 2, rate, 2 * rate), seeds=(100,)),
        **_SHARED,
    )


def of_length(size: str, width: int, tokens: int) -> Suite:
    """The suite of one width and number of tokens for each active parameter, at the base rate."""
    base, arms = _base_and_arms(size, width)
    base.train.num_steps = base.train.num_steps * tokens // 32
    return common.suite(
        size,
        name=f"length_w{width}_t{tokens}",
        question=f"How far apart are dense, Switch's and Mixtral's arms of width {width} after {tokens} tokens for "
        "each active parameter?",
        base=base,
        variants=arms,
        seeds=SEEDS,
        **_SHARED,
    )
