"""DeepSeek-V3 without multi-token prediction: sigmoid scores, loss-free balancing, 256 experts, 8 a token.

Sizes: its published config.json. It was neither compiled for a pod nor trained here.
"""

import ml_collections

from configs import deepseek_v2


def get_config() -> ml_collections.ConfigDict:
    """Overrides of DeepSeek-V2's settings."""
    config = deepseek_v2.get_config()
    config.model.update(vocab_size=129280, d_model=7168, num_layers=61, d_ff=18432)
    config.model.moe.update(
        gate="deepseek_v3",
        num_experts=256,
        experts_per_token=8,
        d_ff=2048,
        shared_d_ff=2048,
        first_dense=3,
        kept_expert_groups=4,
        routing_scale=2.5,
        load_balancing_weight=1e-4,
    )
    return config
