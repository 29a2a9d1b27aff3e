"""gpt-oss-120b: gpt-oss-20b with 36 layers of 128 experts.

Plan it without a TPU, then run the same line on one:

    moe plan --config=configs/gpt_oss_120b.py --topology=v5p:4x4x8
    python main.py --config=configs/gpt_oss_120b.py --workdir=DIR

It was never trained here.
"""

from moe.configs import published

get_config = published.config_of("gpt_oss_120b")
