"""Qwen3-MoE: QK-norm per head, one window for all layers, dense layers among sparse ones."""

from moe.config import ModelConfig
from moe.interop.families.family import ATTENTION, DENSE, EXPERTS, Family, read_bias, window_of
from moe.interop.families.qwen_layers import QwenConfig, read_experts, write_experts
from moe.interop.schema import Context, Count, Json, OptionalNumExperts


class Qwen3MoeConfig(QwenConfig):
    """Fields of ``config.json`` with the library's defaults."""

    max_position_embeddings: Context = 32768
    num_key_value_heads: Count | None = 4
    num_experts: OptionalNumExperts = 128
    num_experts_per_tok: Count = 8


def read(source: Qwen3MoeConfig) -> tuple[Json, Json]:
    """See :class:`Family`."""
    window = (source.sliding_window or 0) if source.use_sliding_window else 0
    model = {"qk_norm": "head", "attention_bias": read_bias(source), "sliding_window": window}
    return model, read_experts(source)


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    window = window_of(model)
    return write_experts(model) | {
        "attention_bias": model.attention_bias == "all",
        "use_sliding_window": window > 0,
        "sliding_window": window or None,
    }


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", Qwen3MoeConfig, read, write, ATTENTION | DENSE | EXPERTS)
