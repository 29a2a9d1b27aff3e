"""Qwen3-30B-A3B: 128 small experts, 8 a token, weights renormalised, QK-norm per head.

Plan it without a TPU, then run the same line on one:

    moe plan --config=configs/qwen3_30b_a3b.py --topology=v5p:4x4x4
    python main.py --config=configs/qwen3_30b_a3b.py --workdir=DIR

It was never trained here.
"""

from moe.configs import published

get_config = published.config_of("qwen3_30b_a3b")
