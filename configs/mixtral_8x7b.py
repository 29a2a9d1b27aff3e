"""Mixtral-8x7B.

Plan it without a TPU, then run the same line on one:

    moe plan --config=configs/mixtral_8x7b.py --topology=v5p-128
    python main.py --config=configs/mixtral_8x7b.py:v5p-128 --workdir=DIR

docs/pods.md has what the compiler says about it (time, memory, exchanges); it was never trained here.
"""

from moe.configs import published

get_config = published.config_of("mixtral_8x7b")
