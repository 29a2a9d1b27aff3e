"""T5 1.0 and 1.1 (Raffel et al. 2020), and what Switch's checkpoints share with them."""

from typing import Any

import pydantic

from moe.config import ModelConfig
from moe.dispatch.ffn import GATED_ACTIVATIONS
from moe.interop.families.family import Family
from moe.interop.schema import Context, Count, Fraction, Json, Layers, OpenConfig, Positive, Size, TokenIds

#: ``feed_forward_proj`` there → model.activation; that library's "gelu" of gated FFNs is the tanh form.
_FFNS = {
    "relu": "relu",
    "gelu_new": "gelu",
    "gated-relu": "reglu",
    "gated-gelu": "geglu",
    "gated-gelu_new": "geglu",
    "gated-silu": "swiglu",
}

#: Names in these files of the fields that all decoder families have; None: not written.
NAMES: dict[str, str | None] = {
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_decoder_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": None,
    "head_dim": "d_kv",
    "hidden_act": None,
    "max_position_embeddings": "n_positions",
    "rms_norm_eps": "layer_norm_epsilon",
    "rope_theta": None,
    "num_experts_per_tok": None,
}


class EncoderDecoderConfig(OpenConfig):
    """Fields of ``config.json`` that T5 and Switch share, with the library's defaults."""

    hidden_size: Size = pydantic.Field(512, validation_alias="d_model")
    intermediate_size: Size = pydantic.Field(2048, validation_alias="d_ff")
    num_hidden_layers: Layers = pydantic.Field(6, validation_alias="num_decoder_layers")
    num_attention_heads: Count = pydantic.Field(8, validation_alias="num_heads")
    head_dim: Count | None = pydantic.Field(64, validation_alias="d_kv")
    max_position_embeddings: Context = pydantic.Field(512, validation_alias="n_positions")
    rms_norm_eps: Positive = pydantic.Field(1e-6, validation_alias="layer_norm_epsilon")
    tie_word_embeddings: bool = True
    num_layers: Layers = 6
    relative_attention_num_buckets: Count = 32
    relative_attention_max_distance: Size = 128
    dropout_rate: Fraction = 0.1
    feed_forward_proj: str = "relu"
    decoder_start_token_id: TokenIds = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_decoder_layers(cls, tree: Any) -> Any:
        """Give a decoder without a stated depth that of the encoder."""
        if isinstance(tree, dict) and tree.get("num_decoder_layers") is None and "num_layers" in tree:
            return tree | {"num_decoder_layers": tree["num_layers"]}
        return tree


class T5Config(EncoderDecoderConfig):
    """Fields of ``config.json``; ``tie_word_embeddings`` only decides whether logits are scaled."""

    scale_decoder_outputs: bool | None = None
    dense_act_fn: str | None = None
    is_gated_act: bool | None = None

    @pydantic.field_validator("feed_forward_proj")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in _FFNS:
            raise ValueError(f"must be one of {', '.join(_FFNS)}")
        return value

    @pydantic.model_validator(mode="after")
    def _check_ffn(self) -> "T5Config":
        """Refuse an FFN that is stated twice with different values: the library obeys these two fields."""
        wanted = {
            "dense_act_fn": _activation(self.feed_forward_proj),
            "is_gated_act": _is_gated(self.feed_forward_proj),
        }
        for name, value in wanted.items():
            if name in self.model_fields_set and (given := getattr(self, name)) != value:
                raise ValueError(
                    f"{name}={given!r}: must be {value!r} with feed_forward_proj={self.feed_forward_proj!r}"
                )
        return self


def _is_gated(ffn: str) -> bool:
    return ffn.startswith("gated-")


def _activation(ffn: str) -> str:
    """``dense_act_fn`` of a ``feed_forward_proj``."""
    return "gelu_new" if ffn == "gated-gelu" else ffn.removeprefix("gated-")


def read_shared(source: EncoderDecoderConfig) -> Json:
    """Changes of ModelConfig for the fields of :class:`EncoderDecoderConfig`."""
    return {
        "encoder_layers": source.num_layers,
        "relative_buckets": source.relative_attention_num_buckets,
        "relative_max_distance": source.relative_attention_max_distance,
        "dropout": source.dropout_rate,
    }


def write_shared(model: ModelConfig) -> Json:
    """The reverse of :func:`read_shared`, with the fields that mark an encoder-decoder."""
    return {
        "is_encoder_decoder": True,
        "num_layers": model.encoder_layers,
        "relative_attention_num_buckets": model.relative_buckets,
        "relative_attention_max_distance": model.relative_max_distance,
        "dropout_rate": model.dropout,
        "decoder_start_token_id": 0,
    }


def read(source: T5Config) -> tuple[Json, Json]:
    """See :class:`Family`."""
    stated = "scale_decoder_outputs" in source.model_fields_set  # a null is false there
    scaled = source.scale_decoder_outputs if stated else source.tie_word_embeddings
    changes = {"activation": _FFNS[source.feed_forward_proj], "scale_logits": bool(scaled)}
    return read_shared(source) | changes, {"gate": "none"}


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    ffn = next((name for name, activation in _FFNS.items() if activation == model.activation), model.activation)
    return write_shared(model) | {
        "feed_forward_proj": ffn,
        "is_gated_act": _is_gated(ffn),
        "dense_act_fn": _activation(ffn),
        "scale_decoder_outputs": model.scale_logits,
    }


_OUTSIDE = {
    "embedding.table": "shared.weight",
    "unembedding.kernel": "lm_head.weight",
    **{
        f"{stack}.{name}": f"{stack}.{tensor}"
        for stack in ("encoder", "decoder")
        for name, tensor in (
            ("final_norm.scale", "final_layer_norm.weight"),
            ("relative_bias.table", "block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        )
    },
}
_TABLES = {f"{stack}.embedding.table": f"{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")}


def outside(model: ModelConfig) -> dict[str, str]:
    """See :class:`Family`; Switch's two stacks may have a table each."""
    own = {"embedding.table": _TABLES["decoder.embedding.table"]} if model.encoder_vocab_size else {}
    return _OUTSIDE | _TABLES | own


#: Tensors that some files hold twice, and the one that they must equal.
COPIES = {
    "encoder.embed_tokens.weight": "shared.weight",
    "decoder.embed_tokens.weight": "shared.weight",
    "lm_head.weight": "shared.weight",
}
#: A table of the first T5 checkpoints that no code reads.
UNREAD = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


def _attention(ours: str, theirs: str, norm: str) -> dict[str, str]:
    letters = (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))
    return {f"{ours}attention.{name}": f"{theirs}.{letter}.weight" for name, letter in letters} | {
        norm: f"{theirs.rpartition('.')[0]}.layer_norm.weight"
    }


_SELF = _attention("", "layer.0.SelfAttention", "attention_norm.scale")
_CROSS = _attention("cross.", "layer.1.EncDecAttention", "cross.norm.scale")


def block_tensors(stack: str, ffn: dict[str, str]) -> dict[str, str]:
    """Tensors of a block of a stack; ``ffn`` holds those of its last layer."""
    last = 1 if stack == "encoder" else 2
    own = {name: f"layer.{last}.{tensor}" for name, tensor in ffn.items()}
    norm = {"ffn_norm.scale": f"layer.{last}.layer_norm.weight"}
    return _SELF | ({} if stack == "encoder" else _CROSS) | norm | own


def tensors(model: ModelConfig, stack: str) -> dict[str, str]:
    """See :class:`Family`; the names of an FFN depend on its activation."""
    up = "wi_1" if model.activation in GATED_ACTIVATIONS else "wi"
    names = {"gate": "wi_0", "up": up, "down": "wo"}
    return block_tensors(stack, {f"dense.{ours}": f"DenseReluDense.{name}.weight" for ours, name in names.items()})


FAMILY = Family(
    "t5",
    "T5ForConditionalGeneration",
    T5Config,
    read,
    write,
    tensors,
    block="{stack}.block.{layer}.",
    outside=outside,
    field_names=NAMES,
    copies=COPIES,
    unread=UNREAD,
    ties_by_file=True,
)
