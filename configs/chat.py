"""Supervised fine-tuning of a checkpoint on conversations, with the loss on the answers (docs/finetuning.md).

    python main.py --config=configs/chat.py --workdir=/tmp/chat --config.start.checkpoint=/tmp/imported \
        --config.data.dataset=/path/to/conversations

Model and tokenizer are the checkpoint's. The balance losses keep the weights of its gate.
"""

from moe.config import Changes
from moe.configs import base


def get_config() -> Changes:
    """Return the settings of the fine-tuning; start.checkpoint and data.dataset must be set."""
    config = base.get_config()
    config.data.objective = "chat"
    config.data.sequence_length = 1024
    config.data.shuffle_window = 256
    config.optimizer.learning_rate = 2e-5
    config.optimizer.weight_decay = 0.0
    config.optimizer.warmup_steps = 20
    config.train.num_steps = 400
    config.train.eval_every = 100
    config.train.save_every = 100
    return config
