"""Qwen3-Next-80B-A3B: gated DeltaNet in three of four layers, 512 small experts, 10 a token, a gated shared expert.

Plan it without a TPU, then run the same line on one:

    moe plan --config=configs/qwen3_next_80b_a3b.py --topology=v5p:4x4x4
    python main.py --config=configs/qwen3_next_80b_a3b.py --workdir=DIR

docs/architectures.md says what its program for 64 H100s needs; it was not trained here.
"""

from moe.configs import published

get_config = published.config_of("qwen3_next_80b_a3b")
