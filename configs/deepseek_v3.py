"""DeepSeek-V3 without multi-token prediction: sigmoid scores, loss-free balancing, 256 experts, 8 a token.

Plan it without accelerators, then run the same line on them:

    moe plan --config=configs/deepseek_v3.py --topology=v5p:8x8x8
    python main.py --config=configs/deepseek_v3.py --workdir=DIR

It was never trained here.
"""

from moe.configs import published

get_config = published.config_of("deepseek_v3")
