"""Distillation into a dense model (Switch 2021, section 4.2): a quarter of the loss is on the teacher's probabilities.

    python main.py --config=configs/quickstart.py --workdir=/tmp/teacher
    python main.py --config=configs/distill.py --config.start.checkpoint=/tmp/teacher \
        --config.distill.teacher=/tmp/teacher --workdir=/tmp/student

The student starts with the teacher's weights except for the experts, and uses its tokenizer and model shape.
"""

from moe.config import Changes
from moe.configs import base


def get_config() -> Changes:
    """Overrides of the defaults."""
    config = base.get_config()
    config.model.moe.gate = "none"
    config.distill.soft_share = 0.25
    return config
