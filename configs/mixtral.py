"""Mixtral's layer: 8 SwiGLU experts, top-2, weights the softmax of the two (Mixtral 2024, section 2.1).

    python main.py --config=configs/mixtral.py --workdir=/tmp/mixtral

Total and active parameters equal those of configs/gshard.py and configs/switch.py; active ones those of
configs/dense.py.
"""

from moe.config import Changes
from moe.configs import base


def get_config() -> Changes:
    """Overrides of the defaults."""
    config = base.get_config()
    config.model.moe.gate = "mixtral"
    config.model.moe.num_experts = 8
    config.model.moe.d_ff = 512
    config.model.scan_layers = False  # four layers, written out: a step is a tenth shorter on CPU (scripts/mfu.py)
    return config
