"""Kimi-K2: DeepSeek-V3's architecture with other numbers, under a name of its own."""

import dataclasses

from moe.interop.families import deepseek_v3
from moe.interop.schema import OptionalCount


class KimiK2Config(deepseek_v3.DeepseekV3Config):
    """Fields of ``config.json``; the published models have no layer for multi-token prediction."""

    num_nextn_predict_layers: OptionalCount = 0


FAMILY = dataclasses.replace(deepseek_v3.FAMILY, model_type="kimi_k2", schema=KimiK2Config)
