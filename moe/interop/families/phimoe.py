"""Phi-3.5-MoE: SparseMixer's routing, LayerNorm, biases of attention and logits, longrope with a factor of its own."""

from typing import Annotated

import pydantic

from moe.config import ConfigError, ModelConfig
from moe.interop.families.family import ATTENTION, FUSED_EXPERTS, OUTSIDE, Family, Tensor, read_bias, window_of
from moe.interop.families.mixtral import ALIASES, EXPERTS
from moe.interop.rope import write_scaling
from moe.interop.schema import Context, Count, Experts, Fraction, Json, OpenConfig, Positive, RopeParameters, Window
from moe.routing.gates import SparseMixer


class PhimoeConfig(OpenConfig):
    """Fields of ``config.json`` with the library's defaults; its code chooses two experts whatever the file says."""

    max_position_embeddings: Context = 131072
    num_key_value_heads: Count | None = 8
    rope_theta: Positive = 1e6
    rms_norm_eps: Positive = 1e-5
    sliding_window: Window = None
    num_local_experts: Experts = 16
    num_experts_per_tok: Annotated[int, pydantic.Field(ge=2, le=2)] = 2
    router_jitter_noise: Fraction = 0.01
    input_jitter_noise: Fraction = 0.0
    lm_head_bias: bool = False

    @property
    def rope(self) -> RopeParameters:
        """Rotary positions; the scales of short and of long rows are factors of queries and keys. Raises ConfigError
        for what no published model has: two scales, or another scaling."""
        rope = super().rope
        if rope.rope_type == "default":
            return rope
        if rope.rope_type != "longrope" or rope.short_mscale is None or rope.short_mscale != rope.long_mscale:
            scales = f"short_mscale={rope.short_mscale}, long_mscale={rope.long_mscale}"
            raise ConfigError(f"config.json: {rope.rope_type}, {scales}: must be longrope with two equal scales")
        return rope.model_copy(
            update={"attention_factor": rope.short_mscale, "short_mscale": None, "long_mscale": None}
        )


def read(source: PhimoeConfig) -> tuple[Json, Json]:
    """See :class:`Family`."""
    if source.lm_head_bias and source.tie_word_embeddings:
        raise ConfigError("config.json: lm_head_bias=true: is read only with tie_word_embeddings=false")
    model = {"layer_norm": True, "logit_bias": source.lm_head_bias, "attention_bias": read_bias(source)}
    gate = {"name": "sparse_mixer", "tolerance": source.router_jitter_noise}
    moe = {"gate": gate, "num_experts": source.num_local_experts, "jitter": source.input_jitter_noise}
    return model | {"sliding_window": source.sliding_window or 0}, moe


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    gate, scaling = model.moe.gate, write_scaling(model)
    if rope := scaling.get("rope_scaling"):
        rope["short_mscale"] = rope["long_mscale"] = rope.pop("attention_factor", 1.0)
    return scaling | {
        "intermediate_size": model.moe.d_ff,
        "sliding_window": window_of(model) or None,
        "num_local_experts": model.moe.num_experts,
        "router_jitter_noise": gate.tolerance if isinstance(gate, SparseMixer) else SparseMixer.tolerance,
        "input_jitter_noise": model.moe.jitter,
        "attention_bias": model.attention_bias == "all",
        "lm_head_bias": model.logit_bias,
    }


NORMS = {"attention_norm.bias": "input_layernorm.bias", "ffn_norm.bias": "post_attention_layernorm.bias"}
FAMILY = Family(
    *("phimoe", "PhimoeForCausalLM", PhimoeConfig, read, write),
    ATTENTION | NORMS | EXPERTS,
    outside=lambda _: OUTSIDE | {"final_norm.bias": "model.norm.bias", "unembedding.bias": "lm_head.bias"},
    fused=FUSED_EXPERTS | {"moe.router.kernel": Tensor("mlp.router.weight")},
    aliases=ALIASES,
)
