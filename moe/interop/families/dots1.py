"""dots.llm1: QK-norm per head, DeepSeek-V3's routing, shared experts, windows in the upper layers."""

from moe.config import ModelConfig
from moe.interop.families.family import (
    ATTENTION,
    DENSE,
    EXPERTS,
    SELECTION_BIAS,
    Family,
    gate_field,
    read_bias,
    read_experts,
    read_sigmoid_gate,
    read_windows,
    shared_expert,
    write_experts,
    write_windows,
)
from moe.interop.schema import Count, Json, OpenConfig, OptionalCount, Positive, RoutedExperts, Size, Window


class Dots1Config(OpenConfig):
    """Fields of ``config.json`` with the library's defaults."""

    num_key_value_heads: Count | None = 32
    n_group: Count = 1
    topk_group: Count = 1
    num_experts_per_tok: OptionalCount = 0  # the library has no default
    routed_scaling_factor: Positive = 1.0
    n_routed_experts: RoutedExperts
    n_shared_experts: OptionalCount = 0
    moe_intermediate_size: Size = 1408
    first_k_dense_replace: OptionalCount = 0
    sliding_window: Window = 4096
    max_window_layers: OptionalCount = 62


def read(source: Dots1Config) -> tuple[Json, Json]:
    """See :class:`Family`."""
    bound = source.max_window_layers
    older = ["sliding_attention" if n >= bound else "full_attention" for n in range(source.num_hidden_layers)]
    windows = read_windows(source.sliding_window or 0, source.layer_types or older)
    model = {"qk_norm": "head", "attention_bias": read_bias(source)}
    return model | windows, read_sigmoid_gate(source) | read_experts(source)


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    own = {
        "attention_bias": model.attention_bias == "all",
        "norm_topk_prob": gate_field(model.moe, "renormalise"),
    }
    return own | write_experts(model) | write_windows(model)


TENSORS = ATTENTION | DENSE | EXPERTS | SELECTION_BIAS | shared_expert("shared_experts")
FAMILY = Family("dots1", "Dots1ForCausalLM", Dots1Config, read, write, TENSORS)
