"""ST-MoE-L and ST-MoE-32B (Zoph et al. 2022, table 8): T5's blocks, MoE in every fourth layer, top-2.

moe plan --config=configs/st_moe.py:32b --topology=v4:8x8x16
"""

from moe.config import Changes, ConfigError
from moe.configs import t5

#: name: (layers of each stack, D, F, heads, head dim), experts
SIZES = {"l": ((27, 1024, 2816, 16, 64), 32), "32b": ((27, 5120, 20480, 64, 128), 64)}


def get_config(size: str = "l") -> Changes:
    """Overrides of the defaults; the size follows a colon: ``--config=configs/st_moe.py:32b``.

    Raises:
        ConfigError: for a size that is not in :data:`SIZES`.
    """
    if size not in SIZES:
        raise ConfigError(f"--config=configs/st_moe.py:{size}: the sizes are {', '.join(SIZES)}")
    dims, experts = SIZES[size]
    config = t5.encoder_decoder(*dims, activation="geglu")
    config.model.moe.update(gate="st_moe", num_experts=experts, every=4)
    config.mesh.update(data=1, fsdp=-1, expert=experts)
    return config
