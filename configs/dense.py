"""No experts: one FFN a layer, as wide as the two experts that a token of configs/mixtral.py visits.

python main.py --config=configs/dense.py --workdir=/tmp/dense
"""

from moe.config import Changes
from moe.configs import base


def get_config() -> Changes:
    """Overrides of the defaults."""
    config = base.get_config()
    config.model.moe.gate = "none"
    config.model.d_ff = 1024
    config.model.scan_layers = False  # four layers, written out: a step is a tenth shorter on CPU (scripts/mfu.py)
    return config
