"""DeepSeek-V2-Lite: latent attention, 64 fine-grained experts, 6 a token, two shared, the first layer dense.

Sizes: its published config.json. Plan it without a TPU, then run the same line on one:

    python scripts/plan_pod.py --config=configs/deepseek_v2_lite.py --topology=v5p:4x4x4
    python main.py --config=configs/deepseek_v2_lite.py --workdir=DIR

It was never trained here.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Overrides of the defaults."""
    config = base.get_config()
    config.model.update(
        vocab_size=102400,
        d_model=2048,
        num_layers=27,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128 + 64,
        rope_dim=64,
        rope_interleaved=True,
        kv_lora_rank=512,
        value_dim=128,
        d_ff=10944,
        norm_eps=1e-6,
        dtype="bfloat16",
        attention="blocked",
        remat="full",
    )
    config.model.moe.update(
        gate="deepseek_moe",
        num_experts=64,
        experts_per_token=6,
        d_ff=1408,
        shared_d_ff=2 * 1408,
        first_dense=1,
        load_balancing_weight=1e-3,
        balance_scope="sequence",
    )
    config.data.sequence_length = 4096
    config.train.batch_size = 64
    config.mesh.update(data=1, fsdp=-1, expert=8)
    return config
