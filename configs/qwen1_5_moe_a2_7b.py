"""Qwen1.5-MoE-A2.7B: 60 experts, 4 a token, not renormalised, and a shared one behind a sigmoid gate.

Plan it without a TPU, then run the same line on one:

    moe plan --config=configs/qwen1_5_moe_a2_7b.py --topology=v5p:4x4x4
    python main.py --config=configs/qwen1_5_moe_a2_7b.py --workdir=DIR

It was neither compiled for a pod nor trained here.
"""

from moe.configs import published

get_config = published.config_of("qwen1_5_moe_a2_7b")
