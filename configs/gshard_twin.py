"""Decoder-only twins of GShard's six translation models (GShard 2020, table 1): never trained, sizes for planning.

    python scripts/plan_pod.py --config=configs/gshard_twin.py:2048e36l --topology=v3:32x32

The published models are encoder-decoders with MoE in every second block. A twin has one causal stack of as many
blocks: 12 or 36, 6 or 18 of them MoE. Vocabulary 64,000 in and out, tied. It lacks cross-attention; each expert is a
ReLU FFN of 8192. One expert a core is GShard's rule, so plan 128e on v3:8x8, 512e on v3:16x16, 2048e on v3:32x32.
"""

import re

import ml_collections

from configs import base
from moe.config import ConfigError

SIZES = tuple(f"{experts}e{layers}l" for layers in (12, 36) for experts in (128, 512, 2048))


def get_config(size: str = "128e12l") -> ml_collections.ConfigDict:
    """Overrides of the defaults; the size follows a colon: ``--config=configs/gshard_twin.py:512e36l``.

    Raises:
        ConfigError: for a size that is not in :data:`SIZES`.
    """
    if size not in SIZES:
        raise ConfigError(f"--config=configs/gshard_twin.py:{size}: the sizes are {', '.join(SIZES)}")
    experts, layers = (int(number) for number in re.findall(r"\d+", size))
    config = base.get_config()
    config.model.update(
        vocab_size=64000, d_model=1024, num_layers=layers, num_heads=16, num_kv_heads=16, head_dim=128, d_ff=8192,
        activation="relu", tie_embeddings=True, dtype="bfloat16", attention="blocked", remat="full",
    )  # fmt: skip
    config.model.moe.update(gate="gshard", num_experts=experts, every=2)
    # 4 million tokens a batch in the paper, on 2048 cores; the same 2048 tokens a core on every size.
    config.data.sequence_length = 1024
    config.train.batch_size = 2 * experts
    config.mesh.update(data=1, fsdp=1, expert=-1)
    return config
