"""The arms of length.py on four times the tokens: 32,000 steps with their own decay, three seeds.

    moe ablate --suite=configs/ablations/length_32k.py --workdir=/tmp/lab --jobs=2

Twelve runs of 40 to 66 minutes: 8 to 13 core-hours. 128 tokens for each active parameter, four epochs of the smallest
domain. Three seeds make a trial of every exploratory claim, and detect differences of about 0.09 nats.
"""

from moe.configs.ablations import length
from moe.lab.suite import Suite


def get_suite(size: str) -> Suite:
    """32,000 steps."""
    return length.of_steps(size, "length_32k", 32_000, tuple(range(45, 48)))
