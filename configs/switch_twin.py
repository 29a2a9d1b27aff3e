"""Decoder-only twins of Switch-Base, -Large, -XXL and -C (Switch 2021, table 9): never trained, sizes for planning.

    python scripts/plan_pod.py --config=configs/switch_twin.py:c --topology=v4:8x16x16

The published models are T5s. A twin has one causal stack with as many blocks as encoder and decoder together, the same
widths, experts and ReLU or GEGLU, the vocabulary of 32,128 and tied embeddings. It lacks cross-attention and T5's
relative position bias (rotary positions instead), hence a few percent fewer parameters. XXL has 128 experts here:
the table says 64, but only 128 make its 395B.
"""

import ml_collections

from configs import base
from moe.config import ConfigError

#: name: (blocks, D, F, heads, head dim, activation, experts, MoE every)
SIZES = {
    "base": (24, 768, 3072, 12, 64, "relu", 128, 2),
    "large": (48, 1024, 2816, 16, 64, "geglu", 128, 2),
    "xxl": (48, 4096, 10240, 64, 64, "geglu", 128, 2),
    "c": (30, 2080, 6144, 32, 64, "relu", 2048, 1),
}


def get_config(size: str = "base") -> ml_collections.ConfigDict:
    """Overrides of the defaults; the size follows a colon: ``--config=configs/switch_twin.py:c``.

    Raises:
        ConfigError: for a size that is not in :data:`SIZES`.
    """
    if size not in SIZES:
        raise ConfigError(f"--config=configs/switch_twin.py:{size}: the sizes are {', '.join(SIZES)}")
    blocks, d_model, d_ff, heads, head_dim, activation, experts, every = SIZES[size]
    config = base.get_config()
    config.model.update(
        vocab_size=32128, d_model=d_model, num_layers=blocks, num_heads=heads, num_kv_heads=heads, head_dim=head_dim,
        d_ff=d_ff, activation=activation, tie_embeddings=True, init_scale=0.1, dtype="bfloat16",
        attention="blocked", remat="full",
    )  # fmt: skip
    config.model.moe.update(gate="switch", num_experts=experts, every=every)
    config.data.sequence_length = 512
    config.train.batch_size = 2048  # 2^20 tokens, section 2.1
    # C's D of 2080 does not divide by 2048 devices: split by `expert` alone, its attention would lie whole on each.
    config.mesh.update(data=1, fsdp=2 if size == "c" else 1, expert=-1)
    return config
