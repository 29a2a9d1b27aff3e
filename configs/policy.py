"""Reinforcement learning from rollouts, by GRPO with DAPO's bounds and mean (docs/finetuning.md).

    python main.py --config=configs/policy.py --workdir=/tmp/policy --config.start.checkpoint=/tmp/chat \
        --config.data.dataset=/path/to/rollouts

Model and tokenizer are the checkpoint's. With policy.kl above 0, distill.teacher is the reference model.
"""

from moe.config import Changes
from moe.configs import base


def get_config() -> Changes:
    """Return the settings of the training; start.checkpoint and data.dataset must be set."""
    config = base.get_config()
    config.data.objective = "policy"
    config.data.sequence_length = 1024
    config.data.shuffle_window = 64
    config.model.moe.dispatch = "dropless"
    config.policy.clip_high = 0.28
    config.optimizer.learning_rate = 1e-6
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 10
    config.optimizer.weight_decay = 0.0
    config.train.sample_tokens = 0
    return config
