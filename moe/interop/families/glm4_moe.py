"""GLM-4-MoE: grouped-query attention with half of each head rotated, DeepSeek-V3's routing, shared experts."""

from moe.config import ModelConfig
from moe.interop.families.family import (
    ATTENTION,
    DENSE,
    EXPERTS,
    SELECTION_BIAS,
    Family,
    gate_field,
    read_experts,
    read_sigmoid_gate,
    shared_expert,
    write_experts,
)
from moe.interop.schema import Context, Count, Json, OpenConfig, OptionalCount, Positive, RoutedExperts, Size


class Glm4MoeConfig(OpenConfig):
    """Fields of ``config.json`` with the library's defaults; multi-token prediction is skipped."""

    max_position_embeddings: Context = 131072
    num_key_value_heads: Count | None = 8
    rms_norm_eps: Positive = 1e-5
    partial_rotary_factor: Positive = 0.5
    use_qk_norm: bool = False
    n_group: Count = 1
    topk_group: Count = 1
    num_experts_per_tok: Count = 8
    norm_topk_prob: bool = True
    routed_scaling_factor: Positive = 1.0
    n_routed_experts: RoutedExperts = 128
    n_shared_experts: OptionalCount = 1
    moe_intermediate_size: Size = 1408
    first_k_dense_replace: OptionalCount = 1
    num_nextn_predict_layers: OptionalCount = 1


def read(source: Glm4MoeConfig) -> tuple[Json, Json]:
    """See :class:`Family`."""
    model = {
        "rope_dim": int(source.dim_of_head * source.rope.partial_rotary_factor),
        "attention_bias": "qkv" if source.attention_bias else "none",
        "qk_norm": "head" if source.use_qk_norm else "none",
    }
    return model, read_sigmoid_gate(source) | read_experts(source)


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    return {
        "partial_rotary_factor": (model.rope_dim or model.head_dim) / model.head_dim,
        "attention_bias": model.attention_bias == "qkv",
        "use_qk_norm": model.qk_norm == "head",
        "norm_topk_prob": gate_field(model.moe, "renormalise"),
    } | write_experts(model)


TENSORS = ATTENTION | DENSE | EXPERTS | SELECTION_BIAS | shared_expert("shared_experts")
FAMILY = Family("glm4_moe", "Glm4MoeForCausalLM", Glm4MoeConfig, read, write, TENSORS)
