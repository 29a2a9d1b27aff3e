"""Dense, Switch's and Mixtral's arms of width 48 on 4 tokens for each active parameter: 650 steps, five seeds.

moe ablate --suite=configs/ablations/length_w48_t4.py --workdir=/tmp/lab --jobs=2

15 runs of about 40 seconds on one idle core. The rate follows muP from width 64 and is not swept.
"""

from moe.configs.ablations import sizes
from moe.lab.suite import Suite


def get_suite(size: str) -> Suite:
    """See moe.configs.ablations.sizes."""
    return sizes.of_length(size, 48, 4)
