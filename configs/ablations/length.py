"""Dense, Switch's, Mixtral's and DeepSeekMoE's arms on twice the tokens: 16,000 steps with their own decay, five seeds.

    moe ablate --suite=configs/ablations/length.py --workdir=/tmp/lab --jobs=2

Twenty runs of 20 to 33 minutes: 7 to 11 core-hours. 64 tokens for each active parameter, two epochs of the smallest
domain and 0.8 of the largest: text that is seen twice is part of what differs from 8,000 steps. All arms start at scale
0.1, as in paper_scale, whose runs of 8,000 steps are on other seeds. The rate is 0.004, not swept at this length.
"""

import dataclasses

from moe.configs.ablations import common, paper_scale, switch_vs_mixtral
from moe.lab.suite import Suite

_ARMS = ("dense", "switch", "mixtral", "deepseek_moe")


def of_steps(size: str, name: str, steps: int, seeds: tuple[int, ...]) -> Suite:
    """The four arms at one number of steps."""
    first = switch_vs_mixtral.with_arms(size, _ARMS)
    arms = paper_scale.at_papers_scale(first.variants)
    return common.suite(
        size,
        name=name,
        question=f"Where do the differences between dense, Switch, Mixtral and DeepSeekMoE go after {steps:,} steps?",
        variants={arm: dataclasses.replace(variant, rate_from="") for arm, variant in arms.items()},
        seeds=seeds,
        horizons=(steps,),
        fixed_seeds=True,
        dropping_differs="each layer has its own paper's capacity",
        comparisons={
            "equal active FLOPs": dataclasses.replace(
                first.comparisons["equal active FLOPs"], variants=tuple(arm for arm in _ARMS if arm != "dense")
            ),
            "equal active and total parameters": dataclasses.replace(
                first.comparisons["equal active and total parameters"],
                baseline="switch",
                variants=("mixtral", "deepseek_moe"),
            ),
        },
    )


def get_suite(size: str) -> Suite:
    """16,000 steps."""
    return of_steps(size, "length", 16_000, tuple(range(45, 50)))
