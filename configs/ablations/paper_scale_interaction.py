"""The 2 × 2 of paper_scale on twenty seeds, as an interaction needs: does dropping act alike on top-1 and top-2?

    moe ablate --suite=configs/ablations/paper_scale_interaction.py --workdir=/tmp/lab --jobs=2

Eighty runs, of which forty are those of paper_scale in the same workdir: 7 to 11 core-hours for the rest. At scale 1.0
the interaction has a standard deviation of 0.022 over seeds: twenty show equivalence within ± 0.017 if there is none,
and detect 0.014; ten, as in claims 25 and 39, can show it only within ± 0.025, against a margin of 0.02.
"""

import dataclasses

from moe.configs.ablations import common, paper_scale
from moe.lab.suite import Comparison, Suite


def get_suite(size: str) -> Suite:
    """top-1 of 8 and top-2 of 16 half as wide, each at capacity factor 1.25 and dropless, all at scale 0.1."""
    first = paper_scale.get_suite(size)
    arms = {name: arm for name, arm in first.variants.items() if name.startswith("top")}
    return dataclasses.replace(
        first,
        name="paper_scale_interaction",
        question="At the initial scale that Switch's paper prescribes, does dropping act alike on top-1 and top-2?",
        variants=arms,
        seeds=common.INTERACTION_SEEDS,
        reserved=common.reserved(*common.INTERACTION_SEEDS),
        headline=(),
        comparisons={
            "equal active and total parameters": Comparison(
                "top1_drop",
                tuple(name for name in arms if name != "top1_drop"),
                ("steps", "active_parameters", "total_parameters"),
            )
        },
    )
