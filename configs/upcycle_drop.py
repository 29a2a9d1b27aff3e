"""Drop-upcycling (Nakamura et al. 2025, arXiv 2502.19261): half of each copied expert's hidden units are drawn anew.

    python main.py --config=configs/dense.py --workdir=/tmp/dense
    python main.py --config=configs/upcycle_drop.py --config.start.checkpoint=/tmp/dense --workdir=/tmp/drop

The first step's loss lies above the dense model's; experts differ from the start. --config.start.drop_share sets the
share (the paper's best is 0.5); 0 is configs/upcycle.py.
"""

from moe.config import Changes
from moe.configs import upcycle


def get_config() -> Changes:
    """Overrides of sparse upcycling."""
    config = upcycle.get_config()
    config.start.drop_share = 0.5
    return config
