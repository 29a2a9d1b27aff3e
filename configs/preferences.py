"""Training of a chat model on pairs of a chosen and a rejected answer, by DPO (docs/finetuning.md).

    python main.py --config=configs/preferences.py --workdir=/tmp/preferred --config.start.checkpoint=/tmp/chat \
        --config.distill.teacher=/tmp/chat --config.data.dataset=/path/to/pairs

Model and tokenizer are the checkpoint's, which is the reference too.
"""

from moe.config import Changes
from moe.configs import chat


def get_config() -> Changes:
    """Return the settings of the training; start.checkpoint, distill.teacher and data.dataset must be set."""
    config = chat.get_config()
    config.data.objective = "preferences"
    config.optimizer.learning_rate = 1e-6
    config.optimizer.warmup_steps = 50
    return config
