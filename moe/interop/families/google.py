"""T5 1.0 and 1.1 (Raffel et al. 2020), and Switch Transformers (Fedus et al. 2021) as Hugging Face keeps them."""

from typing import Annotated, Any, Literal

import pydantic

from moe.config import ConfigError, ModelConfig, sparse_layers, stacks
from moe.dispatch.ffn import GATED_ACTIVATIONS
from moe.interop.families.family import Family
from moe.interop.families.rows import Row, always
from moe.interop.schema import (
    Coefficient,
    Context,
    Count,
    Experts,
    Fraction,
    Json,
    Layers,
    OpenConfig,
    OptionalCount,
    Positive,
    Size,
    TokenIds,
    named,
)

# --- What T5 and Switch share ----------------------------------------------------------------------------------------


class EncoderDecoderConfig(OpenConfig):
    """Fields of ``config.json`` with the names and defaults of T5's library."""

    hidden_size: Annotated[Size, named("d_model")] = 512
    intermediate_size: Annotated[Size, named("d_ff")] = 2048
    num_hidden_layers: Annotated[Layers, named("num_decoder_layers")] = 6
    num_attention_heads: Annotated[Count, named("num_heads")] = 8
    head_dim: Annotated[Count | None, named("d_kv")] = 64
    max_position_embeddings: Annotated[Context, named("n_positions")] = 512
    rms_norm_eps: Annotated[Positive, named("layer_norm_epsilon")] = 1e-6
    tie_word_embeddings: bool = True
    feed_forward_proj: str = "relu"

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_decoder_layers(cls, tree: Any) -> Any:
        """Give a decoder without a stated depth that of the encoder."""
        if isinstance(tree, dict) and tree.get("num_decoder_layers") is None and "num_layers" in tree:
            return tree | {"num_decoder_layers": tree["num_layers"]}
        return tree


_SHARED = (
    Row("is_encoder_decoder", there=lambda _: True),
    Row("num_layers", "encoder_layers", Layers, 6),
    Row("relative_attention_num_buckets", "relative_buckets", Count, 32),
    Row("relative_attention_max_distance", "relative_max_distance", Size, 128),
    Row("dropout_rate", "dropout", Fraction, 0.1),
    Row("decoder_start_token_id", type=TokenIds, default=None, there=lambda _: 0),
)
_UNWRITTEN = ("num_key_value_heads", "hidden_act", "rope_theta", "num_experts_per_tok")
_OUTSIDE = {
    "embedding.table": "shared.weight",
    "unembedding.kernel": "lm_head.weight",
    **{
        f"{stack}.{name}": f"{stack}.{tensor}"
        for stack in ("encoder", "decoder")
        for name, tensor in (
            ("final_norm.scale", "final_layer_norm.weight"),
            ("relative_bias.table", "block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
            ("embedding.table", "embed_tokens.weight"),
        )
    },
}


def _outside(model: ModelConfig) -> dict[str, str]:
    """Switch's two stacks may have a table each."""
    own = {"embedding.table": _OUTSIDE["decoder.embedding.table"]} if model.encoder_vocab_size else {}
    return _OUTSIDE | own


#: Tensors that some files hold twice, and the one that they must equal.
_COPIES: dict[str, str] = dict.fromkeys(
    ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"), "shared.weight"
)
#: A table of the first T5 checkpoints that no code reads.
_UNREAD = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


def _attention(ours: str, theirs: str, norm: str) -> dict[str, str]:
    letters = (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))
    return {f"{ours}attention.{name}": f"{theirs}.{letter}.weight" for name, letter in letters} | {
        norm: f"{theirs.rpartition('.')[0]}.layer_norm.weight"
    }


def _block_tensors(stack: str, ffn: dict[str, str]) -> dict[str, str]:
    """Tensors of a block of a stack; ``ffn`` holds those of its last layer."""
    last = 1 if stack == "encoder" else 2
    cross = _attention("cross.", "layer.1.EncDecAttention", "cross.norm.scale") if stack == "decoder" else {}
    own = {name: f"layer.{last}.{tensor}" for name, tensor in ffn.items()}
    norm = {"ffn_norm.scale": f"layer.{last}.layer_norm.weight"}
    return _attention("", "layer.0.SelfAttention", "attention_norm.scale") | cross | norm | own


# --- T5 --------------------------------------------------------------------------------------------------------------
#: ``feed_forward_proj`` there → model.activation; that library's "gelu" of gated FFNs is the tanh form.
_FFNS = {
    "relu": "relu",
    "gelu_new": "gelu",
    "gated-relu": "reglu",
    "gated-gelu": "geglu",
    "gated-gelu_new": "geglu",
    "gated-silu": "swiglu",
}


def _is_gated(ffn: str) -> bool:
    return ffn.startswith("gated-")


def _act(ffn: str) -> str:
    """``dense_act_fn`` of a ``feed_forward_proj``."""
    return "gelu_new" if ffn == "gated-gelu" else ffn.removeprefix("gated-")


def _activation(file: Any) -> str:
    """Refuses an FFN that is stated twice with different values: the library obeys the other two fields."""
    ffn = file.feed_forward_proj
    if ffn not in _FFNS:
        raise ConfigError(f"config.json: feed_forward_proj={ffn!r}: must be one of {', '.join(_FFNS)}")
    for name, value in {"dense_act_fn": _act(ffn), "is_gated_act": _is_gated(ffn)}.items():
        if name in file.model_fields_set and (given := getattr(file, name)) != value:
            raise ConfigError(f"config.json: {name}={given!r}: must be {value!r} with feed_forward_proj={ffn!r}")
    return _FFNS[ffn]


def _ffn(model: ModelConfig) -> str:
    """``feed_forward_proj``; an activation without a name there is written as it is, and then refused."""
    return next((name for name, activation in _FFNS.items() if activation == model.activation), model.activation)


def _scales_logits(file: Any) -> bool:
    stated = "scale_decoder_outputs" in file.model_fields_set  # a null is false there
    return bool(file.scale_decoder_outputs if stated else file.tie_word_embeddings)


def _t5_tensors(model: ModelConfig, stack: str) -> dict[str, str]:
    """The names of an FFN depend on its activation."""
    up = "wi_1" if model.activation in GATED_ACTIVATIONS else "wi"
    names = {"gate": "wi_0", "up": up, "down": "wo"}
    return _block_tensors(stack, {f"dense.{ours}": f"DenseReluDense.{name}.weight" for ours, name in names.items()})


#: Both stacks of an encoder-decoder, and what T5's files hold besides.
_STACKS: dict[str, Any] = {
    "block": "{stack}.block.{layer}.",
    "outside": _outside,
    "unwritten": _UNWRITTEN,
    "copies": _COPIES,
    "unread": _UNREAD,
}

T5 = Family(
    "t5",
    "T5ForConditionalGeneration",
    (
        *_SHARED,
        Row("feed_forward_proj", "activation", here=_activation, there=_ffn),
        Row("is_gated_act", type=bool | None, default=None, there=lambda m: _is_gated(_ffn(m))),
        Row("dense_act_fn", type=str | None, default=None, there=lambda m: _act(_ffn(m))),
        Row("scale_decoder_outputs", "scale_logits", bool | None, None, here=_scales_logits),
        always("moe.gate.name", "none"),
    ),
    _t5_tensors,
    base=EncoderDecoderConfig,
    ties_by_file=True,
    **_STACKS,
)

# --- Switch ----------------------------------------------------------------------------------------------------------
_SWITCH_FFNS = {"relu": "relu", "gelu_new": "gelu"}
#: ``expert_capacity`` that means no capacity; the largest value that is read.
_NO_CAPACITY = 1 << 16


class SwitchConfig(EncoderDecoderConfig):
    """Fields of ``config.json``. Hugging Face ignores ``router_ignore_padding_tokens``: padding is always routed."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _default_decoder_layers(cls, tree: Any) -> Any:
        """Default an absent field to 12; a null means the encoder's depth, as in T5."""
        return {"num_decoder_layers": 12} | tree if isinstance(tree, dict) else tree


def _switch_activation(file: Any) -> str:
    """The library's FFN of Switch is never gated, whatever ``feed_forward_proj`` says."""
    ffn = file.feed_forward_proj
    name = file.dense_act_fn or ("gelu_new" if ffn == "gated-gelu" else ffn.rpartition("-")[2])
    if name not in _SWITCH_FFNS:
        raise ConfigError(f"config.json: feed_forward_proj={ffn!r}: must be relu, gelu_new or gated-gelu")
    return _SWITCH_FFNS[name]


def _is_sparse(num_layers: int, num_sparse: int, step: int | None) -> list[bool]:
    """Whether each layer of a stack is MoE, by the library's rule."""
    step = (num_layers // num_sparse if num_sparse else 0) if step is None else step
    return [step > 0 and (step == 1 or layer % step == 1) for layer in range(num_layers)]


def _switch_layers(file: Any) -> Json:
    """``model.moe``: the library's losses are means over a stack's layers."""
    encoder = _is_sparse(file.num_layers, file.num_sparse_encoder_layers, file.encoder_sparse_step)
    decoder = _is_sparse(file.num_hidden_layers, file.num_sparse_decoder_layers, file.decoder_sparse_step)
    layers = tuple(layer for layer, sparse in enumerate(encoder + decoder) if sparse)
    if not layers:
        return {"gate": "none"}
    capacity = file.expert_capacity
    per_layer = (any(encoder) + any(decoder)) / len(layers)
    return {
        "gate": "switch",
        "num_experts": file.num_experts,
        "layers": layers,
        **({} if capacity == _NO_CAPACITY else {"dispatch": "gather", "capacity": {"fixed": capacity}}),
        "route_padding": True,
        "losses": {"scope": "sequence", "z": file.router_z_loss_coef * per_layer},
        "jitter": file.router_jitter_noise,
        "bias": "router" if file.router_bias else "none",
        "expert_dropout": file.dropout_rate,
    }


def _z_loss(model: ModelConfig) -> float:
    """Our loss times MoE layers per stack that has any."""
    sparse = [any(kind.sparse for kind in kinds) for kinds in stacks(model).values()]
    stacks_per_layer = sum(sparse) / sum(sparse_layers(model)) if any(sparse) else 1.0
    return round(model.moe.losses.z / stacks_per_layer, 12)


def _sparse_of(model: ModelConfig, stack: str) -> list[int]:
    return [layer for layer, kind in enumerate(stacks(model).get(stack, ())) if kind.sparse]


def _step_of(model: ModelConfig, stack: str) -> int:
    """The first MoE layer is number 1 unless all are; the second one gives the step."""
    sparse = _sparse_of(model, stack)
    if not sparse or sparse[0] == 0:
        return len(sparse) and 1
    return [*sparse, sparse[0] + len(stacks(model)[stack])][1] - sparse[0]


def _switch_tensors(model: ModelConfig, stack: str) -> dict[str, str]:
    del model
    names = {"up": "wi", "down": "wo"}
    dense = {f"dense.{ours}": f"mlp.{name}.weight" for ours, name in names.items()}
    experts = {f"moe.experts.{ours}": f"mlp.experts.expert_{{expert}}.{name}.weight" for ours, name in names.items()}
    router = {
        "moe.router.kernel": "mlp.router.classifier.weight",
        "moe.router.logit_bias": "mlp.router.classifier.bias",
    }
    return _block_tensors(stack, dense | experts | router)


def _name_of_activation(model: ModelConfig) -> str:
    return "relu" if model.activation == "relu" else "gelu_new"


#: Top-1, capacity in tokens of a row. A router in another dtype is refused: in Hugging Face its bias, its softmax and
#: the experts' weights have that dtype too, here only the product of tokens and router (``model.moe.router_dtype``).
SWITCH_TRANSFORMERS = Family(
    "switch_transformers",
    "SwitchTransformersForConditionalGeneration",
    (
        *_SHARED,
        Row("feed_forward_proj", "activation", here=_switch_activation, there=_name_of_activation),
        Row("dense_act_fn", type=Literal["relu", "gelu_new"] | None, default=None, there=_name_of_activation),
        Row("", "scale_logits", here=lambda file: file.tie_word_embeddings),
        Row("", "moe", here=_switch_layers),
        Row("num_experts", type=Experts, default=8, there=lambda m: m.moe.num_experts),
        Row("num_experts_per_tok", type=Annotated[int, pydantic.Field(ge=1, le=1)], default=1),
        Row("expert_capacity", type=Count, default=64, there=lambda m: m.moe.capacity.fixed or _NO_CAPACITY),
        Row("router_bias", type=bool, default=False, there=lambda m: m.moe.bias == "router"),
        Row("router_jitter_noise", type=Fraction, default=0.01, there=lambda m: m.moe.jitter),
        Row("router_dtype", type=Literal["float32"], default="float32", there=lambda m: m.moe.router_dtype),
        Row("router_z_loss_coef", type=Coefficient, default=0.001, there=_z_loss),
        Row("router_ignore_padding_tokens", there=lambda _: False),
        Row("num_sparse_encoder_layers", type=OptionalCount, default=3, there=lambda m: len(_sparse_of(m, "encoder"))),
        Row("num_sparse_decoder_layers", type=OptionalCount, default=3, there=lambda m: len(_sparse_of(m, "decoder"))),
        Row("encoder_sparse_step", type=OptionalCount | None, default=None, there=lambda m: _step_of(m, "encoder")),
        Row("decoder_sparse_step", type=OptionalCount | None, default=None, there=lambda m: _step_of(m, "decoder")),
    ),
    _switch_tensors,
    defaults={"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_layers": 12},
    base=SwitchConfig,
    balance_scale="per stack",
    **_STACKS,
)
