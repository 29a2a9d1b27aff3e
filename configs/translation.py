"""English to German with GShard's layer, on user-interface strings (GShard 2020, section 4, in small).

    python main.py --config=configs/translation.py --workdir=/tmp/translation
    moe translate --workdir=/tmp/translation

23,684 pairs of Home Assistant's translations, 1,246 held out.
"""

from moe.config import Changes
from moe.configs import switch_t5


def get_config() -> Changes:
    """Top-2 of 8 experts, the second sampled, in every second layer of both stacks."""
    config = switch_t5.get_config()
    config.model.moe.update(gate="gshard", group_size=1024)
    config.data.update(objective="pairs", domains=("english_german",), input_length=64, sequence_length=64)
    config.train.update(num_steps=500, eval_every=250, save_every=250)
    config.optimizer.warmup_steps = 50
    return config
