"""DeepSeek-V3 without multi-token prediction: sigmoid scores, loss-free balancing, 256 experts, 8 a token.

Sizes: its published config.json. Plan it without accelerators, then run the same line on them:

    python scripts/plan_pod.py --config=configs/deepseek_v3.py --topology=v5p:8x8x8
    python main.py --config=configs/deepseek_v3.py --workdir=DIR

It was never trained here.
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
    config.train.batch_size = 512
    config.mesh.expert = 64
    return config
