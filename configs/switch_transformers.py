"""Switch Transformers (2021): Base-8 … Base-256, Large, XXL and C, as the paper's table 9 and as released.

    moe plan --config=configs/switch_transformers.py:c --topology=v4:8x16x16

T5's blocks with MoE in every second layer of both stacks, in C in all. Where the released configs differ they are rows
of their own: Large has ReLU 4096 there, C 30 heads, and XXL and C a separate output matrix. XXL has 128 experts: the
table says 64, but only 128 give its 395B. A group is a row; the paper's groups hold 2,048 to 8,192 tokens.
"""

from moe.config import Changes, ConfigError
from moe.configs import t5

BASE = (12, 768, 3072, 12, 64)
#: name: (layers of each stack, D, F, heads, head dim), activation, experts, MoE every, separate output matrix
SIZES = {
    **{f"base-{experts}": (BASE, "relu", experts, 2, False) for experts in (8, 16, 32, 64, 128, 256)},
    "large": ((24, 1024, 2816, 16, 64), "geglu", 128, 2, False),
    "large-released": ((24, 1024, 4096, 16, 64), "relu", 128, 2, False),
    "xxl": ((24, 4096, 10240, 64, 64), "geglu", 128, 2, False),
    "xxl-released": ((24, 4096, 10240, 64, 64), "geglu", 128, 2, True),
    "c": ((15, 2080, 6144, 32, 64), "relu", 2048, 1, False),
    "c-released": ((15, 2080, 6144, 30, 64), "relu", 2048, 1, True),
}


def get_config(size: str = "base-128") -> Changes:
    """Overrides of the defaults; the size follows a colon: ``--config=configs/switch_transformers.py:c``.

    Raises:
        ConfigError: for a size that is not in :data:`SIZES`.
    """
    if size not in SIZES:
        raise ConfigError(f"--config=configs/switch_transformers.py:{size}: the sizes are {', '.join(SIZES)}")
    dims, activation, experts, every, own_head = SIZES[size]
    config = t5.encoder_decoder(*dims, activation=activation)
    config.model.update(init_scale=0.1, tie_embeddings=not own_head, scale_logits=not own_head)
    config.model.moe.update(gate="switch", num_experts=experts, every=every)
    if size.startswith("xxl"):  # as released; the others are the gate's, 1.25 and 2
        config.model.moe.capacity.eval = 4.0
    if size.startswith("c"):
        config.model.moe.capacity.train = 1.0
    # 2048 devices do not divide C's D of 2080: split only by `expert`, every device would hold all of attention.
    config.mesh.update(data=1, fsdp=2 if size.startswith("c") else 1, expert=-1)
    return config
