"""Qwen's families: dense, with experts, and with gated DeltaNet."""

import dataclasses
from typing import Annotated, Any, ClassVar

import pydantic

from moe.config import ConfigError, ModelConfig, layer_kinds, pattern, sparse_layers
from moe.config.mixers import GatedDelta
from moe.interop.families import groups
from moe.interop.families.family import ATTENTION, DENSE, EXPERTS, Family, Tensor, shared_expert
from moe.interop.families.rows import Row, always
from moe.interop.rope import write_scaling
from moe.interop.schema import (
    Count,
    HiddenAct,
    Json,
    LayerNumbers,
    NumExperts,
    OpenConfig,
    OptionalNumExperts,
    RopeParameters,
    Size,
    Window,
)

# --- Dense -----------------------------------------------------------------------------------------------------------
_DENSE_DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32}
#: Qwen2 and Qwen2.5: biases of queries, keys and values, windows in the upper layers.
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    (always("attention_bias", "qkv"), *groups.UPPER_WINDOWS, groups.USE_WINDOW, always("moe.gate.name", "none")),
    ATTENTION | DENSE,
    defaults=_DENSE_DEFAULTS,
)
#: QK-norm per head, windows in the upper layers.
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    (
        always("qk_norm", "head"),
        groups.ALL_BIASES,
        *groups.UPPER_WINDOWS,
        groups.USE_WINDOW,
        always("moe.gate.name", "none"),
    ),
    ATTENTION | DENSE,
    defaults=_DENSE_DEFAULTS | {"head_dim": 128},
)

# --- Experts ---------------------------------------------------------------------------------------------------------


def _sparse_layers(file: Any, without_list: tuple[int, ...] = ()) -> tuple[int, ...] | None:
    """A layer is MoE at every ``decoder_sparse_step`` unless ``mlp_only_layers``, or else ``without_list``, has it."""
    dense, step = file.mlp_only_layers, file.decoder_sparse_step
    dense = without_list if dense is None else dense
    numbers = range(file.num_hidden_layers if file.num_experts else 0)
    return groups.some_layers([n for n in numbers if n not in dense and (n + 1) % step == 0], file)


def _dense_layers(model: ModelConfig) -> list[int]:
    return [layer for layer, sparse in enumerate(sparse_layers(model)) if not sparse]


#: Sizes of the experts; a file without experts leaves the settings at their defaults.
_SIZES = (
    Row("num_experts", "moe.num_experts", OptionalNumExperts, 0, here=lambda file: file.num_experts or None),
    Row(
        "moe_intermediate_size",
        "moe.d_ff",
        Size,
        here=lambda file: file.moe_intermediate_size if file.num_experts else None,
    ),
)
_STEP = Row("decoder_sparse_step", type=Count, default=1, there=lambda _: 1)
_EXPERTS = (
    *_SIZES,
    groups.SOFTMAX_GATE,
    _STEP,
    Row("mlp_only_layers", "moe.layers", LayerNumbers | None, None, here=_sparse_layers, there=_dense_layers),
)
_SHARED = (Row("shared_expert_intermediate_size", "moe.shared_d_ff", Size), always("moe.shared_gate", True))
_SHARED_TENSORS = shared_expert("shared_expert") | {"moe.shared.gate": "mlp.shared_expert_gate.weight"}
#: Qwen1.5-MoE and Qwen2-MoE: a gated shared expert, biases of queries, keys and values; without a list, even layers
#: below ``max_window_layers`` have a window.
QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    (
        Row("qkv_bias", "attention_bias", bool, True, names={False: "none", True: "qkv"}),
        *groups.windows(lambda layer, file: layer % 2 == 0 and layer < file.max_window_layers),
        groups.MAX_WINDOW_LAYERS,
        groups.USE_WINDOW,
        *_EXPERTS,
        *_SHARED,
    ),
    ATTENTION | DENSE | EXPERTS | _SHARED_TENSORS,
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4},
)
#: QK-norm per head, one window for all layers, dense layers among sparse ones.
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    (always("qk_norm", "head"), groups.ALL_BIASES, groups.WINDOW, groups.USE_WINDOW, *_EXPERTS),
    ATTENTION | DENSE | EXPERTS,
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
)


class _RopeByKind(OpenConfig):
    """Rotary positions of each kind of layers: ``rope_parameters`` holds those of either."""

    sliding_rope: RopeParameters | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _split(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        kinds = tree.get("rope_parameters") or {
            "full_attention": _ROPE | {"rope_theta": 5e5},
            "sliding_attention": _ROPE,
        }
        if not isinstance(kinds, dict) or not kinds.keys() <= {"full_attention", "sliding_attention"}:
            raise ValueError("rope_parameters must have full_attention and sliding_attention")
        full, sliding = (kinds.get(f"{kind}_attention") for kind in ("full", "sliding"))
        return tree | {"rope_parameters": full or sliding, "sliding_rope": sliding or full, "rope_scaling": None}


_ROPE: Json = {"rope_type": "default", "rope_theta": 1e4}


def _window_theta(file: Any) -> float | None:
    full, sliding = file.rope_parameters, file.sliding_rope
    if sliding == full:
        return None
    if sliding.rope_type != "default" or sliding.partial_rotary_factor != 1 or sliding.rope_theta is None:
        raise ConfigError(
            "config.json: rope_parameters of sliding_attention: must be those of full_attention, or a base"
        )
    return sliding.rope_theta


def _rope_by_kind(model: ModelConfig) -> Json:
    scaling = write_scaling(model)
    full = {"rope_type": "default", "rope_theta": model.rope_theta} | scaling.get("rope_scaling", {})
    sliding = _ROPE | {"rope_theta": model.window_rope_theta} if model.window_rope_theta else full
    return {"full_attention": full, "sliding_attention": sliding}


#: Mellum 2: Qwen3-MoE with dense layers listed one by one, and rotary positions of each kind of layers.
MELLUM = Family(
    "mellum",
    "MellumForCausalLM",
    (
        always("qk_norm", "head"),
        groups.ALL_BIASES,
        *groups.windows(lambda layer, file: False),
        Row("", "window_rope_theta", here=_window_theta),
        Row("rope_parameters", there=_rope_by_kind),
        Row("num_experts", "moe.num_experts", NumExperts, 64),
        Row("moe_intermediate_size", "moe.d_ff", Size, 896),
        groups.SOFTMAX_GATE,
        groups.listed_layers(lambda file: 0),
    ),
    ATTENTION | DENSE | EXPERTS,
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "sliding_window": 1024,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
    base=_RopeByKind,
    unwritten=("rope_theta", "rope_scaling"),
    skipped={"mtp.": "multi-token prediction"},
)
#: Flint: sigmoids without a bias, an ungated shared expert, attention sinks; without a list the first two layers are
#: dense, and these, every fourth and the last one have neither windows nor positions.
FLINT = Family(
    "flint",
    "FlintForCausalLM",
    (
        always("qk_norm", "head"),
        groups.ALL_BIASES,
        always("attention_sinks", True),
        *groups.windows(lambda layer, file: layer >= 2 and layer % 4 != 1 and layer != file.num_hidden_layers - 1),
        always("rotated_layers", "sliding"),
        *_SIZES,
        always("moe.gate", {"name": "mixtral", "score": "sigmoid"}),
        Row("norm_topk_prob", "moe.gate.renormalise"),
        _STEP,
        Row(
            "mlp_only_layers",
            "moe.layers",
            LayerNumbers | None,
            None,
            here=lambda file: _sparse_layers(file, (0, 1)),
            there=_dense_layers,
        ),
        Row("shared_expert_intermediate_size", "moe.shared_d_ff", Size, 1024),
    ),
    ATTENTION | DENSE | EXPERTS | {"attention.sinks": "self_attn.softmax_offset"} | shared_expert("shared_expert"),
    defaults={
        "max_position_embeddings": 262144,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "sliding_window": 513,
        "num_experts": 256,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.0005,
    },
    aliases=(("self_attn.softmax_offset", "self_attn.sinks"),),  # in files, in the library's memory
)

# --- Gated DeltaNet --------------------------------------------------------------------------------------------------


def _is_silu(name: HiddenAct) -> HiddenAct:
    if name not in ("silu", "swish"):
        raise ValueError("must be silu, which the convolutions have")
    return name


class HybridConfig(OpenConfig):
    """Fields of ``config.json``, in which layers have attention or gated DeltaNet."""

    kinds: ClassVar[tuple[str, ...]] = ("linear_attention", "full_attention")

    hidden_act: Annotated[HiddenAct, pydantic.AfterValidator(_is_silu)] = "silu"


def _words(file: Any) -> str:
    interval, numbers = file.full_attention_interval, range(file.num_hidden_layers)
    if file.layer_types:
        linear = [file.layer_types[layer] == "linear_attention" for layer in numbers]
    else:
        linear = [(layer + 1) % interval > 0 for layer in numbers]
    return pattern.write(["delta" if is_linear else "attention" for is_linear in linear])


def _kinds(model: ModelConfig) -> list[str]:
    linear = [isinstance(kind.mixer, GatedDelta) for kind in layer_kinds(model)]
    return ["linear_attention" if is_linear else "full_attention" for is_linear in linear]


#: Sizes of gated DeltaNet.
DELTA_NET = (
    Row("linear_num_key_heads", "delta_net.key_heads", Count, 16),
    Row("linear_num_value_heads", "delta_net.value_heads", Count, 32),
    Row("linear_key_head_dim", "delta_net.key_dim", Count, 128),
    Row("linear_value_head_dim", "delta_net.value_dim", Count, 128),
    Row("linear_conv_kernel_dim", "delta_net.conv_width", Count, 4),
)
#: Gated DeltaNet in most layers, gated attention in the others, zero-centred norms.
_HYBRID = (
    always("qk_norm", "head"),
    always("gated_attention", True),
    always("zero_centred_norms", True),
    groups.ALL_BIASES,
    groups.PARTIAL_ROTATION,
    Row("full_attention_interval", type=Count, default=4),
    Row("layer_types", "pattern", here=_words, there=_kinds),
    *DELTA_NET,
    *_SHARED,
    groups.PREDICTION,
    Row("use_sliding_window", type=bool, default=False),
    Row("sliding_window", type=Window, default=4096),
)
_HYBRID_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
}


def _hybrid_tensors(model: ModelConfig) -> dict[str, str | Tensor]:
    """Attention with queries and gates alternating by head."""
    result: dict[str, str | Tensor] = {
        **ATTENTION,
        **EXPERTS,
        **_SHARED_TENSORS,
        **delta_tensors(model),
    }
    for part, name in enumerate(("query", "gate")):
        for end, kind in (("", "weight"), ("_bias", "bias")):
            turns = (model.head_dim, model.head_dim)
            result[f"attention.{name}{end}"] = Tensor(f"self_attn.q_proj.{kind}", part, turns=turns)
    return result


def delta_tensors(model: ModelConfig) -> dict[str, str | Tensor]:
    """Tensors of gated DeltaNet without its projections of x; convolutions [channels, 1, width] lie in one."""
    result: dict[str, str | Tensor] = {
        "delta_net.decay_bias": "linear_attn.dt_bias",
        "delta_net.log_decay_scale": "linear_attn.A_log",
        "delta_net.norm.scale": "linear_attn.norm.weight",
        "delta_net.out": "linear_attn.out_proj.weight",
    }
    for part, name in enumerate(("query", "key", "value")):
        conv = Tensor("linear_attn.conv1d.weight", part, turns=delta_channels(model), axes=((1, 2), (), (0,)))
        result[f"delta_net.{name}_conv"] = conv
    return result


def delta_channels(model: ModelConfig) -> tuple[int, int, int]:
    """Channels of all heads of queries, keys and values."""
    d = model.delta_net
    return d.key_heads * d.key_dim, d.key_heads * d.key_dim, d.value_heads * d.value_dim


def _next_tensors(model: ModelConfig, stack: str) -> dict[str, str | Tensor]:
    """Projections of DeltaNet alternate by key head."""
    del stack
    d = model.delta_net
    shared = d.value_heads // d.key_heads
    wide, narrow = (d.key_dim, d.key_dim, *(shared * d.value_dim,) * 2), (shared, shared)
    result = _hybrid_tensors(model) | DENSE
    for part, name in enumerate(("query", "key", "value", "gate")):
        result[f"delta_net.{name}"] = Tensor("linear_attn.in_proj_qkvz.weight", part, turns=wide)
    for part, name in enumerate(("beta", "decay")):
        result[f"delta_net.{name}"] = Tensor("linear_attn.in_proj_ba.weight", part, turns=narrow)
    return result


def _separate_tensors(model: ModelConfig, stack: str) -> dict[str, str | Tensor]:
    """A tensor for each projection of DeltaNet but queries, keys and values, which lie one after the other."""
    del stack
    result = _hybrid_tensors(model)
    for part, name in enumerate(("query", "key", "value")):
        result[f"delta_net.{name}"] = Tensor("linear_attn.in_proj_qkv.weight", part, turns=delta_channels(model))
    named = {"gate": "z", "beta": "b", "decay": "a"}
    return result | {f"delta_net.{name}": f"linear_attn.in_proj_{theirs}.weight" for name, theirs in named.items()}


QWEN3_NEXT = Family(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    (*_HYBRID, *_EXPERTS),
    _next_tensors,
    defaults=_HYBRID_DEFAULTS | {"intermediate_size": 5632, "num_experts": 512, "num_experts_per_tok": 10},
    base=HybridConfig,
    skipped={"mtp.": "multi-token prediction"},
    prediction={
        "prediction.hidden_norm.scale": "pre_fc_norm_hidden.weight",
        "prediction.embedding_norm.scale": "pre_fc_norm_embedding.weight",
        "prediction.project": "fc.weight",
        "prediction.output_norm.scale": "norm.weight",
    },
    prediction_prefixes=("mtp.", "mtp.layers.0."),
)
#: Qwen3.5-MoE's text model, alone or beside its vision model: every layer is MoE.
QWEN3_5_MOE_TEXT = dataclasses.replace(
    QWEN3_NEXT,
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    rows=(
        *_HYBRID,
        *_SIZES,
        always("moe.gate.name", "mixtral"),
        Row("", "moe.layers", here=lambda file: None if file.num_experts else ()),
        Row("decoder_sparse_step", type=Count, default=1),
        Row("mlp_only_layers", type=LayerNumbers | None, default=None),
    ),
    tensors=_separate_tensors,
    # The hidden size of dense layers is not in these files.
    defaults=_HYBRID_DEFAULTS | {"intermediate_size": 512, "num_experts": 256, "num_experts_per_tok": 8},
    unwritten=("intermediate_size",),
    skipped={"mtp.": "multi-token prediction", "model.visual.": "the vision model"},
    inside={"model.language_model.": "model."},
)
