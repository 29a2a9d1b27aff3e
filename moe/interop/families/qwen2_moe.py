"""Qwen1.5-MoE and Qwen2-MoE: a gated shared expert, biases of queries, keys and values, windows by layer."""

from moe.config import ModelConfig, layer_kinds
from moe.interop.families.family import ATTENTION, DENSE, EXPERTS, Family, shared_expert, window_of
from moe.interop.families.qwen_layers import QwenConfig, read_experts, write_experts
from moe.interop.schema import Json, OptionalCount, Size


class Qwen2Config(QwenConfig):
    """Fields of ``config.json`` with the library's defaults."""

    qkv_bias: bool = True
    shared_expert_intermediate_size: Size
    max_window_layers: OptionalCount = 28


def read(source: Qwen2Config) -> tuple[Json, Json]:
    """See :class:`Family`."""
    moe = read_experts(source) | {"shared_d_ff": source.shared_expert_intermediate_size, "shared_gate": True}
    return {"attention_bias": "qkv" if source.qkv_bias else "none"} | _windows(source), moe


def _windows(source: Qwen2Config) -> Json:
    """Layers with a window: those that ``layer_types`` lists; in older files, even ones below max_window_layers."""
    num_layers, window = source.num_hidden_layers, source.sliding_window
    if not source.use_sliding_window or not window:
        return {}
    older = ["sliding_attention" if n % 2 == 0 and n < source.max_window_layers else "" for n in range(num_layers)]
    kinds = source.layer_types or older
    windowed = tuple(n for n, kind in enumerate(kinds) if kind == "sliding_attention")
    if not windowed:
        return {}
    return {"sliding_window": window, "sliding_window_layers": () if len(windowed) == num_layers else windowed}


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    window = window_of(model)
    return write_experts(model) | {
        "qkv_bias": model.attention_bias == "qkv",
        "shared_expert_intermediate_size": model.moe.shared_d_ff,
        "use_sliding_window": window > 0,
        "sliding_window": window or None,
        "layer_types": ["sliding_attention" if kind.window else "full_attention" for kind in layer_kinds(model)],
    }


SHARED = shared_expert("shared_expert") | {"moe.shared.gate": "mlp.shared_expert_gate.weight"}
FAMILY = Family("qwen2_moe", "Qwen2MoeForCausalLM", Qwen2Config, read, write, ATTENTION | DENSE | EXPERTS | SHARED)
