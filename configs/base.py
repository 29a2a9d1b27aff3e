"""All defaults, listed with their units in moe/config/schema.py; other configs override them.

Fine-tuning of a run or an import, with its model shape and tokenizer:

    python main.py --config=configs/base.py --workdir=/tmp/tuned --config.start.checkpoint=/tmp/imported \\
        --config.data.dataset=/path/to/text
"""

import ml_collections

from moe.config import Config, to_config_dict


def get_config() -> ml_collections.ConfigDict:
    """All defaults."""
    return to_config_dict(Config())
