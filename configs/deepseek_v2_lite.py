"""DeepSeek-V2-Lite: latent attention, 64 fine-grained experts, 6 a token, two shared, the first layer dense.

Plan it without a TPU, then run the same line on one:

    moe plan --config=configs/deepseek_v2_lite.py --topology=v5p:4x4x4
    python main.py --config=configs/deepseek_v2_lite.py --workdir=DIR

It was never trained here.
"""

from moe.configs import published

get_config = published.config_of("deepseek_v2_lite")
