"""Hunyuan-A13B: QK-norm per head after the rotation, one shared expert, positions stretched by a fixed factor."""

from typing import Annotated, Any

import pydantic

from moe.config import ModelConfig, RopeScalingConfig
from moe.interop.families.family import ATTENTION, EXPERTS, FUSED_EXPERTS, Family, read_bias, shared_expert
from moe.interop.schema import Count, Json, NumExperts, OpenConfig, Positive, named


def _same(value: Any) -> Any:
    """Reduce a value that a file lists for each layer to the one that all layers share."""
    if not isinstance(value, list):
        return value
    if len({str(each) for each in value}) != 1:
        raise ValueError("must be the same in all layers")
    return value[0]


class HunyuanConfig(OpenConfig):
    """Fields of ``config.json`` with the library's defaults; lists by layer must hold one value."""

    rms_norm_eps: Positive = 1e-5
    num_experts: Annotated[NumExperts, pydantic.BeforeValidator(_same)] = 1
    num_experts_per_tok: Annotated[Count, pydantic.BeforeValidator(_same), named("moe_topk", "num_experts_per_tok")] = 1


def read(source: HunyuanConfig) -> tuple[Json, Json]:
    """See :class:`Family`."""
    model: Json = {"qk_norm": "rotated", "attention_bias": read_bias(source)}
    rope, dim = source.rope, source.dim_of_head
    if rope.alpha and rope.rope_type == "dynamic":  # the base is stretched once, whatever the length of the row
        theta = rope.rope_theta or source.rope_theta
        model |= {"rope_theta": theta * rope.alpha ** (dim / (dim - 2)), "rope_scaling": RopeScalingConfig()}
    width = source.intermediate_size
    return model, {"gate": "mixtral", "num_experts": source.num_experts, "d_ff": width, "shared_d_ff": width}


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    return {
        "intermediate_size": model.moe.d_ff,
        "num_experts": model.moe.num_experts,
        "attention_bias": model.attention_bias == "all",
    }


ROUTER = {"moe.router.kernel": "mlp.gate.wg.weight"}
NORMS = {f"attention.{name}_norm.scale": f"self_attn.{name}_layernorm.weight" for name in ("query", "key")}
FAMILY = Family(
    "hunyuan_v1_moe",
    "HunYuanMoEV1ForCausalLM",
    HunyuanConfig,
    read,
    write,
    ATTENTION | NORMS | EXPERTS | ROUTER | shared_expert("shared_mlp"),
    fused=FUSED_EXPERTS | ROUTER,
    field_names={"num_experts_per_tok": "moe_topk"},
)
