"""Dense, Switch's and Mixtral's arms at width 48, 32 tokens for each active parameter, five seeds.

moe ablate --suite=configs/ablations/size_48.py --workdir=/tmp/lab --jobs=2

21 runs of about five minutes: 2 core-hours on one idle core, the sweep included.
"""

from moe.configs.ablations import sizes
from moe.lab.suite import Suite


def get_suite(size: str) -> Suite:
    """See moe.configs.ablations.sizes."""
    return sizes.at_width(size, 48, seeds=tuple(range(55, 60)))
