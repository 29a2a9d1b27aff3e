"""Mixtral-8x22B.

Sizes: its published config.json. Plan it without a TPU, then run the same line on one:

    python scripts/plan_pod.py --config=configs/mixtral_8x22b.py --topology=v5p:4x4x4
    python main.py --config=configs/mixtral_8x22b.py --workdir=DIR

It was neither compiled for a pod nor trained here.
"""

import ml_collections

from configs import mixtral_8x7b


def get_config() -> ml_collections.ConfigDict:
    """Mixtral-8x7B's overrides, in other sizes."""
    config = mixtral_8x7b.get_config()
    config.model.update(d_model=6144, num_layers=56, num_heads=48, d_ff=16384)
    config.model.moe.load_balancing_weight = 0.001 * 2 / 56  # Hugging Face's coefficient · K / L, see docs/interop.md
    return config
