"""Switch's layer: top-1 of experts twice as wide, weighted by the full softmax (Switch 2021, equations 1-6).

    python main.py --config=configs/switch.py --workdir=/tmp/switch

Half as many experts of twice the width: total and active parameters equal those of configs/mixtral.py, but for
the router's (0.1 %).
"""

from moe.config import Changes
from moe.configs import base


def get_config() -> Changes:
    """Overrides of the defaults."""
    config = base.get_config()
    config.model.moe.gate = "switch"
    config.model.moe.num_experts = 4
    config.model.moe.d_ff = 1024
    config.model.scan_layers = False  # four layers, written out: a step is a tenth shorter on CPU (scripts/mfu.py)
    return config
