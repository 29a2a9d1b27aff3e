"""Qwen1.5-MoE and Qwen2-MoE: a gated shared expert, biases of queries, keys and values, windows by layer."""

from moe.config import ModelConfig
from moe.interop.families.family import (
    ATTENTION,
    DENSE,
    EXPERTS,
    Family,
    read_windows,
    shared_expert,
    window_of,
    write_windows,
)
from moe.interop.families.qwen_layers import QwenConfig, read_experts, write_experts
from moe.interop.schema import Context, Count, Json, OptionalCount, OptionalNumExperts, Size


class Qwen2Config(QwenConfig):
    """Fields of ``config.json`` with the library's defaults."""

    max_position_embeddings: Context = 32768
    num_key_value_heads: Count | None = 16
    num_experts: OptionalNumExperts = 60
    num_experts_per_tok: Count = 4
    qkv_bias: bool = True
    shared_expert_intermediate_size: Size
    max_window_layers: OptionalCount = 28


def read(source: Qwen2Config) -> tuple[Json, Json]:
    """See :class:`Family`."""
    moe = read_experts(source) | {"shared_d_ff": source.shared_expert_intermediate_size, "shared_gate": True}
    return {"attention_bias": "qkv" if source.qkv_bias else "none"} | _windows(source), moe


def _windows(source: Qwen2Config) -> Json:
    """Layers with a window: those that ``layer_types`` lists; in older files, even ones below max_window_layers."""
    numbers = range(source.num_hidden_layers)
    older = ["sliding_attention" if n % 2 == 0 and n < source.max_window_layers else "" for n in numbers]
    return read_windows((source.sliding_window or 0) if source.use_sliding_window else 0, source.layer_types or older)


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    return (
        write_experts(model)
        | {
            "qkv_bias": model.attention_bias == "qkv",
            "shared_expert_intermediate_size": model.moe.shared_d_ff,
            "use_sliding_window": window_of(model) > 0,
        }
        | write_windows(model)
    )


SHARED = shared_expert("shared_expert") | {"moe.shared.gate": "mlp.shared_expert_gate.weight"}
FAMILY = Family("qwen2_moe", "Qwen2MoeForCausalLM", Qwen2Config, read, write, ATTENTION | DENSE | EXPERTS | SHARED)
