"""DeepSeek-V2: DeepSeek-V2-Lite's layers, larger, with compressed queries and device-limited routing.

Sizes: its published config.json. It was neither compiled for a pod nor trained here.
"""

import ml_collections

from configs import deepseek_v2_lite


def get_config() -> ml_collections.ConfigDict:
    """Overrides of DeepSeek-V2-Lite's settings."""
    config = deepseek_v2_lite.get_config()
    config.model.update(d_model=5120, num_layers=60, num_heads=128, num_kv_heads=128, q_lora_rank=1536, d_ff=12288)
    config.model.moe.update(
        num_experts=160,
        d_ff=1536,
        shared_d_ff=2 * 1536,
        expert_groups=8,
        kept_expert_groups=3,
        routing_scale=16.0,
    )
    return config
