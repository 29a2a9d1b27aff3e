"""Qwen3-Next: gated DeltaNet in most layers, gated attention in the others, zero-centred norms, shared expert."""

from moe.config import DeltaNetConfig, ModelConfig, layer_kinds
from moe.config.mixers import GatedDelta
from moe.interop.families import qwen3_next_layers as parts
from moe.interop.families.family import ATTENTION, DENSE, EXPERTS, Family, Tensor, read_bias
from moe.interop.families.qwen2_moe import SHARED
from moe.interop.families.qwen_layers import read_experts, write_experts
from moe.interop.schema import Json


def read(source: parts.Qwen3NextConfig) -> tuple[Json, Json]:
    """See :class:`Family`."""
    numbers, interval = range(source.num_hidden_layers), source.full_attention_interval
    kinds = source.layer_types or ["linear_attention" if (n + 1) % interval else "full_attention" for n in numbers]
    delta_net = DeltaNetConfig(
        layers=tuple(layer for layer, kind in enumerate(kinds) if kind == "linear_attention"),
        key_heads=source.linear_num_key_heads,
        value_heads=source.linear_num_value_heads,
        key_dim=source.linear_key_head_dim,
        value_dim=source.linear_value_head_dim,
        conv_width=source.linear_conv_kernel_dim,
    )
    model = {
        "qk_norm": "head",
        "attention_bias": read_bias(source),
        "gated_attention": True,
        "zero_centred_norms": True,
        "rope_dim": int(source.dim_of_head * source.rope.partial_rotary_factor),
        "delta_net": delta_net,
    }
    return model, read_experts(source) | {"shared_d_ff": source.shared_expert_intermediate_size, "shared_gate": True}


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    delta_net = model.delta_net
    linear = [isinstance(kind.mixer, GatedDelta) for kind in layer_kinds(model)]
    return write_experts(model) | {
        "attention_bias": model.attention_bias == "all",
        "partial_rotary_factor": (model.rope_dim or model.head_dim) / model.head_dim,
        "shared_expert_intermediate_size": model.moe.shared_d_ff,
        "layer_types": ["linear_attention" if is_linear else "full_attention" for is_linear in linear],
        "linear_num_key_heads": delta_net.key_heads,
        "linear_num_value_heads": delta_net.value_heads,
        "linear_key_head_dim": delta_net.key_dim,
        "linear_value_head_dim": delta_net.value_dim,
        "linear_conv_kernel_dim": delta_net.conv_width,
    }


def tensors(model: ModelConfig, stack: str) -> dict[str, str | Tensor]:
    """See :class:`Family`: queries and gates alternate by head, projections of DeltaNet by key head."""
    del stack
    d = model.delta_net
    shared = d.value_heads // d.key_heads
    wide, narrow = (d.key_dim, d.key_dim, *(shared * d.value_dim,) * 2), (shared, shared)
    result: dict[str, str | Tensor] = {**ATTENTION, **DENSE, **EXPERTS, **SHARED, **parts.DELTA_NET}
    result |= parts.convolutions(model) | parts.gated_queries(model)
    for part, name in enumerate(("query", "key", "value", "gate")):
        result[f"delta_net.{name}"] = Tensor("linear_attn.in_proj_qkvz.weight", part, turns=wide)
    for part, name in enumerate(("beta", "decay")):
        result[f"delta_net.{name}"] = Tensor("linear_attn.in_proj_ba.weight", part, turns=narrow)
    return result


FAMILY = Family(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    parts.Qwen3NextConfig,
    read,
    write,
    tensors,
    skipped={"mtp.": "multi-token prediction"},
    prediction=parts.PREDICTION,
    prediction_prefixes=parts.PREDICTION_PREFIXES,
)
