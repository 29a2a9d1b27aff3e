"""Sparse upcycling with noise: every copied expert's matrices get noise of a twentieth of their standard deviation.

    python main.py --config=configs/dense.py --workdir=/tmp/dense
    python main.py --config=configs/upcycle_noise.py --config.start.checkpoint=/tmp/dense --workdir=/tmp/noise

The noise breaks the symmetry of the experts, which the router alone would have to break. With
--config.start.expert_noise=0 it is configs/upcycle.py.
"""

from moe.config import Changes
from moe.configs import upcycle


def get_config() -> Changes:
    """Overrides of sparse upcycling."""
    config = upcycle.get_config()
    config.start.expert_noise = 0.05
    return config
