"""Mixtral-8x7B.

Sizes: its published config.json. Plan it without a TPU, then run the same line on one:

    python scripts/plan_pod.py --config=configs/mixtral_8x7b.py --topology=v5p-128
    python main.py --config=configs/mixtral_8x7b.py:v5p-128 --workdir=DIR

What the compiler says of it (time, memory, exchanges) is in docs/pods.md; it was never trained here.
"""

import ml_collections

from configs import base


def get_config(hardware: str = "") -> ml_collections.ConfigDict:
    """Overrides of the defaults; with the best settings known for a slice, such as ``v5p-128`` or ``h100:8x8``."""
    config = base.get_config()
    config.model.update(
        vocab_size=32000,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        d_ff=14336,
        rope_theta=1e6,
        dtype="bfloat16",
        attention="blocked",
        remat="full",
    )
    config.model.moe.update(
        gate="mixtral",
        num_experts=8,
        load_balancing_weight=0.02 * 2 / 32,  # Hugging Face's coefficient · K / L, see docs/interop.md
    )
    config.data.sequence_length = 4096
    config.train.batch_size = 64
    config.mesh.update(data=1, fsdp=-1, expert=8)
    base.use_best_plan(config, "mixtral_8x7b", hardware)
    return config
