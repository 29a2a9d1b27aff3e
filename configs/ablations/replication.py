"""The primary contrasts of switch_vs_mixtral once more, on ten seeds that no run had used.

    moe ablate --suite=configs/ablations/replication.py --workdir=/tmp/lab --jobs=2

Seventy runs, 18 core-hours at 20,000 tokens/s. Claims 37 to 41 are the primary family's, registered for these seeds.
"""

import dataclasses

from moe.configs.ablations import common, switch_vs_mixtral
from moe.lab.suite import Suite

_ARMS = ("dense", "top1_drop", "top1_free", "top2_drop", "top2_free", "switch", "mixtral")


def get_suite(size: str) -> Suite:
    """Dense, the 2 × 2, and the arms with Switch's and Mixtral's constants."""
    first = switch_vs_mixtral.with_arms(size, _ARMS)
    measured = dataclasses.replace(first.variants["top1_drop"], probes=("eval_capacity",))
    return dataclasses.replace(
        first,
        name="replication",
        question="Do other seeds give the same verdicts on Switch against Mixtral?",
        variants={**first.variants, "top1_drop": measured},
        seeds=common.REPLICATION_SEEDS,
        reserved=common.reserved(*common.REPLICATION_SEEDS),
    )
