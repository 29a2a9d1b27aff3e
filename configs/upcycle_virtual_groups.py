"""Granular upcycling with virtual groups (He et al. 2024, arXiv 2410.07524).

    python main.py --config=configs/dense.py --workdir=/tmp/dense
    python main.py --config=configs/upcycle_virtual_groups.py --config.start.checkpoint=/tmp/dense --workdir=/tmp/groups

As configs/upcycle_granular.py, but a token's 8 experts are two whole groups of 4 shards at first, because the experts
of a group share a router column: the first step's loss is the dense model's. --config.start.expert_noise=0.01 breaks
the symmetry of the groups.
"""

from moe.config import Changes
from moe.configs import upcycle_granular


def get_config() -> Changes:
    """Overrides of granular upcycling."""
    config = upcycle_granular.get_config()
    config.start.virtual_groups = True
    return config
