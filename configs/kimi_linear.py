"""A small model arranged as Kimi Linear (arXiv 2510.26692) on real text, for two CPU cores.

python main.py --config=configs/kimi_linear.py --workdir=/tmp/kimi_linear

Three layers of Kimi delta attention, then one of attention without positions, each with the quickstart's 8 experts,
top-2; 160 steps of 4,096 tokens, a few minutes.
"""

from moe.config import Changes
from moe.configs import quickstart


def get_config() -> Changes:
    """The quickstart with the token mixers of Kimi Linear."""
    config = quickstart.get_config()
    config.model.update(pattern="mixer x 3 attention", mixer="kimi_delta", rotated_layers="sliding")
    return config
