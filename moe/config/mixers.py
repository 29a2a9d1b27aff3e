"""Token mixers as values: what a layer of each kind reads, what it supports and what it costs.

:func:`moe.config.layer_kinds.stacks` gives every layer its mixer; :mod:`moe.layers.mixers` has their layers. What
depends on the kind of a mixer asks its value: generation, FLOPs, memory estimates, plans, checks of configs.
"""

from __future__ import annotations

import dataclasses
import operator
import types
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from moe.routing.gates import TopK
from moe.routing.interface import ScoreFunction
from moe.system.fields import check_fields, require, setting

QKNorm = Literal["none", "head", "full", "rotated"]
AttentionBias = Literal["none", "qkv", "all"]
#: Setting that names a mixer of a user's module, whose fields are settings below it.
FIELD = "model.mixer"

#: Abilities that not every mixer has: to let all tokens of a document see its prefix (prefix LM), to split rows over
#: ``mesh.context``, to take back rejected tokens (drafting), and to scale each head's scores (QK-clip).
Ability = Literal["prefix", "context", "drafting", "clipping"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixer:
    """Base of all token mixers. A mixer is a frozen dataclass of what its layer reads.

    Attributes:
        layer: class of its layer, derived from :class:`moe.layers.mixers.interface.MixerLayer`; None: the package's.
        settings: field → the setting of :class:`moe.config.ModelConfig` that it has the value of, dotted in a section.
        path: name of the layer in its block, and so in paths of parameters.
        reports: its layer has experts, whose report training logs (:meth:`MixerLayer.report`).
        abilities: those that every mixer of the class has.
    """

    layer: ClassVar[type[Any] | None] = None
    settings: ClassVar[Mapping[str, str]] = types.MappingProxyType({})
    path: ClassVar[str] = "mixer"
    reports: ClassVar[bool] = False
    abilities: ClassVar[frozenset[Ability]] = frozenset()

    #: Name in configs, messages and records: module:class, or module:object that it was imported from.
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", f"{type(self).__module__}:{type(self).__qualname__}")
        check_fields(self, f"{FIELD}.")

    @classmethod
    def of(cls, model: Any, **own: Any) -> Self:
        """The mixer of a model's settings, with fields of its own."""
        return cls(**{field: operator.attrgetter(name)(model) for field, name in cls.settings.items()}, **own)

    @property
    def score_dims(self) -> int:
        """H of keys plus H of values, where a layer computes attention scores; 0: it computes none."""
        return 0

    def lacks(self, ability: Ability) -> str:
        """The setting of :class:`moe.config.ModelConfig` because of which the mixer lacks an ability; empty if it has
        it."""
        return "" if ability in self.abilities else FIELD.removeprefix("model.")

    def flops(self, length: int) -> float:
        """FLOPs of training, forward and backward, per token of rows of this length, without the 6 of each
        parameter."""
        raise NotImplementedError(f"{type(self).__name__} has no method flops(length)")

    def activations(self, tensor: int, lanes: int) -> tuple[float, float]:
        """Elements per token on one device: outputs of the matmuls before the tokens are mixed, and of the heads.

        Args:
            tensor: devices over which heads are split.
            lanes: the last dimension of an array is padded to a multiple of it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method activations(tensor, lanes)")


def _keys_per_query(window: int, length: int) -> float:
    """Keys that a query of a causal row sees, on average."""
    window = min(window or length, length)
    # The first `window` queries see 1..window keys, the others `window` each.
    return (window * (window + 1) / 2 + (length - window) * window) / length


def _padded(dim: int, lanes: int) -> int:
    return -(-dim // lanes) * lanes


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedQuery(Mixer):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions or T5's relative ones."""

    path: ClassVar[str] = "attention"
    settings: ClassVar[Mapping[str, str]] = types.MappingProxyType(
        {
            "heads": "num_heads",
            "kv_heads": "num_kv_heads",
            "head_dim": "head_dim",
            "scale": "attention_scale",
            "buckets": "relative_buckets",
            "qk_norm": "qk_norm",
            "bias": "attention_bias",
            "gated": "gated_attention",
            "sinks": "attention_sinks",
            "clip": "clip_qkv",
        }
    )

    heads: int  # N
    kv_heads: int  # M
    head_dim: int  # H
    window: int = 0  # tokens that a query attends to, with its own; 0: all
    causal: bool = True  # a query sees earlier positions and its own; else all
    scale: float = 0.0  # of query·key; 0: 1/sqrt(H)
    rotated: bool = True  # whether queries and keys have rotary positions, unless distances have biases
    theta: float = 0.0  # base of the rotary frequencies, not scaled; 0: that of the model, with its scaling
    buckets: int = 0  # of distances that have a bias (T5); 0: rotary positions
    qk_norm: QKNorm = "none"
    bias: AttentionBias = "none"
    gated: bool = False  # the heads are multiplied by sigmoid(x W)
    sinks: bool = False  # one more key per head, with a learned logit and no value
    clip: float = 0.0  # of queries, keys and values; 0: none

    @property
    def score_dims(self) -> int:
        """H of keys plus H of values."""
        return 2 * self.head_dim

    def lacks(self, ability: Ability) -> str:
        """Windows know no prefix; biases of distances need whole rows; norms and limits undo a scaling."""
        biased = "relative_buckets" if self.buckets else ""
        limited = "qk_norm" if self.qk_norm != "none" else "clip_qkv" if self.clip else ""
        reasons: dict[Ability, str] = {
            "prefix": "sliding_window" if self.window else "",
            "context": biased,
            "clipping": biased or limited,
        }
        return reasons.get(ability, "")

    def flops(self, length: int) -> float:
        """FLOPs of the scores of the keys that a query sees."""
        return self.score_flops(_keys_per_query(self.window, length) if self.causal else length)

    def score_flops(self, keys: float) -> float:
        """2 matmuls × 2 FLOPs × 3 (forward and twice backward) × N·H, on average of keys and values, for every key."""
        return 6 * self.heads * self.score_dims * keys

    def activations(self, tensor: int, lanes: int) -> tuple[float, float]:
        """Elements of queries, their gates, keys and values."""
        dim = _padded(self.head_dim, lanes) / tensor
        return (self.heads * (1 + self.gated) + 2 * self.kv_heads) * dim, self.heads * dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiHeadLatent(Mixer):
    """Multi-head latent attention (DeepSeek-V2 2024, section 2.1)."""

    path: ClassVar[str] = "attention"
    settings: ClassVar[Mapping[str, str]] = types.MappingProxyType(
        {
            "heads": "num_heads",
            "head_dim": "head_dim",
            "rope_dim": "rope_dim",
            "value_dim": "value_dim",
            "rank": "kv_lora_rank",
            "query_rank": "q_lora_rank",
        }
    )

    heads: int  # N
    head_dim: int  # H of queries and keys
    rope_dim: int  # the last of these, which are rotated; of keys one vector for all heads
    value_dim: int  # V, of values
    rank: int  # of the latent of keys and values
    query_rank: int = 0  # of the latent of queries; 0: none
    window: int = 0  # tokens that a query attends to, with its own; 0: all

    @property
    def score_dims(self) -> int:
        """H of keys plus V."""
        return self.head_dim + self.value_dim

    def lacks(self, ability: Ability) -> str:
        """Prefixes are not supported."""
        if ability != "prefix":
            return ""
        return "sliding_window" if self.window else "kv_lora_rank"

    def flops(self, length: int) -> float:
        """FLOPs of the scores of expanded keys and values, as in training."""
        return 6 * self.heads * self.score_dims * _keys_per_query(self.window, length)

    def activations(self, tensor: int, lanes: int) -> tuple[float, float]:
        """Elements of queries, and of keys and values expanded from the latents, which every device holds whole."""
        unrotated, values = self.head_dim - self.rope_dim, _padded(self.value_dim, lanes)
        dims = _padded(self.head_dim, lanes) + _padded(unrotated, lanes) + values
        latents = self.query_rank + self.rank + self.rope_dim
        return self.heads * dims / tensor + latents, self.heads * values / tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDelta(Mixer):
    """Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464)."""

    path: ClassVar[str] = "delta_net"
    settings: ClassVar[Mapping[str, str]] = types.MappingProxyType(
        {name: f"delta_net.{name}" for name in ("key_heads", "value_heads", "key_dim", "value_dim", "conv_width")}
    )

    key_heads: int  # M, heads of queries and of keys
    value_heads: int  # N, heads of values
    key_dim: int  # H
    value_dim: int  # V
    conv_width: int  # W, tokens that the convolution of queries, keys and values sees

    def lacks(self, ability: Ability) -> str:
        """Nearly every ability is lacking: its memory runs over whole rows in order, and keeps rejected tokens. It has
        no scores that could be too large."""
        return "" if ability == "clipping" else "pattern"

    def flops(self, length: int) -> float:
        """3 products with the H x V memory of each of the N heads, whatever the length: to read what is replaced, to
        write, and to read for the query."""
        del length
        return 18 * self.value_heads * self.key_dim * self.value_dim

    def activations(self, tensor: int, lanes: int) -> tuple[float, float]:
        """Elements of queries, keys, values and gates."""
        del lanes
        values = self.value_heads * self.value_dim
        return 2 * (self.key_heads * self.key_dim + values) / tensor, values / tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwitchHead(Mixer):
    """Attention whose value and output projections are experts of each head (SwitchHead: Csordas et al. 2023, arXiv
    2312.07987, and its released code, whose sizes of a model of 243M parameters are the defaults).

    Queries and keys are dense. Two routers of each head choose K of its E value experts for a token as a key, and K of
    its E output experts for it as a query. Deviations: experts are not dropped out, columns of routers are not drawn
    with equal norms, and a balance loss and a z-loss are offered.
    """

    reports: ClassVar[bool] = True

    name: str = "switch_head"
    heads: int = setting(4, least=1, most=2**16, split="tensor")  # N, of queries, keys and values
    head_dim: int = setting(100, least=2, most=2**16)  # H, even for rotary positions
    experts: int = setting(4, least=1, most=2**16)  # E of each head, for values and for outputs
    k: int = setting(2, least=1)  # K
    score: ScoreFunction = "sigmoid"
    renormalise: bool = False  # divide the chosen weights by their sum
    balance: float = setting(0.0, least=0, most=1e6)  # weight of the load-balancing loss of each router
    z: float = setting(0.0, least=0, most=1e6)  # of its z-loss

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.head_dim % 2 == 0, f"{FIELD}.head_dim", self.head_dim, "must be even")
        require(self.k <= self.experts, f"{FIELD}.k", self.k, f"must be at most experts={self.experts}")
        differ = self.k > 1 or not self.renormalise
        require(differ, f"{FIELD}.k", self.k, "must be above 1 with renormalise, which makes a single weight 1")

    @property
    def gate(self) -> TopK:
        """Rule of the routers."""
        return TopK(k=self.k, score=self.score, renormalise=self.renormalise)

    @property
    def score_dims(self) -> int:
        """H of keys plus H of values."""
        return 2 * self.head_dim

    def flops(self, length: int) -> float:
        """FLOPs of the scores of the keys that a query sees; all experts are computed, as the parameters count."""
        return 6 * self.heads * self.score_dims * _keys_per_query(0, length)

    def activations(self, tensor: int, lanes: int) -> tuple[float, float]:
        """Elements of queries, keys and every expert's values; and of the heads, and weighted for every expert."""
        dim = self.heads * _padded(self.head_dim, lanes) / tensor
        return (2 + self.experts) * dim, (1 + self.experts) * dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class KimiDelta(Mixer):
    """Kimi delta attention (Kimi Linear: Kimi Team 2025, arXiv 2510.26692): gated DeltaNet whose channels decay each by
    itself. Kimi Linear of 48B parameters has 32 heads of 128."""

    abilities: ClassVar[frozenset[Ability]] = frozenset({"clipping"})  # it has no scores that could be too large

    name: str = "kimi_delta"
    heads: int = setting(4, least=1, most=2**16, split="tensor")  # N
    dim: int = setting(32, least=1, most=2**16)  # H of queries, keys and values, and rank of both gates
    conv_width: int = setting(4, least=1, most=64, unit="tokens")  # W, of the convolution of queries, keys and values

    def flops(self, length: int) -> float:
        """3 products with the H x H memory of each head, whatever the length: to read what is replaced, to write, and
        to read for the query."""
        del length
        return 18 * self.heads * self.dim**2

    def activations(self, tensor: int, lanes: int) -> tuple[float, float]:
        """Elements of queries, keys, values, decays and gates, and of the inner vectors of the last two."""
        del lanes
        heads = self.heads * self.dim / tensor
        return 5 * heads + 2 * self.dim, heads


#: Token mixers that ``model.mixer`` names without a module.
MIXERS: Mapping[str, type[Mixer]] = types.MappingProxyType({"switch_head": SwitchHead, "kimi_delta": KimiDelta})

#: Mixers that follow from other settings of the model.
BUILT_IN: tuple[type[Mixer], ...] = (GroupedQuery, MultiHeadLatent, GatedDelta)

#: Names of mixers' layers in their blocks: the package's, and all.
BUILT_IN_PATHS = frozenset(cls.path for cls in BUILT_IN)
PATHS = BUILT_IN_PATHS | {Mixer.path}


def attention_of(config: Any, *, windowed: bool) -> Mixer:
    """Attention of a decoder-only model (:class:`moe.config.ModelConfig`), within its window or to all keys."""
    window = config.sliding_window if windowed else 0
    if config.kv_lora_rank:
        return MultiHeadLatent.of(config, window=window)
    rotated = windowed or config.rotated_layers == "all"
    return GroupedQuery.of(config, window=window, rotated=rotated, theta=config.window_rope_theta if windowed else 0.0)
