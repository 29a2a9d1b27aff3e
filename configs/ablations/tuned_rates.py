"""The arms of switch_vs_mixtral once more, each at the best of its own learning rates.

    moe ablate --suite=configs/ablations/tuned_rates.py --workdir=/tmp/lab --jobs=2

Four sweeps on seeds 100 and 101: of dense, top-1, top-2 and DeepSeekMoE; arms of one kind share theirs. Where the best
rate is the base config's, the runs are those of switch_vs_mixtral. When claims 44 to 48 were registered, dense's and
top-2's best rate were known to be the base config's and top-1's to be half of it or less, at which no compared run had
been made.
"""

import dataclasses

from moe.configs.ablations import common, switch_vs_mixtral
from moe.lab.suite import Suite

_ARMS = ("dense", "switch", "mixtral", "top1_drop", "top1_free", "top2_drop", "top2_free", "deepseek_moe")


def get_suite(size: str) -> Suite:
    """Dense, the 2 × 2, the arms with Switch's and Mixtral's constants, and DeepSeekMoE."""
    first = switch_vs_mixtral.with_arms(size, _ARMS)
    return dataclasses.replace(
        first,
        name="tuned_rates",
        question="Do the answers on Switch against Mixtral hold with each arm at its best learning rate?",
        variants={name: dataclasses.replace(arm, probes=()) for name, arm in first.variants.items()},
        sweep=common.sweep(size),
        headline=("dense", "switch", "mixtral"),
    )
