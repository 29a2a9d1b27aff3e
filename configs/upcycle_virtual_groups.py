"""Granular upcycling with virtual groups (He et al. 2024, arXiv 2410.07524): experts are shards of a dense FFN.

    python main.py --config=configs/dense.py --workdir=/tmp/dense
    python main.py --config=configs/upcycle_virtual_groups.py --config.start.checkpoint=/tmp/dense --workdir=/tmp/groups

The dense FFN's 512 hidden units become 4 shards of 128, and 8 groups of 4 experts hold one each. A token's 8 experts
are two whole groups at first, because the experts of a group share a router column; as weights sum to 1, the down
matrices are multiplied by 4, and the first step's loss is the dense model's. For another dense FFN set
--config.model.moe.d_ff to a quarter of it. --config.start.virtual_groups=False is plain granular upcycling: the output
is not kept. --config.start.expert_noise=0.01 breaks the symmetry of the groups.
"""

import ml_collections

from configs import upcycle


def get_config() -> ml_collections.ConfigDict:
    """Overrides of sparse upcycling."""
    config = upcycle.get_config()
    config.model.moe.update(num_experts=32, experts_per_token=8, d_ff=128)
    config.start.update(virtual_groups=True, expert_scale=4.0)
    return config
