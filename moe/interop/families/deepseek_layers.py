"""Fields and tensors that DeepSeek-V2 and V3 share: latent attention, shared experts, leading dense layers."""

from typing import Literal

from moe.config import ConfigError, ModelConfig
from moe.interop.families.family import ATTENTION, DENSE, EXPERTS, shared_expert, write_experts
from moe.interop.schema import Count, Json, Off, OpenConfig, OptionalCount, RoutedExperts, Size


class LatentConfig(OpenConfig):
    """Fields of ``config.json``; biases, which no published model has, are refused."""

    q_lora_rank: OptionalCount | None = None
    kv_lora_rank: Count
    qk_nope_head_dim: Count
    qk_rope_head_dim: Count
    v_head_dim: Count
    n_routed_experts: RoutedExperts
    n_shared_experts: OptionalCount = 0
    moe_intermediate_size: Size
    first_k_dense_replace: OptionalCount = 0
    moe_layer_freq: Literal[1] = 1
    n_group: Count = 1
    topk_group: Count = 1
    attention_bias: Off = False
    mlp_bias: Off = False


def read_latent_attention(source: LatentConfig, interleaved: bool) -> Json:
    """Changes of ModelConfig."""
    scale, kind = source.rope.mscale_all_dim, source.rope.rope_type
    if scale and kind not in ("default", "yarn"):
        raise ConfigError(f"config.json: mscale_all_dim={scale}: is read only with yarn, not with {kind}")
    return {
        "num_kv_heads": source.num_attention_heads,
        "head_dim": source.qk_nope_head_dim + source.qk_rope_head_dim,
        "rope_dim": source.qk_rope_head_dim,
        "rope_interleaved": interleaved,
        "kv_lora_rank": source.kv_lora_rank,
        "q_lora_rank": source.q_lora_rank or 0,
        "value_dim": source.v_head_dim,
    }


def write_fields(model: ModelConfig) -> Json:
    """The fields of latent attention and of experts."""
    return {
        "q_lora_rank": model.q_lora_rank or None,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_nope_head_dim": model.head_dim - model.rope_dim,
        "qk_rope_head_dim": model.rope_dim,
        "head_dim": model.rope_dim,
        "v_head_dim": model.value_dim,
    } | write_experts(model)


LATENT_ATTENTION = {name: tensor for name, tensor in ATTENTION.items() if "key" not in name and "value" not in name} | {
    "attention.query_down": "self_attn.q_a_proj.weight",
    "attention.query_latent_norm.scale": "self_attn.q_a_layernorm.weight",
    "attention.query_up": "self_attn.q_b_proj.weight",
    "attention.kv_down": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_latent_norm.scale": "self_attn.kv_a_layernorm.weight",
    "attention.kv_up": "self_attn.kv_b_proj.weight",
}
TENSORS = LATENT_ATTENTION | DENSE | EXPERTS | shared_expert("shared_experts")
