"""gpt-oss-120b: gpt-oss-20b with 36 layers of 128 experts.

Plan it without a TPU, then run the same line on one:

    python scripts/plan_pod.py --config=configs/gpt_oss_120b.py --topology=v5p:4x4x8
    python main.py --config=configs/gpt_oss_120b.py --workdir=DIR

It was never trained here.
"""

import ml_collections

from configs import gpt_oss_20b


def get_config() -> ml_collections.ConfigDict:
    """The smaller model's config with other sizes."""
    config = gpt_oss_20b.get_config()
    layers = 36
    config.model.update(num_layers=layers, sliding_window_layers=tuple(range(0, layers, 2)))
    config.model.moe.update(num_experts=128, load_balancing_weight=0.001 * 4 / layers)
    config.train.batch_size = 128
    return config
