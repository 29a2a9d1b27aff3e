"""OLMoE-1B-7B: 64 small experts, 8 a token, weights not renormalised, QK-norm over all heads.

Plan it without a TPU, then run the same line on one:

    moe plan --config=configs/olmoe_1b_7b.py --topology=v5p:4x4x4
    python main.py --config=configs/olmoe_1b_7b.py --workdir=DIR

It was never trained here.
"""

from moe.configs import published

get_config = published.config_of("olmoe_1b_7b")
