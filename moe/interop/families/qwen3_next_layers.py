"""Fields and tensors that Qwen3-Next and Qwen3.5-MoE share: gated attention and gated DeltaNet."""

from typing import Annotated, ClassVar

import pydantic

from moe.config import ModelConfig
from moe.interop.families.family import Tensor
from moe.interop.families.qwen_layers import QwenConfig
from moe.interop.schema import Context, Count, HiddenAct, OptionalCount, OptionalNumExperts, Positive, Size


def _is_silu(name: HiddenAct) -> HiddenAct:
    if name not in ("silu", "swish"):
        raise ValueError("must be silu, which the convolutions have")
    return name


class Qwen3NextConfig(QwenConfig):
    """Fields of ``config.json`` with the library's defaults."""

    kinds: ClassVar[tuple[str, ...]] = ("linear_attention", "full_attention")

    intermediate_size: Size = 5632
    num_key_value_heads: Count | None = 2
    head_dim: Count | None = 256
    hidden_act: Annotated[HiddenAct, pydantic.AfterValidator(_is_silu)] = "silu"
    max_position_embeddings: Context = 32768
    partial_rotary_factor: Positive = 0.25
    moe_intermediate_size: Size = 512
    shared_expert_intermediate_size: Size = 512
    num_experts: OptionalNumExperts = 512
    num_experts_per_tok: Count = 10
    norm_topk_prob: bool = True
    full_attention_interval: Count = 4
    linear_num_key_heads: Count = 16
    linear_num_value_heads: Count = 32
    linear_key_head_dim: Count = 128
    linear_value_head_dim: Count = 128
    linear_conv_kernel_dim: Count = 4
    num_nextn_predict_layers: OptionalCount = 0


PREDICTION = {
    "prediction.hidden_norm.scale": "pre_fc_norm_hidden.weight",
    "prediction.embedding_norm.scale": "pre_fc_norm_embedding.weight",
    "prediction.project": "fc.weight",
    "prediction.output_norm.scale": "norm.weight",
}
PREDICTION_PREFIXES = ("mtp.", "mtp.layers.0.")
DELTA_NET = {
    "delta_net.decay_bias": "linear_attn.dt_bias",
    "delta_net.log_decay_scale": "linear_attn.A_log",
    "delta_net.norm.scale": "linear_attn.norm.weight",
    "delta_net.out": "linear_attn.out_proj.weight",
}


def gated_queries(model: ModelConfig) -> dict[str, Tensor]:
    """Queries of attention and the gates of its heads, head by head in one tensor."""
    turns = (model.head_dim, model.head_dim)
    return {
        f"attention.{name}{end}": Tensor(f"self_attn.q_proj.{kind}", part, turns=turns)
        for part, name in enumerate(("query", "gate"))
        for end, kind in (("", "weight"), ("_bias", "bias"))
    }


def channels(model: ModelConfig) -> tuple[int, int, int]:
    """Channels of all heads of queries, keys and values."""
    d = model.delta_net
    return d.key_heads * d.key_dim, d.key_heads * d.key_dim, d.value_heads * d.value_dim


def convolutions(model: ModelConfig) -> dict[str, Tensor]:
    """Convolutions of queries, keys and values, [channels, 1, width] in one tensor."""
    axes = ((1, 2), (), (0,))
    return {
        f"delta_net.{name}_conv": Tensor("linear_attn.conv1d.weight", part, turns=channels(model), axes=axes)
        for part, name in enumerate(("query", "key", "value"))
    }
