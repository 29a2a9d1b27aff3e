"""OLMoE-1B-7B: 64 small experts, 8 a token, weights not renormalised, QK-norm over all heads.

Sizes: its published config.json; losses: OLMoE 2024, section 3. Plan it without a TPU, then run the same line on one:

    python scripts/plan_pod.py --config=configs/olmoe_1b_7b.py --topology=v5p:4x4x4
    python main.py --config=configs/olmoe_1b_7b.py --workdir=DIR

It was neither compiled for a pod nor trained here.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Overrides of the defaults."""
    config = base.get_config()
    config.model.update(
        vocab_size=50304,
        d_model=2048,
        num_layers=16,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        d_ff=1024,
        rope_theta=1e4,
        qk_norm="full",
        dtype="bfloat16",
        attention="blocked",
        remat="full",
    )
    config.model.moe.update(
        gate="switch",
        num_experts=64,
        experts_per_token=8,
        jitter=0.0,
        load_balancing_weight=0.01 * 8 / 16,  # Hugging Face's coefficient · K / L, see docs/interop.md
        z_loss_weight=0.001,
    )
    config.data.sequence_length = 4096
    config.train.batch_size = 64
    config.mesh.update(data=1, fsdp=-1, expert=8)
    return config
