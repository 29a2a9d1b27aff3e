"""Qwen1.5-MoE-A2.7B: 60 experts, 4 a token, not renormalised, and a shared one behind a sigmoid gate.

Sizes: its published config.json. Plan it without a TPU, then run the same line on one:

    python scripts/plan_pod.py --config=configs/qwen1_5_moe_a2_7b.py --topology=v5p:4x4x4
    python main.py --config=configs/qwen1_5_moe_a2_7b.py --workdir=DIR

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
        num_layers=24,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        d_ff=5632,
        rope_theta=1e6,
        norm_eps=1e-6,
        attention_bias="qkv",
        dtype="bfloat16",
        attention="blocked",
        remat="full",
    )
    config.model.moe.update(
        gate="deepseek_moe",
        experts_per_token=4,
        d_ff=1408,
        shared_d_ff=5632,
        shared_gate=True,
        num_experts=60,
        load_balancing_weight=0.001 * 4 / 24,  # Hugging Face's coefficient · K / L, see docs/interop.md
    )
    config.data.sequence_length = 4096
    config.train.batch_size = 64
    config.mesh.update(data=1, fsdp=-1, expert=4)
    return config
