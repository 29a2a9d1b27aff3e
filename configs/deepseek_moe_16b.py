"""DeepSeekMoE-16B: 64 fine-grained experts, 6 a token, two shared, the first layer dense.

Plan it without a TPU, then run the same line on one:

    moe plan --config=configs/deepseek_moe_16b.py --topology=v5p:4x4x4
    python main.py --config=configs/deepseek_moe_16b.py --workdir=DIR

It was neither compiled for a pod nor trained here.
"""

from moe.configs import published

get_config = published.config_of("deepseek_moe_16b")
