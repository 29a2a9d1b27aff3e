"""GShard's six translation models (2020, table 1): encoder-decoders with MoE in every second layer of both stacks.

    moe plan --config=configs/gshard_translation.py:2048e36l --topology=v3:32x32

12 or 36 layers are 6 + 6 or 18 + 18; 64,000 pieces of source, 32,000 of target, tied to the output. Each expert is a
ReLU FFN of 8192. One expert a core is GShard's rule, so plan 128e on v3:8x8, 512e on v3:16x16, 2048e on v3:32x32.
Adafactor, as in the paper's section 4.
"""

import re

from moe.config import Changes, ConfigError
from moe.configs import t5

SIZES = tuple(f"{experts}e{layers}l" for layers in (12, 36) for experts in (128, 512, 2048))


def get_config(size: str = "128e12l") -> Changes:
    """Overrides of the defaults; the size follows a colon: ``--config=configs/gshard_translation.py:512e36l``.

    Raises:
        ConfigError: for a size that is not in :data:`SIZES`.
    """
    if size not in SIZES:
        raise ConfigError(f"--config=configs/gshard_translation.py:{size}: the sizes are {', '.join(SIZES)}")
    experts, layers = (int(number) for number in re.findall(r"\d+", size))
    config = t5.encoder_decoder(layers // 2, 1024, 8192, 16, 128, activation="relu")
    config.model.update(vocab_size=32000, encoder_vocab_size=64000)
    config.model.moe.update(gate="gshard", num_experts=experts, every=2)
    # 4 million tokens a batch in the paper, on 2048 cores: 1024 of source and of target a core on every size.
    config.data.update(objective="pairs", sequence_length=1024, input_length=1024)
    config.train.batch_size = experts
    config.mesh.update(data=1, fsdp=1, expert=-1)
    return config
