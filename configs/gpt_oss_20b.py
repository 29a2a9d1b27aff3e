"""gpt-oss-20b: 32 experts, 4 a token, attention sinks, a window of 128 in every second layer.

Plan it without a TPU, then run the same line on one:

    moe plan --config=configs/gpt_oss_20b.py --topology=v5p:4x4x4
    python main.py --config=configs/gpt_oss_20b.py --workdir=DIR

It was never trained here. An import dequantises its published MXFP4 weights.
"""

from moe.configs import published

get_config = published.config_of("gpt_oss_20b")
