"""Mixtral-8x22B.

Plan it without a TPU, then run the same line on one:

    moe plan --config=configs/mixtral_8x22b.py --topology=v5p:4x4x4
    python main.py --config=configs/mixtral_8x22b.py --workdir=DIR

It was never trained here.
"""

from moe.configs import published

get_config = published.config_of("mixtral_8x22b")
