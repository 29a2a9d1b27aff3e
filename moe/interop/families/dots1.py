"""dots.llm1: QK-norm per head, DeepSeek-V3's routing, shared experts, windows in the upper layers."""

from moe.config import ModelConfig, sparse_layers
from moe.interop.families.family import (
    ATTENTION,
    DENSE,
    EXPERTS,
    SELECTION_BIAS,
    Family,
    gate_field,
    read_bias,
    read_sigmoid_gate,
    read_sparse_layers,
    read_windows,
    shared_expert,
    write_groups,
    write_windows,
)
from moe.interop.schema import Count, Json, OpenConfig, OptionalCount, Positive, Size, Window


class Dots1Config(OpenConfig):
    """Fields of ``config.json`` with the library's defaults."""

    num_key_value_heads: Count | None = 32
    n_group: Count = 1
    topk_group: Count = 1
    routed_scaling_factor: Positive = 1.0
    n_routed_experts: Count
    n_shared_experts: OptionalCount = 0
    moe_intermediate_size: Size = 1408
    first_k_dense_replace: OptionalCount = 0
    sliding_window: Window = 4096
    max_window_layers: OptionalCount = 62


def read(source: Dots1Config) -> tuple[Json, Json]:
    """See :class:`Family`."""
    num_layers, width = source.num_hidden_layers, source.moe_intermediate_size
    bound = source.max_window_layers
    older = ["sliding_attention" if n >= bound else "full_attention" for n in range(num_layers)]
    windows = read_windows(source.sliding_window or 0, source.layer_types or older)
    moe = {"num_experts": source.n_routed_experts, "d_ff": width, "shared_d_ff": width * source.n_shared_experts}
    layers = read_sparse_layers(list(range(source.first_k_dense_replace, num_layers)), num_layers)
    model = {"qk_norm": "head", "attention_bias": read_bias(source)}
    return model | windows, read_sigmoid_gate(source) | moe | layers


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    moe, sparse = model.moe, sparse_layers(model)
    return (
        {
            "attention_bias": model.attention_bias == "all",
            "norm_topk_prob": gate_field(moe, "renormalise"),
            "n_routed_experts": moe.num_experts,
            "n_shared_experts": moe.shared_d_ff // moe.d_ff,
            "moe_intermediate_size": moe.d_ff,
            "first_k_dense_replace": sparse.index(True) if any(sparse) else model.num_layers,
        }
        | write_groups(moe)
        | write_windows(model)
    )


TENSORS = ATTENTION | DENSE | EXPERTS | SELECTION_BIAS | shared_expert("shared_experts")
FAMILY = Family("dots1", "Dots1ForCausalLM", Dots1Config, read, write, TENSORS)
