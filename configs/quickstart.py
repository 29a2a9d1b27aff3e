"""A small Mixtral-style model on real text, for two CPU cores.

    python main.py --config=configs/quickstart.py --workdir=/tmp/quickstart

4 layers, 8 experts, top-2; 320 steps of 2,048 tokens.
"""

import ml_collections

from configs import mixtral


def get_config() -> ml_collections.ConfigDict:
    """Mixtral's layer at the default size."""
    return mixtral.get_config()
