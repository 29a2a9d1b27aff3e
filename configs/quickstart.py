"""A small Mixtral-style model on real text, for two CPU cores.

python main.py --config=configs/quickstart.py --workdir=/tmp/quickstart

4 layers, 8 experts, top-2; 160 steps of 4,096 tokens: larger steps spend less of their time on the optimizer.
"""

import ml_collections

from configs import mixtral


def get_config() -> ml_collections.ConfigDict:
    """Mixtral's layer at the default size, in fewer and larger steps."""
    config = mixtral.get_config()
    config.train.batch_size = 16
    config.train.num_steps = 160
    config.train.eval_every = 40
    config.train.save_every = 40
    config.optimizer.warmup_steps = 20
    return config
