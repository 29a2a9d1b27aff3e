"""T5 1.0 and 1.1 (Raffel et al. 2020; the sizes of the released checkpoints): dense encoder-decoders.

    moe plan --config=configs/t5.py:v1_1-xl --topology=v4:4x4x4

1.0 has ReLU and ties its embeddings, 1.1 has gated GELU and unties them. Objective, optimizer and schedule are the
paper's: span corruption of 512 tokens, Adafactor, 0.01 for 10,000 steps, then rsqrt. 114 targets are padded to 128.
"""

from moe.config import Changes, ConfigError
from moe.configs import base

#: name: (layers of each stack, D, F, heads, head dim)
SIZES = {
    "base": (12, 768, 3072, 12, 64),
    "large": (24, 1024, 4096, 16, 64),
    "v1_1-small": (8, 512, 1024, 6, 64),
    "v1_1-base": (12, 768, 2048, 12, 64),
    "v1_1-large": (24, 1024, 2816, 16, 64),
    "v1_1-xl": (24, 2048, 5120, 32, 64),
    "v1_1-xxl": (24, 4096, 10240, 64, 64),
}


def get_config(size: str = "base") -> Changes:
    """Overrides of the defaults; the size follows a colon: ``--config=configs/t5.py:v1_1-base``.

    Raises:
        ConfigError: for a size that is not in :data:`SIZES`.
    """
    if size not in SIZES:
        raise ConfigError(f"--config=configs/t5.py:{size}: the sizes are {', '.join(SIZES)}")
    config = encoder_decoder(*SIZES[size], activation="geglu" if size.startswith("v1_1") else "relu")
    first = not size.startswith("v1_1")
    config.model.update(tie_embeddings=first, scale_logits=first)
    config.model.moe.gate = "none"
    return config


def encoder_decoder(layers: int, d_model: int, d_ff: int, heads: int, head_dim: int, *, activation: str) -> Changes:
    """T5's blocks with tied embeddings, and how T5 and Switch were pre-trained."""
    config = base.get_config()
    config.model.update(
        vocab_size=32128, d_model=d_model, num_layers=layers, encoder_layers=layers, num_heads=heads,
        num_kv_heads=heads, head_dim=head_dim, d_ff=d_ff, activation=activation, relative_buckets=32,
        norm_eps=1e-6, tie_embeddings=True, scale_logits=True, dtype="bfloat16", remat="full",
    )  # fmt: skip
    config.data.update(objective="span_corruption", input_length=512, sequence_length=128)
    config.train.update(batch_size=2048, num_steps=550_000)  # 2^20 tokens of input (Switch, section 2.1)
    config.optimizer.update(
        name="adafactor", schedule="rsqrt", learning_rate=0.01, warmup_steps=10_000, weight_decay=0.0,
        gradient_clip=0.0,
    )  # fmt: skip
    config.mesh.update(data=1, fsdp=-1)
    return config
