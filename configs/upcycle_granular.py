"""Granular upcycling (He et al. 2024, arXiv 2410.07524): experts are shards of a dense FFN.

    python main.py --config=configs/dense.py --workdir=/tmp/dense
    python main.py --config=configs/upcycle_granular.py --config.start.checkpoint=/tmp/dense --workdir=/tmp/granular

The dense FFN's 512 hidden units become 4 shards of 128, and 8 experts hold each of them. A token's 8 experts are any
shards at first, so that its output is not the dense model's (configs/upcycle_virtual_groups.py keeps it); as weights
sum to 1, the down matrices are multiplied by 4. For another dense FFN set --config.model.moe.d_ff to a quarter of it.
"""

from moe.config import Changes
from moe.configs import upcycle


def get_config() -> Changes:
    """Overrides of sparse upcycling."""
    config = upcycle.get_config()
    config.model.moe.update(num_experts=32, gate={"k": 8}, d_ff=128)
    config.start.expert_scale = 4.0
    return config
