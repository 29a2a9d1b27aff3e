"""The arms of hidden_or_rank.py at width 32 and 500 steps, 1.0M tokens: the question where two shared cores answer it.

moe ablate --suite=configs/ablations/hidden_or_rank_w32.py --workdir=/tmp/lab --jobs=2

Rank 10 has the total parameters of eight experts of half the width within 4 %, rank 22 those of eight of full width.
40 runs of half a minute on one idle core; 25 of them are of the question itself and come first.
"""

from typing import Any

from moe.configs.ablations import common, hidden_or_rank
from moe.lab.suite import Suite


def get_suite(size: str) -> Suite:
    """Width 32, without muP, which low ranks exclude; the pod's base model is half of that of hidden_or_rank too."""
    base: Any = common.base(size)
    if size == "pod":
        base.model.update(d_model=512, num_heads=8, num_kv_heads=4, d_ff=2048)
        return hidden_or_rank.of_base(size, base, "hidden_or_rank_w32", 20_000)
    base.model.update(d_model=32, head_dim=8, d_ff=128)
    return hidden_or_rank.of_base(size, base, "hidden_or_rank_w32", 500)
