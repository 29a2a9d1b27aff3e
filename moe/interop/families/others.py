"""Families of vendors with an architecture of their own: OLMoE, gpt-oss, ERNIE, Hunyuan, Granite."""

import dataclasses
from typing import Annotated, Any

import pydantic

from moe.config import ConfigError, ModelConfig, RopeScalingConfig, layer_kinds, sparse_layers
from moe.config.mixers import GroupedQuery
from moe.dispatch.ffn import SWIGLU_LIMIT, SWIGLU_SLOPE
from moe.interop.families import groups
from moe.interop.families.family import ATTENTION, DENSE, EXPERTS, FUSED_EXPERTS, Family, Tensor, shared_expert
from moe.interop.families.rows import ABSENT, Row, always, constant
from moe.interop.schema import (
    Coefficient,
    Count,
    Experts,
    NumExperts,
    NumLocalExperts,
    Off,
    OptionalCount,
    Positive,
    RopeParameters,
    Size,
    named,
)

# --- Allen AI --------------------------------------------------------------------------------------------------------
_CLIP = Positive | None  # 0 would make all queries, keys and values zero
_OLMOE = (
    always("qk_norm", "full"),
    groups.ALL_BIASES,
    groups.SOFTMAX_GATE,
    groups.EXPERT_SIZE,
    Row("num_experts", "moe.num_experts", NumExperts, 64),
)
#: OLMoE: QK-norm over all heads together.
OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    (*_OLMOE, Row("clip_qkv", "clip_qkv", _CLIP, None, there=lambda m: m.clip_qkv or None)),
    ATTENTION | EXPERTS,
    defaults={
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 8,
        "router_aux_loss_coef": 0.01,
    },
)
#: FlexOlmo: OLMoE's layers with norms after attention and experts instead of before.
FLEX_OLMO = Family(
    "flex_olmo",
    "FlexOlmoForCausalLM",
    (*_OLMOE, always("norms", "after"), Row("clip_qkv", type=_CLIP, default=None)),
    ATTENTION
    | {"attention_norm.scale": "post_attention_layernorm.weight", "ffn_norm.scale": "post_feedforward_layernorm.weight"}
    | EXPERTS,
    defaults={
        **OLMOE.defaults,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500_000.0,
        "num_experts": 7,
        "num_experts_per_tok": 5,
    },
)

# --- OpenAI ----------------------------------------------------------------------------------------------------------
_SCALING = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}


def _plain_positions(model: ModelConfig) -> Any:
    """The library scales positions by default, so a model without scaling must state it."""
    if model.rope_scaling.kind != "none":
        return ABSENT
    return {"rope_type": "default", "rope_theta": model.rope_theta}


def _published(theirs: str, value: float) -> Row:
    """A constant of the activation."""
    return constant(theirs, Annotated[float, pydantic.Field(ge=value, le=value)], value)


#: gpt-oss: attention sinks, alternate windows, biases everywhere, clamped SwiGLU, experts in one tensor a layer.
GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    (
        always("activation", "swiglu_clamped"),
        _published("swiglu_alpha", SWIGLU_SLOPE),
        _published("swiglu_limit", SWIGLU_LIMIT),
        always("attention_sinks", True),
        groups.ALL_BIASES,
        *groups.windows(lambda layer, file: layer % 2 == 0),
        Row("rope_parameters", there=_plain_positions),
        always("moe.gate.name", "mixtral"),
        always("moe.bias", "all"),
        groups.EXPERT_SIZE,
        Row("num_local_experts", "moe.num_experts", NumLocalExperts, 128),
    ),
    ATTENTION
    | {
        "attention.sinks": "self_attn.sinks",
        "moe.router.kernel": "mlp.router.weight",
        "moe.router.logit_bias": "mlp.router.bias",
        "moe.experts.gate": Tensor("mlp.experts.gate_up_proj", 0, turns=(1, 1), inputs_first=True),
        "moe.experts.up": Tensor("mlp.experts.gate_up_proj", 1, turns=(1, 1), inputs_first=True),
        "moe.experts.down": Tensor("mlp.experts.down_proj", inputs_first=True),
        "moe.experts.gate_bias": Tensor("mlp.experts.gate_up_proj_bias", 0, turns=(1, 1)),
        "moe.experts.up_bias": Tensor("mlp.experts.gate_up_proj_bias", 1, turns=(1, 1)),
        "moe.experts.down_bias": "mlp.experts.down_proj_bias",
    },
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "rope_scaling": RopeParameters.model_validate(_SCALING),
        "attention_bias": True,
        "sliding_window": 128,
        "num_experts_per_tok": 4,
    },
)

# --- Baidu -----------------------------------------------------------------------------------------------------------


def _ernie_layers(file: Any) -> tuple[int, ...] | None:
    last = file.moe_layer_end_index
    last = file.num_hidden_layers - 1 if last == -1 else min(last, file.num_hidden_layers - 1)
    step = file.moe_layer_interval
    return groups.some_layers([n for n in range(file.moe_layer_start_index, last + 1) if (n + 1) % step == 0], file)


def _sparse(model: ModelConfig) -> list[int]:
    """Numbers of the MoE layers; that of a layer after the last one if there is none."""
    return [layer for layer, sparse in enumerate(sparse_layers(model)) if sparse] or [model.num_layers]


def _interval(model: ModelConfig) -> int:
    """The interval counts from layer 0: where the second MoE layer follows at once, it is 1."""
    layers = _sparse(model)
    return layers[1] - layers[0] if len(layers) > 1 else 1


#: ERNIE-4.5-MoE: softmax scores with a selection bias, renormalised; interleaved rotation, shared experts. Biases of
#: matrices, which no published model has, are refused.
ERNIE4_5_MOE = Family(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    (
        always("rope_interleaved", True),
        always("moe.gate", {**groups.PLAIN_GATE, "score": "softmax"}),
        groups.BATCH_LOSS,
        Row("num_experts_per_tok", type=Annotated[Count, named("moe_k", "num_experts_per_tok")], default=6),
        Row("moe_num_experts", "moe.num_experts", Annotated[Experts, named("moe_num_experts", "num_experts")], 64),
        Row("moe_intermediate_size", "moe.d_ff", Size, 1536),
        groups.shared_size("moe_num_shared_experts", 2),
        Row("moe_layer_start_index", "moe.layers", OptionalCount, 1, here=_ernie_layers, there=lambda m: _sparse(m)[0]),
        Row(
            "moe_layer_end_index",
            type=Annotated[int, pydantic.Field(ge=-1, le=1024)],
            default=-1,
            there=lambda m: _sparse(m)[-1],
        ),
        Row("moe_layer_interval", type=Count, default=1, there=_interval),
        Row("moe_norm_min", type=Annotated[float, pydantic.Field(ge=0, le=1e-6)], default=1e-12),
        constant("use_bias", Off, False),
    ),
    ATTENTION
    | DENSE
    | EXPERTS
    | {"moe.router.bias": Tensor("mlp.moe_statics.e_score_correction_bias", axes=((), (0,)))}
    | shared_expert("shared_experts"),
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
    },
    aliases=(("mlp.moe_statics.", "mlp.gate.moe_statics."),),
    skipped={"model.mtp_": "multi-token prediction"},
)

# --- Tencent ---------------------------------------------------------------------------------------------------------


def _same(value: Any) -> Any:
    """Reduce a value that a file lists for each layer to the one that all layers share."""
    if not isinstance(value, list):
        return value
    if len({str(each) for each in value}) != 1:
        raise ValueError("must be the same in all layers")
    return value[0]


def _is_stretched(file: Any) -> bool:
    """Whether the base of positions is stretched once, whatever the length of the row."""
    return bool(file.rope.alpha) and file.rope.rope_type == "dynamic"


def _stretched(file: Any) -> float | None:
    if not _is_stretched(file):
        return None
    dim = file.dim_of_head
    return file.rope.rope_theta * file.rope.alpha ** (dim / (dim - 2))


_ROUTER = {"moe.router.kernel": "mlp.gate.wg.weight"}
#: Hunyuan-A13B: QK-norm per head after the rotation, one shared expert; lists by layer must hold one value.
HUNYUAN_V1_MOE = Family(
    "hunyuan_v1_moe",
    "HunYuanMoEV1ForCausalLM",
    (
        always("qk_norm", "rotated"),
        groups.ALL_BIASES,
        Row("", "rope_theta", here=_stretched),
        Row("", "rope_scaling", here=lambda file: RopeScalingConfig() if _is_stretched(file) else None),
        always("moe.gate.name", "mixtral"),
        Row("intermediate_size", "moe.d_ff"),
        Row("", "moe.shared_d_ff", here=lambda file: file.intermediate_size),
        Row("num_experts", "moe.num_experts", Annotated[NumExperts, pydantic.BeforeValidator(_same)], 1),
        Row(
            "num_experts_per_tok",
            type=Annotated[Count, pydantic.BeforeValidator(_same), named("moe_topk", "num_experts_per_tok")],
            default=1,
        ),
    ),
    ATTENTION
    | {f"attention.{name}_norm.scale": f"self_attn.{name}_layernorm.weight" for name in ("query", "key")}
    | EXPERTS
    | _ROUTER
    | shared_expert("shared_mlp"),
    defaults={"rms_norm_eps": 1e-5},
    fused=FUSED_EXPERTS | _ROUTER,
)

# --- IBM -------------------------------------------------------------------------------------------------------------


def _attention_scale(file: Any) -> float:
    usual = file.dim_of_head**-0.5
    return 0.0 if file.attention_multiplier == usual else file.attention_multiplier


def _reciprocal(model: ModelConfig) -> float:
    """Reciprocal of the scale, without the digits of rounding where twelve give the scale back."""
    scale = model.logit_scale
    short = round(1 / scale, 12)
    return short if short and 1 / short == scale else 1 / scale


_GRANITE_TENSORS: dict[str, str | Tensor] = {
    **ATTENTION,
    "moe.router.kernel": "block_sparse_moe.router.layer.weight",
    "moe.experts.gate": Tensor("block_sparse_moe.input_linear.weight", 0, 2),
    "moe.experts.up": Tensor("block_sparse_moe.input_linear.weight", 1, 2),
    "moe.experts.down": Tensor("block_sparse_moe.output_linear.weight"),
}
#: Granite-MoE: factors of embeddings, attention, residuals and logits, experts in two tensors.
GRANITEMOE = Family(
    "granitemoe",
    "GraniteMoeForCausalLM",
    (
        groups.ALL_BIASES,
        Row("embedding_multiplier", "embedding_scale", Positive, 1.0),
        Row("residual_multiplier", "residual_scale", Positive, 1.0),
        Row(
            "attention_multiplier",
            "attention_scale",
            Positive,
            1.0,
            here=_attention_scale,
            there=lambda m: m.attention_scale or m.head_dim**-0.5,
        ),
        Row(
            "logits_scaling", "logit_scale", Positive, 1.0, here=lambda file: 1 / file.logits_scaling, there=_reciprocal
        ),
        always("moe.gate.name", "mixtral"),
        groups.EXPERT_SIZE,
        Row("num_local_experts", "moe.num_experts", Experts, 8),
    ),
    _GRANITE_TENSORS,
    # Names in the files, and in the library's memory.
    aliases=(
        ("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
        ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
        ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
    ),
)
_SHARED_TENSORS: dict[str, str | Tensor] = {
    **_GRANITE_TENSORS,
    "moe.shared.dense.gate": Tensor("shared_mlp.input_linear.weight", 0, 2),
    "moe.shared.dense.up": Tensor("shared_mlp.input_linear.weight", 1, 2),
    "moe.shared.dense.down": Tensor("shared_mlp.output_linear.weight"),
}
#: Granite-MoE with a shared expert.
GRANITEMOESHARED = dataclasses.replace(
    GRANITEMOE,
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    rows=(*GRANITEMOE.rows, Row("shared_intermediate_size", "moe.shared_d_ff", OptionalCount, 0)),
    tensors=_SHARED_TENSORS,
)


def _has_window(layer: int, file: Any) -> bool:
    del file
    return layer % 4 != 0


def _bases(file: Any) -> tuple[float, float]:
    """Bases of the layers without and with windows; 0: no positions."""
    thetas = file.layer_rope_theta
    if thetas is None:
        return file.rope.rope_theta, file.rope.rope_theta
    if len(thetas) != file.num_hidden_layers:
        raise ConfigError(f"config.json: layer_rope_theta has {len(thetas)} entries, not {file.num_hidden_layers}")
    windowed = {*groups.windowed_layers(file, _has_window)}
    found = [{theta for layer, theta in enumerate(thetas) if (layer in windowed) == has} for has in (False, True)]
    full, sliding = ({*each} or {*other} for each, other in (found, found[::-1]))
    if len(full) > 1 or len(sliding) > 1:
        raise ConfigError("config.json: layer_rope_theta: must be one number for each kind of layer_types")
    return full.pop(), sliding.pop()


def _base(file: Any) -> float:
    full, sliding = _bases(file)
    if not sliding:
        raise ConfigError("config.json: layer_rope_theta=0 in layers with windows: must be above 0 there")
    return full or sliding


def _base_of_windows(file: Any) -> float | None:
    full, sliding = _bases(file)
    if full in (0, sliding):
        return None
    if file.rope.rope_type != "default":
        raise ConfigError("config.json: layer_rope_theta: must be one number, or 0, where positions are scaled")
    return sliding


def _layer_bases(model: ModelConfig) -> list[float]:
    """Base of each layer, 0 for one without positions: so is every other mixer, which write_config reports."""
    mixers = [kind.mixer for kind in layer_kinds(model)]
    rotated = [mixer if isinstance(mixer, GroupedQuery) and mixer.rotated else None for mixer in mixers]
    return [(mixer.theta or model.rope_theta) if mixer else 0.0 for mixer in rotated]


#: Granite-MoE with a shared expert, attention sinks, windows, and a base of positions for each kind of layers.
GRANITEMOE_SWA = dataclasses.replace(
    GRANITEMOESHARED,
    model_type="granitemoe_swa",
    architecture="GraniteMoeSWAForCausalLM",
    rows=(
        *GRANITEMOESHARED.rows,
        always("attention_sinks", True),
        *groups.windows(_has_window),
        Row("layer_rope_theta", "rope_theta", list[Coefficient] | None, None, here=_base, there=_layer_bases),
        Row("", "window_rope_theta", here=_base_of_windows),
        groups.rotated_windows(lambda file: not _bases(file)[0]),
    ),
    tensors=_SHARED_TENSORS
    | {
        "attention.sinks": "self_attn.sinks",
        "moe.router.kernel": "block_sparse_moe.router.weight",
        "moe.experts.gate": Tensor("block_sparse_moe.experts.gate_up_proj", 0, 2),
        "moe.experts.up": Tensor("block_sparse_moe.experts.gate_up_proj", 1, 2),
        "moe.experts.down": Tensor("block_sparse_moe.experts.down_proj"),
    },
    defaults={"sliding_window": 128},
)
