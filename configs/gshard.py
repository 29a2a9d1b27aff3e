"""GShard's layer: 8 experts, top-2, the second sent at random by its weight (GShard 2020, algorithm 1).

    python main.py --config=configs/gshard.py --workdir=/tmp/gshard

Total and active parameters equal those of configs/mixtral.py; but for the router's (0.1 %) they are those of
configs/switch.py, and the active ones those of configs/dense.py.
"""

from moe.config import Changes
from moe.configs import base


def get_config() -> Changes:
    """Overrides of the defaults."""
    config = base.get_config()
    config.model.moe.gate = "gshard"
    config.model.moe.num_experts = 8
    config.model.moe.d_ff = 512
    config.model.scan_layers = False  # four layers, written out: a step is a tenth shorter on CPU (scripts/mfu.py)
    return config
