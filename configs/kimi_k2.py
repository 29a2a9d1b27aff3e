"""Kimi-K2, a trillion parameters: DeepSeek-V3's layers with 384 experts, 8 a token, without groups of experts.

Plan it without accelerators, then run the same line on them:

    moe plan --config=configs/kimi_k2.py --topology=v5p:8x8x16
    python main.py --config=configs/kimi_k2.py --workdir=DIR

It was never trained here.
"""

from moe.configs import published

get_config = published.config_of("kimi_k2")
