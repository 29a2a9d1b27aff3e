"""Dense, the 2 × 2, Switch and Mixtral at the initial scale of Switch's paper, 0.1, on ten new seeds.

    moe ablate --suite=configs/ablations/paper_scale.py --workdir=/tmp/lab --jobs=2

Seventy runs: 12 core-hours on idle cores, 19 at the pace of the recorded runs, which shared theirs. Dense, Switch and
Mixtral come first, seed by seed, so that claims 52 and 53 have their runs after thirty. The learning rate is that of
the other suites, 0.004: no sweep has been run at scale 0.1. When claims 49 to 53 were registered, no run had used seeds
25 to 34; the runs at scale 0.1 already made are Switch's, dense's and Mixtral's on seeds 5 to 9 (`initial_scale`).
"""

import dataclasses
from collections.abc import Mapping

from moe.configs.ablations import common, switch_vs_mixtral
from moe.lab.suite import Suite, Variant

_ARMS = ("dense", "switch", "mixtral", "top1_drop", "top1_free", "top2_drop", "top2_free")
_NOTES = {"switch": switch_vs_mixtral.SWITCH, "mixtral": switch_vs_mixtral.MIXTRAL}


def at_papers_scale(arms: Mapping[str, Variant]) -> dict[str, Variant]:
    """Arms with the initial scale of Switch's paper, and notes that say so."""
    return {
        name: dataclasses.replace(
            arm,
            overrides={**arm.overrides, "model.init_scale": common.PAPERS_INIT_SCALE},
            probes=("eval_capacity",) if name.endswith("_drop") else (),
            note=f"{_NOTES.get(name, arm.note)}; initial scale {common.PAPERS_INIT_SCALE:g}",
        )
        for name, arm in arms.items()
    }


def get_suite(size: str) -> Suite:
    """The arms of `replication`, all at scale 0.1."""
    first = switch_vs_mixtral.with_arms(size, _ARMS)
    return dataclasses.replace(
        first,
        name="paper_scale",
        question="At the initial scale that Switch's paper prescribes, is a second expert of half the width better "
        "than one of full width, do dropped tokens help, and is Mixtral's layer better than Switch's?",
        variants=at_papers_scale(first.variants),
        seeds=common.PAPER_SCALE_SEEDS,
        reserved=common.reserved(*common.PAPER_SCALE_SEEDS),
        headline=("dense", "switch", "mixtral"),
    )
