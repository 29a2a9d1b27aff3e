"""Dense, Switch's and Mixtral's arms at width 128, 32 tokens for each active parameter, three seeds.

moe ablate --suite=configs/ablations/size_128.py --workdir=/tmp/lab --jobs=2

15 runs of about 95 minutes: 24 core-hours on one idle core, the sweep included. Before they start, the page of sizes
predicts this width's contrasts from widths 32 to 96, and the predictions are registered as claims of this suite
(docs/ablations.md): each says that the contrast less its predicted value is within the half-width of the prediction's
interval.
"""

from moe.configs.ablations import sizes
from moe.lab.suite import Suite


def get_suite(size: str) -> Suite:
    """See moe.configs.ablations.sizes."""
    return sizes.at_width(size, 128, seeds=tuple(range(55, 58)))
