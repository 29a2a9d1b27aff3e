"""Section ``model``: the settings of a Transformer, and the rules across them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Literal

from moe.config.memory_section import MEMORY, MemoryConfig
from moe.config.mixers import FIELD, AttentionBias, Mixer, QKNorm
from moe.config.moe_section import DType, MoEConfig
from moe.config.pattern import Word, parse
from moe.config.rope_section import ROPE, RopeScalingConfig
from moe.system.fields import ConfigError, Section, require, setting

Activation = Literal["swiglu", "swiglu_clamped", "geglu", "geglu_exact", "reglu", "gelu", "relu"]
Norms = Literal["before", "after", "both"]
Attention = Literal["full", "blocked", "ring"]
RotatedLayers = Literal["all", "sliding"]
Remat = Literal["none", "hidden", "outputs", "attention", "offload", "offload_inputs", "dots", "routes", "full"]
LowPrecision = Literal["none", "int8", "float8", "mxfp8"]
LowPrecisionIn = Literal["ffn", "all"]
FakeQuantize = Literal["none", "mxfp4", "int4"]

_MODEL = "model."
_MOE = "model.moe."
_DELTA = "model.delta_net."


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(Section, path=_DELTA):
    """Gated DeltaNet (Yang et al. 2024): the layers that ``model.pattern`` calls delta have a memory of fixed size in
    place of attention."""

    key_heads: int = setting(4, least=1, most=2**16, split="tensor")  # M, heads of queries and of keys
    value_heads: int = setting(8, least=1, most=2**16, split="tensor")  # N, heads of values; key_heads divides them
    key_dim: int = setting(32, least=1, most=2**16)  # H of queries and keys
    value_dim: int = setting(32, least=1, most=2**16)  # V, of values
    conv_width: int = setting(4, least=1, most=64, unit="tokens")  # W, of the convolution of queries, keys and values

    def __post_init__(self) -> None:
        super().__post_init__()
        divides = self.value_heads % self.key_heads == 0
        self._require("value_heads", divides, f"must be a multiple of key_heads={self.key_heads}")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section, path=_MODEL):
    """Transformer: decoder-only, or encoder and decoder."""

    vocab_size: int = setting(4096, least=1, most=2**24, split="tensor", neutral=None)  # V, rows of the embedding
    d_model: int = setting(256, least=1, most=2**20, split="fsdp", neutral=None)  # D
    num_layers: int = setting(4, least=1, most=10_000, neutral=None)  # L, of the decoder
    #: token mixer of each layer, as "(delta x 3 attention) x 12", of attention, sliding, delta, mixer; repeated until
    #: all layers have one; empty: `mixer` if there is one, else attention, sliding if there is a window
    pattern: str = setting("", page=True)
    #: L of the encoder, which the decoder attends to; 0: decoder-only
    encoder_layers: int = setting(0, least=0, most=10_000, page=True)
    #: V of a separate embedding for the encoder; 0: encoder and decoder share one
    encoder_vocab_size: int = setting(0, least=0, most=2**24, split="tensor")
    num_heads: int = setting(8, least=1, most=2**16, split="tensor", neutral=None)  # N, query heads
    #: M, key/value heads; divides num_heads
    num_kv_heads: int = setting(4, least=1, most=2**16, split="tensor", neutral=None)
    head_dim: int = setting(32, most=2**16, neutral=None)  # H, even for rotary positions
    d_ff: int = setting(512, least=1, most=2**22, split="tensor")  # F, hidden dim of a dense FFN
    activation: Activation = "swiglu"  # of FFNs and experts; names with glu have a gate matrix
    norm_eps: float = setting(1e-5, above=0)  # epsilon of the norms
    layer_norm: bool = setting(False, page=True)  # LayerNorm with biases in place of RMSNorm (Phi-3.5-MoE)
    #: RMSNorm multiplies by 1 + scale, which starts at 0 (Qwen3-Next)
    zero_centred_norms: bool = setting(False, page=True)
    #: norms of attention and FFN: before, of their input; after, of their output (OLMo 2); both (Trinity)
    norms: Norms = setting("before", page=True)
    #: factor of the embedded tokens (Granite: 12)
    embedding_scale: float = setting(1.0, above=0, most=1e4, follows="model.base_d_model")
    #: factor of what attention and FFN add to the residual stream (Granite: 0.22)
    residual_scale: float = setting(1.0, above=0, most=1e4, follows="model.base_num_layers")
    #: factor of query·key (Granite: 1/H); 0: 1/sqrt(H)
    attention_scale: float = setting(0.0, least=0, most=1e4, follows="model.base_head_dim")
    #: factor of the logits (Granite: 1/6)
    logit_scale: float = setting(1.0, above=0, most=1e4, follows="model.base_d_model")
    #: T5's attention: biases for this many buckets of distances, no 1/sqrt(H); 0: rotary positions
    relative_buckets: int = setting(0, least=0, page=True)
    relative_max_distance: int = setting(128, unit="tokens")  # all distances from here on share the last bucket
    rope_theta: float = setting(10_000.0, above=0)  # base of the rotary frequencies
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    rope_dim: int = setting(0, page=True)  # rotated dimensions of a head, even; 0: all
    #: layers with rotary positions: all, or those with windows; the others then have no positions (EXAONE-MoE)
    rotated_layers: RotatedLayers = setting("all", page=True)
    #: base of the rotary frequencies, not scaled, in layers with windows (Mellum); 0: rope_theta, scaled as elsewhere
    window_rope_theta: float = setting(0.0, least=0, page=True)
    rope_interleaved: bool = setting(False, page=True)  # rotate pairs (2i, 2i+1) (DeepSeek) instead of (i, i + H/2)
    #: dimension of the latent of keys and values (DeepSeek-V2); 0: grouped-query attention
    kv_lora_rank: int = setting(0, least=0, most=2**16, split="fsdp", page=True)
    #: latent attention: dimension of the latent of queries; 0: none
    q_lora_rank: int = setting(0, least=0, most=2**16, split="fsdp")
    value_dim: int = setting(0, least=0, most=2**16)  # latent attention: H of the values
    #: number that a query attends to, with its own; 0: all
    sliding_window: int = setting(0, least=0, unit="tokens", page=True)
    #: RMSNorm of queries, keys: head (over H, Qwen3), full (N*H, OLMoE), rotated (H; Hunyuan)
    qk_norm: QKNorm = setting("none", page=True)
    #: full: all scores at once; blocked: without a T x T array, for TPUs and long rows; ring: so, and keys of rows that
    #: mesh.context splits pass from device to device instead of being gathered
    attention: Attention = setting("full", result="none")
    attention_bias: AttentionBias = setting("none", page=True)  # qkv (Qwen2); all: of the output too
    gated_attention: bool = setting(False, page=True)  # multiply the heads by sigmoid(x W) (Qwen3-Next)
    #: one more key per head, with a learned logit and no value (gpt-oss)
    attention_sinks: bool = setting(False, page=True)
    delta_net: DeltaNetConfig = DeltaNetConfig()
    #: token mixer in place of attention: switch_head, kimi_delta or module:object (docs/own_mixers.md); None: attention
    mixer: Mixer | None = setting(None, page=True)
    memory: MemoryConfig = MemoryConfig()
    #: clip queries, keys and values to [-c, c] before the rotation (OLMoE); 0: no clipping
    clip_qkv: float = setting(0.0, least=0, page=True)
    tie_embeddings: bool = False  # logits = x E^T
    logit_bias: bool = setting(False, page=True)  # a bias added to the logits (Phi-3.5-MoE); needs tie_embeddings=False
    scale_logits: bool = False  # divide the logits by sqrt(D) (T5 1.0); the embedding's sigma is then sqrt(s)
    #: extra layers after the last, each predicting one token further (DeepSeek-V3: 1)
    prediction_layers: int = setting(0, least=0, most=64, page=True)
    #: of the mean of their losses (DeepSeek-V3: 0.3, later 0.1)
    prediction_weight: float = setting(0.3, least=0, result="training")
    #: of embeddings, attention weights, hidden activations of dense FFNs, outputs of a block's halves and of a stack
    dropout: float = setting(0.0, share=True, result="training")
    #: s; matrices are truncated normal, sigma = sqrt(s / fan_in) (Switch, section 2.4: 0.1)
    init_scale: float = setting(1.0, above=0, most=1e4, result="training")
    #: D of a smaller model whose learning rate, weight decay and initial values are transferred to this one (muP,
    #: moe.training.rates); 0: no transfer from another width
    base_d_model: int = setting(0, least=0, most=2**20, result="training")
    #: its L (CompleteP); 0: no transfer from another depth
    base_num_layers: int = setting(0, least=0, most=10_000, result="training")
    #: its H; 0: this model's H (width grows by more heads)
    base_head_dim: int = setting(0, least=0, most=2**16, result="training")
    #: F of its experts; 0: in proportion to D
    base_expert_d_ff: int = setting(0, least=0, most=2**22, result="training")
    #: of activations and matmuls; parameters and router are float32
    dtype: DType = setting("float32", result="training")
    #: of the factors of matmuls in experts and dense FFNs (moe.dispatch.quantized)
    low_precision: LowPrecision = setting("none", page=True, result="training")
    #: all: in attention's projections too, and in float8 for rows sent to experts on other hosts (exchange_hosts)
    low_precision_in: LowPrecisionIn = setting("ffn", result="training")
    #: 4 bits to which the experts' matrices are rounded, with a straight-through gradient (moe.dispatch.fake_quantized)
    fake_quantize: FakeQuantize = setting("none", page=True)
    scan_layers: bool = setting(True, resume="free", result="none")  # compile one block for all equal layers
    #: equal layers per iteration of the loop over them; weights of a later one are gathered while an earlier one runs
    scan_unroll: int = setting(1, least=1, resume="free", unit="layers", result="none")
    #: what the backward pass recomputes: nothing, ..., the whole layer (REMAT_POLICIES)
    remat: Remat = setting("none", resume="free", result="none")
    moe: MoEConfig = MoEConfig()

    def __post_init__(self) -> None:
        if self.moe.d_ff == 0:
            object.__setattr__(self, "moe", dataclasses.replace(self.moe, d_ff=self.d_ff))
        super().__post_init__()
        self._follow_base()
        unrolls = self.scan_layers or self.scan_unroll == 1
        self._require("scan_unroll", unrolls, "must be 1 with model.scan_layers=False, which writes out all layers")
        low = self.low_precision != "none" or self.low_precision_in == "ffn"
        self._require("low_precision_in", low, "must be ffn with model.low_precision=none")
        self._check_fake_quantize()
        self._require("logit_bias", not (self.logit_bias and self.tie_embeddings), "needs model.tie_embeddings=False")
        self._check_stacks()
        self._check_attention()
        self._check_latent_attention()
        self._check_pattern()
        self._check_memory()
        if self.moe.gate is not None:
            self._check_moe_layers()
            count = sum(sparse_layers(self))
            allowed = f"must be at most the {count} MoE layers"
            require(len(self.moe.layer_gates) <= count, f"{_MOE}layer_gates", self.moe.layer_gates, allowed)

    @property
    def has_base(self) -> bool:
        """Whether the sizes of a base model are set."""
        return any((self.base_d_model, self.base_num_layers, self.base_head_dim, self.base_expert_d_ff))

    @property
    def width_growth(self) -> float:
        """D over the base model's."""
        return self.d_model / self.base_d_model if self.base_d_model else 1.0

    @property
    def depth_growth(self) -> float:
        """L over the base model's."""
        return self.num_layers / self.base_num_layers if self.base_num_layers else 1.0

    @property
    def expert_growth(self) -> float:
        """F of an expert over that of the base model's; finer experts have a smaller one."""
        return self.moe.d_ff / self.base_expert_d_ff if self.base_expert_d_ff else self.width_growth

    def _follow_base(self) -> None:
        """Fill in the factors that follow from the sizes of the base model; see :mod:`moe.training.rates`."""
        if not self.has_base:
            return
        none = {"encoder_layers": 0, "relative_buckets": 0, "scale_logits": False, "logit_bias": False}
        self._require_defaults("model.base_*", **none)
        rank = self.moe.expert_rank
        require(
            rank == 0, f"{_MOE}expert_rank", rank, "must be 0 with model.base_*: a rank does not grow with the width"
        )
        root, factors = self.width_growth**0.5, {}
        if self.base_d_model:
            factors |= {"embedding_scale": root, "logit_scale": 1 / root}
        if self.base_num_layers:
            factors["residual_scale"] = 1 / self.depth_growth
        if self.base_head_dim:
            factors["attention_scale"] = self.base_head_dim**0.5 / self.head_dim
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, value in factors.items():
            given, default = getattr(self, name), defaults[name]
            allowed = f"must be {value:g}, or {default:g} to be filled in, with the base sizes that are set"
            self._require(name, given == default or math.isclose(given, value), allowed)
            object.__setattr__(self, name, value)

    @property
    def layers_per_trip(self) -> int:
        """Equal layers in one trip of the loop over them; 0: all are written out."""
        return self.scan_unroll if self.scan_layers else 0

    @property
    def low_precision_everywhere(self) -> str:
        """The value of ``low_precision`` where ``low_precision_in`` is all, else none."""
        return self.low_precision if self.low_precision_in == "all" else "none"

    @property
    def sent_precision(self) -> str:
        """Precision of rows sent to experts on other hosts. Quantised a second time there, float8 values do not change;
        int8 values would shrink by half a step of 127, so these rows are sent in the compute dtype."""
        return "float8" if self.low_precision_everywhere == "float8" else "none"

    @property
    def expert_dim(self) -> int:
        """Dimension of the rows that experts read and write."""
        return self.moe.latent_dim or self.d_model

    def _require_defaults(self, where: str, **defaults: object) -> None:
        """Refuse other than default values of fields that are unused where ``where`` is set."""
        for name, default in defaults.items():
            self._require(name, getattr(self, name) == default, f"must be {default} where {where} is set")

    def _check_fake_quantize(self) -> None:
        if self.fake_quantize == "none":
            return
        self._require("fake_quantize", self.moe.gate is not None, "must be none without experts")
        inputs = "moe.latent_dim" if self.moe.latent_dim else "d_model"
        for name, size in (("moe.d_ff", self.moe.d_ff), (inputs, self.expert_dim)):
            allowed = f"needs model.{name}={size} divisible by 32, the inputs of one scale"
            self._require("fake_quantize", size % 32 == 0, allowed)

    def _check_stacks(self) -> None:
        encoder, buckets, distance = self.encoder_layers, self.relative_buckets, self.relative_max_distance
        if encoder or buckets:
            self._require_defaults(
                "model.encoder_layers or model.relative_buckets", rotated_layers="all", window_rope_theta=0.0
            )
        one_stack = not (encoder or buckets)
        allowed = "must be 0 with model.encoder_layers or model.relative_buckets"
        self._require("prediction_layers", not self.prediction_layers or one_stack, allowed)
        if encoder:
            none = {"norms": "before", "residual_scale": 1.0, "attention_scale": 0.0}
            self._require_defaults("model.encoder_layers", **none, kv_lora_rank=0, sliding_window=0)
        elif buckets:
            self._require_defaults("model.relative_buckets", kv_lora_rank=0)
        least = 4 if encoder else 2  # half of an encoder's are for keys after the query, half of those exact
        allowed = f"must be 0 for rotary positions, or from {least} to 65536"
        self._require("relative_buckets", buckets == 0 or least <= buckets <= 2**16, allowed)
        allowed = f"must be above half of relative_buckets={buckets} and at most {2**20}"
        self._require("relative_max_distance", buckets == 0 or buckets // 2 < distance <= 2**20, allowed)
        allowed = "needs model.encoder_layers above 0"
        self._require("encoder_vocab_size", encoder > 0 or self.encoder_vocab_size == 0, allowed)

    def _check_attention(self) -> None:
        rotary, size = not self.relative_buckets, self.rope_dim or self.head_dim
        allowed = "must be even: rotary positions rotate pairs of dimensions"
        self._require("head_dim", self.head_dim >= 1 + rotary and not (rotary and self.head_dim % 2), allowed)
        allowed = f"must be even and at most model.head_dim={self.head_dim}, or 0 for all"
        self._require("rope_dim", 0 <= self.rope_dim <= self.head_dim and self.rope_dim % 2 == 0, allowed)
        scaling = self.rope_scaling
        require(scaling.kind != "dynamic" or size > 2, f"{ROPE}kind", scaling.kind, "needs over 2 rotated dimensions")
        falls = scaling.kind != "yarn" or self.rope_theta > 1
        require(falls, f"{ROPE}kind", scaling.kind, "needs model.rope_theta above 1, so that frequencies fall")
        allowed = f"must be positive, and one for each of the {size // 2} rotated pairs for longrope"
        for name in ("short_factors", "long_factors"):
            value = getattr(scaling, name)
            right = all(factor > 0 for factor in value) and (scaling.kind != "longrope" or len(value) == size // 2)
            require(right, f"{ROPE}{name}", value, allowed)
        windowed = self.sliding_window > 0 or not self.window_rope_theta
        self._require("window_rope_theta", windowed, "must be 0 without model.sliding_window")
        divides = self.num_heads % self.num_kv_heads == 0
        self._require("num_kv_heads", divides, f"must divide model.num_heads={self.num_heads}")

    def _check_latent_attention(self) -> None:
        if not self.kv_lora_rank:
            for name in ("q_lora_rank", "value_dim"):
                self._require(name, getattr(self, name) == 0, "must be 0 without model.kv_lora_rank")
            return
        self._require("rope_dim", self.rope_dim >= 2, "must be at least 2")
        self._require("value_dim", self.value_dim >= 1, "must be at least 1")
        latent = "where model.kv_lora_rank is set"
        self._require(
            "rope_dim", self.rope_dim < self.head_dim, f"must be below model.head_dim={self.head_dim} {latent}"
        )
        allowed = f"must be model.num_heads={self.num_heads} {latent}"
        self._require("num_kv_heads", self.num_kv_heads == self.num_heads, allowed)
        none = {"qk_norm": "none", "attention_bias": "none", "attention_sinks": False, "clip_qkv": 0.0}
        none |= {"gated_attention": False, "zero_centred_norms": False, "rotated_layers": "all"}
        none |= {"window_rope_theta": 0.0}
        self._require_defaults("model.kv_lora_rank", **none, attention_scale=0.0)

    @property
    def mixer_words(self) -> tuple[Word, ...]:
        """Word of each layer of a decoder-only model in :attr:`pattern`."""
        words = parse(self.pattern)
        if not words:
            words = ("mixer",) if self.mixer is not None else ("sliding",) if self.sliding_window else ("attention",)
        return words * (self.num_layers // len(words))

    def _check_pattern(self) -> None:
        words, text = parse(self.pattern), self.pattern
        count = len(words)
        fits = not count or self.num_layers % count == 0
        self._require("pattern", fits, f"has {count} layers, must divide model.num_layers={self.num_layers}")
        one_stack = not (self.encoder_layers or self.relative_buckets)
        allowed = "must be '' with model.encoder_layers or model.relative_buckets"
        self._require("pattern", not count or one_stack, allowed)
        windowed = self.sliding_window > 0
        self._require("pattern", windowed or "sliding" not in words, "needs model.sliding_window above 0")
        read = not windowed or not words or "sliding" in words
        self._require("sliding_window", read, f"must be 0: model.pattern={text!r} has no sliding layer")
        if self.mixer is None:
            self._require("pattern", "mixer" not in words, "needs model.mixer")
            return
        where = f"{FIELD}={self.mixer.name!r}"
        if self.mixer.reports:
            self._require_defaults(where, prediction_layers=0)
        self._require_defaults(where, encoder_layers=0, relative_buckets=0)
        used = self.mixer_words
        require("mixer" in used, FIELD, self.mixer.name, f"is in no layer of model.pattern={text!r}")
        if {*used} <= {"mixer", "delta"}:
            self._require_defaults(f"{where} is in all layers and", kv_lora_rank=0, sliding_window=0)

    def _check_memory(self) -> None:
        layers, field = self.memory.layers, f"{MEMORY}layers"
        if not layers:
            return
        _require_layers(field, layers, self.num_layers)
        require(not self.encoder_layers, field, layers, "must be empty with model.encoder_layers")
        require(not self.has_base, field, layers, "must be empty with model.base_*: its rates do not follow the width")
        own = not self.prediction_layers or layers[-1] < self.num_layers - 1
        require(own, field, layers, "must not have the last layer with model.prediction_layers, which are of its kind")
        self.memory.hashes(self.vocab_size)

    def _check_moe_layers(self) -> None:
        moe, num_layers = self.moe, self.encoder_layers + self.num_layers
        _require_layers(f"{_MOE}layers", moe.layers, num_layers)
        require(
            not moe.layers or (moe.every == 1 and moe.first_dense == 0),
            f"{_MOE}layers",
            moe.layers,
            f"lists the MoE layers itself: leave {_MOE}every at 1 and {_MOE}first_dense at 0",
        )
        if moe.shortcut:
            self._require_defaults(f"{_MOE}shortcut", encoder_layers=0, norms="before")
            followed = not any(one and other for one, other in itertools.pairwise((*sparse_layers(self), True)))
            allowed = f"needs a dense layer after each MoE layer, as {_MOE}layers=(0, 2) of 4 has"
            require(followed, f"{_MOE}shortcut", True, allowed)
        require(
            any(sparse_layers(self)),
            f"{_MOE}every={moe.every}, {_MOE}first_dense",
            moe.first_dense,
            f"leave no MoE layer among {num_layers}; use {_MOE}gate=none for a dense model",
        )


def check_is_model(config: object) -> ModelConfig:
    """The config of a model. Raises a ConfigError for something else."""
    if not isinstance(config, ModelConfig):
        raise ConfigError(f"config must be a moe.ModelConfig, such as Config().model, not {type(config).__name__}")
    return config


def _require_layers(field: str, layers: tuple[int, ...], num_layers: int) -> None:
    """Raise a ConfigError unless a tuple is an increasing selection of layer numbers."""
    increasing = all(low < high for low, high in itertools.pairwise(layers))
    inside = all(0 <= layer < num_layers for layer in layers)
    require(increasing and inside, field, layers, f"must be increasing layer numbers from 0 to {num_layers - 1}")


def sparse_layers(config: ModelConfig) -> tuple[bool, ...]:
    """True for each MoE layer, in layer order: an encoder's layers come before the decoder's."""
    moe = config.moe
    if moe.gate is not None and moe.layers:
        return tuple(layer in moe.layers for layer in range(config.encoder_layers + config.num_layers))
    return tuple(
        moe.gate is not None and layer >= moe.first_dense and (layer + 1) % moe.every == 0
        for stack in (config.encoder_layers, config.num_layers)
        for layer in range(stack)
    )
