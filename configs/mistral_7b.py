"""Mistral-7B: the dense twin of Mixtral.

Plan it without a TPU, then run the same line on one:

    moe plan --config=configs/mistral_7b.py --topology=v5p:4x4x4
    python main.py --config=configs/mistral_7b.py --workdir=DIR

It was neither compiled for a pod nor trained here.
"""

from moe.configs import published

get_config = published.config_of("mistral_7b")
