"""Qwen3-30B-A3B: 128 small experts, 8 a token, weights renormalised, QK-norm per head.

Sizes: its published config.json. Plan it without a TPU, then run the same line on one:

    python scripts/plan_pod.py --config=configs/qwen3_30b_a3b.py --topology=v5p:4x4x4
    python main.py --config=configs/qwen3_30b_a3b.py --workdir=DIR

It was neither compiled for a pod nor trained here.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Overrides of the defaults."""
    config = base.get_config()
    config.model.update(
        vocab_size=151936,
        d_model=2048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        d_ff=6144,
        norm_eps=1e-6,
        rope_theta=1e6,
        qk_norm="head",
        dtype="bfloat16",
        attention="blocked",
        remat="full",
    )
    config.model.moe.update(
        gate="mixtral",
        num_experts=128,
        experts_per_token=8,
        d_ff=768,
        load_balancing_weight=0.001 * 8 / 48,  # Hugging Face's coefficient · K / L, see docs/interop.md
    )
    config.data.sequence_length = 4096
    config.train.batch_size = 64
    config.mesh.update(data=1, fsdp=-1, expert=8)
    return config
