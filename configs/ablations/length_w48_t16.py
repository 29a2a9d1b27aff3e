"""Dense, Switch's and Mixtral's arms of width 48 on 16 tokens for each active parameter: 2,600 steps, five seeds.

moe ablate --suite=configs/ablations/length_w48_t16.py --workdir=/tmp/lab --jobs=2

15 runs of about two minutes on one idle core. The rate follows muP from width 64 and is not swept.
"""

from moe.configs.ablations import sizes
from moe.lab.suite import Suite


def get_suite(size: str) -> Suite:
    """See moe.configs.ablations.sizes."""
    return sizes.of_length(size, 48, 16)
