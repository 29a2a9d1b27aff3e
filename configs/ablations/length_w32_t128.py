"""Dense, Switch's and Mixtral's arms of width 32 on 128 tokens for each active parameter: 12,000 steps, five seeds.

moe ablate --suite=configs/ablations/length_w32_t128.py --workdir=/tmp/lab --jobs=2

15 runs of about eight minutes: 2 core-hours on one idle core. The rate follows muP from width 64 and is not swept.
"""

from moe.configs.ablations import sizes
from moe.lab.suite import Suite


def get_suite(size: str) -> Suite:
    """See moe.configs.ablations.sizes."""
    return sizes.of_length(size, 32, 128)
