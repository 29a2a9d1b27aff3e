"""Sizes of any published model's layers, read from its ``config.json`` without its family's code.

Families name the same sizes differently; :data:`_NAMES` has the names of each. What a config does not say is not
guessed: a size that is missing is refused. Mixers are told by ``layer_types``, by the intervals that families state
instead, and by the fields of latent attention; see :data:`MIXERS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from moe.config import ConfigError

_Json = dict[str, Any]

#: Names of a size in the families; the first that a config has counts.
_NAMES = {
    "width": ("hidden_size", "d_model", "n_embd", "dim"),
    "layers": ("num_hidden_layers", "n_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_heads", "n_head"),
    "kv_heads": ("num_key_value_heads", "n_kv_heads", "num_kv_heads"),
    "vocabulary": ("vocab_size",),
    "ffn": ("intermediate_size_mlp", "intermediate_size", "ffn_hidden_size", "n_inner"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts"),
    "chosen": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k"),
    "expert_ffn": ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size", "intermediate_size"),
    "shared": ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
    "shared_ffn": ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    "first_dense": ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"),
    "every": ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_freq", "expert_layer_period"),
    "window": ("sliding_window", "attention_chunk_size"),
}


@dataclasses.dataclass(frozen=True)
class Mixer:
    """A kind of token mixer.

    Attributes:
        projections: of a config's sizes → shapes [K,N] of the matrices that every token is multiplied with.
        keys: tokens of a row → keys that a query sees in the mean.
        heads: of a config's sizes → (number of heads, dimension of a key plus that of a value); or of what a recurrent
            mixer multiplies with its memory for each token.
        words: of what is approximate; "" for nothing.
    """

    projections: Callable[[Sizes], list[tuple[int, int]]]
    keys: Callable[[Sizes, int], float]
    heads: Callable[[Sizes], tuple[int, int]]
    words: str = ""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a model; ``layers`` has (mixer, "experts", "dense" or "" for no FFN) of each."""

    fields: _Json
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    vocabulary: int
    ffn: int
    experts: int
    chosen: int
    expert_ffn: int
    shared_ffn: int
    window: int
    layers: tuple[tuple[str, str], ...]
    tied: bool

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Shapes of the dense matrices of all layers, those of shared experts included."""
        found = []
        for mixer, kind in self.layers:
            found += MIXERS[mixer].projections(self)
            ffn = {"experts": self.shared_ffn, "dense": self.ffn}.get(kind, 0)
            found += [(self.width, 2 * ffn), (ffn, self.width)] if ffn else []
        return found

    @property
    def sparse_layers(self) -> int:
        """Layers with experts."""
        return sum(kind == "experts" for _, kind in self.layers)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one gated expert."""
        return 3 * self.width * self.expert_ffn

    @property
    def parameters(self) -> int:
        """All matrices; norms, biases and routers are left out."""
        tables = (1 if self.tied else 2) * self.vocabulary * self.width
        dense = sum(k * n for k, n in self.matrices)
        return tables + dense + self.sparse_layers * self.experts * self.expert_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that a token is multiplied with, the unembedding included."""
        dense = sum(k * n for k, n in self.matrices)
        return self.vocabulary * self.width + dense + self.sparse_layers * self.chosen * self.expert_parameters

    def approximate(self) -> list[str]:
        """Sentences about what is approximate."""
        words = dict.fromkeys(MIXERS[mixer].words for mixer, _ in self.layers)
        return [each for each in words if each]


def _of_heads(sizes: Sizes) -> list[tuple[int, int]]:
    both = (sizes.heads * sizes.head_dim + 2 * sizes.kv_heads * sizes.head_dim) if sizes.kv_heads else 0
    return [(sizes.width, both), (sizes.heads * sizes.value_dim, sizes.width)]


def _latent(sizes: Sizes) -> list[tuple[int, int]]:
    """Multi-head latent attention (DeepSeek-V2 2024, section 2.1)."""
    rank, of_queries = sizes.fields["kv_lora_rank"], sizes.fields.get("q_lora_rank") or 0
    rotary = sizes.fields["qk_rope_head_dim"]
    queries = sizes.heads * sizes.head_dim
    into = [(sizes.width, of_queries), (of_queries, queries)] if of_queries else [(sizes.width, queries)]
    up = sizes.heads * (sizes.head_dim - rotary + sizes.value_dim)
    return [*into, (sizes.width, rank + rotary), (rank, up), (sizes.heads * sizes.value_dim, sizes.width)]


def _delta(sizes: Sizes) -> list[tuple[int, int]]:
    """Gated DeltaNet (Yang et al. 2024), with the sizes of Qwen3-Next or Kimi Linear."""
    heads, dim, of_values, value_dim = _delta_heads(sizes)
    return [(sizes.width, 2 * heads * dim + 2 * of_values * value_dim), (of_values * value_dim, sizes.width)]


def _delta_heads(sizes: Sizes) -> tuple[int, int, int, int]:
    fields = sizes.fields
    own = fields.get("linear_attn_config") or {}
    heads = fields.get("linear_num_key_heads") or own.get("num_heads") or sizes.heads
    dim = fields.get("linear_key_head_dim") or own.get("head_dim") or sizes.head_dim
    return heads, dim, fields.get("linear_num_value_heads") or heads, fields.get("linear_value_head_dim") or dim


def _mamba(sizes: Sizes) -> list[tuple[int, int]]:
    """Mamba-2 (Dao and Gu 2024): the gate, the inputs, and the state's two vectors in one matrix."""
    inner = _mamba_inner(sizes)
    state = _size_of(sizes.fields, "mamba_d_state", "ssm_state_size")
    groups = sizes.fields.get("n_groups") or sizes.fields.get("mamba_n_groups") or 1
    return [(sizes.width, 2 * inner + 2 * groups * state), (inner, sizes.width)]


def _mamba_inner(sizes: Sizes) -> int:
    fields = sizes.fields
    if fields.get("mamba_num_heads"):
        return fields["mamba_num_heads"] * _size_of(fields, "mamba_head_dim")
    return sizes.width * int(fields.get("mamba_expand") or fields.get("expand") or 2)


def _causal(sizes: Sizes, tokens: int) -> float:
    return (tokens + 1) / 2


def _windowed(sizes: Sizes, tokens: int) -> float:
    return min(sizes.window or tokens, (tokens + 1) / 2)


def _chosen_keys(sizes: Sizes, tokens: int) -> float:
    return min(int(sizes.fields.get("index_topk") or tokens), (tokens + 1) / 2)


def _score_dims(sizes: Sizes) -> tuple[int, int]:
    return sizes.heads, sizes.head_dim + sizes.value_dim


#: Products with the memory of a recurrent mixer for each token, in vectors of its heads.
_RECURRENT = "recurrent mixers are priced as their projections and three products of their memories"

MIXERS = {
    "full_attention": Mixer(_of_heads, _causal, _score_dims),
    "sliding_attention": Mixer(_of_heads, _windowed, _score_dims),
    "latent": Mixer(_latent, _causal, _score_dims),
    "sparse_latent": Mixer(
        _latent, _chosen_keys, _score_dims, "chosen keys are priced as a window of as many; their indexer is left out"
    ),
    "linear_attention": Mixer(_delta, lambda s, _: 3 * _delta_heads(s)[1] / 2, lambda s: _recurrent(s), _RECURRENT),
    "mamba": Mixer(
        _mamba,
        lambda s, _: 3 * _size_of(s.fields, "mamba_d_state", "ssm_state_size") / 2,
        lambda s: (1, 2 * _mamba_inner(s)),
        _RECURRENT,
    ),
    "none": Mixer(lambda sizes: [], lambda sizes, tokens: 0.0, lambda sizes: (0, 0)),
}


def _recurrent(sizes: Sizes) -> tuple[int, int]:
    _, _, heads, dim = _delta_heads(sizes)
    return heads, 2 * dim


#: Names in ``layer_types`` of the families, and letters of ``hybrid_override_pattern``, by mixers above.
_KINDS = {
    **{"attention": "full_attention", "full_attention": "full_attention", "*": "full_attention"},
    **{"chunked_attention": "sliding_attention", "sliding_attention": "sliding_attention"},
    **{"linear_attention": "linear_attention", "kda": "linear_attention", "gated_deltanet": "linear_attention"},
    **{"mamba": "mamba", "mamba2": "mamba", "hybrid": "mamba", "M": "mamba", "-": "none", "E": "none", "moe": "none"},
}


def read(source: _Json) -> Sizes:
    """The sizes in a ``config.json``; of a model of several kinds of input, those of its text.

    Raises:
        ConfigError: a size is missing, or a layer's kind is unknown.
    """
    fields = source | (source.get("text_config") or {})
    width, heads = _size(fields, "width"), _size(fields, "heads")
    experts = _optional(fields, "experts")
    head_dim = int(fields.get("head_dim") or width // heads)
    value_dim = head_dim
    if fields.get("kv_lora_rank"):
        head_dim = _size_of(fields, "qk_nope_head_dim") + _size_of(fields, "qk_rope_head_dim")
        value_dim = _size_of(fields, "v_head_dim")
    expert_ffn = _size(fields, "expert_ffn") if experts else 0
    shared_ffn = _optional(fields, "shared_ffn") or (_optional(fields, "shared") * expert_ffn if experts else 0)
    return Sizes(
        fields,
        width,
        heads,
        _optional(fields, "kv_heads") or heads,
        head_dim,
        value_dim,
        _size(fields, "vocabulary"),
        _size(fields, "ffn"),
        experts,
        _size(fields, "chosen") if experts else 0,
        expert_ffn,
        shared_ffn,
        _optional(fields, "window"),
        _layers(fields, experts),
        bool(fields.get("tie_word_embeddings", source.get("tie_word_embeddings", False))),
    )


def _layers(fields: _Json, experts: int) -> tuple[tuple[str, str], ...]:
    count = _size(fields, "layers")
    named = fields.get("layer_types") or list(fields.get("hybrid_override_pattern") or "")
    latent = "sparse_latent" if fields.get("index_topk") else "latent"
    kinds = []
    for i in range(count):
        kind = named[i] if i < len(named) else _stated_kind(fields, i)
        if kind not in _KINDS:
            raise ConfigError(f"config.json: layer_types: {kind!r}: must be one of {', '.join(_KINDS)}")
        mixer = _KINDS[kind]
        kinds.append(latent if mixer == "full_attention" and fields.get("kv_lora_rank") else mixer)
    if fields.get("hybrid_override_pattern"):  # a letter is a mixer or an FFN
        ffns = {"E": "experts", "-": "dense"}
        return tuple((kind, ffns.get(letter, "")) for kind, letter in zip(kinds, named, strict=False))
    first, every = _optional(fields, "first_dense"), fields.get("moe_layer_freq")
    if isinstance(every, list):
        sparse = [bool(experts and each) for each in every]
        return tuple((kind, "experts" if each else "dense") for kind, each in zip(kinds, sparse, strict=False))
    step, offset = max(_optional(fields, "every"), 1), int(fields.get("expert_layer_offset") or 0)
    dense = set(fields.get("mlp_only_layers") or ())
    counted_from_one = "decoder_sparse_step" in fields or "interleave_moe_layer_step" in fields
    found = []
    for i, kind in enumerate(kinds):
        sparse = experts and i >= first and i not in dense and (i + counted_from_one) % step == offset % step
        found.append((kind, "experts" if sparse else "dense"))
    return tuple(found)


def _stated_kind(fields: _Json, layer: int) -> str:
    """The kind of a layer in a config without ``layer_types``."""
    if every := fields.get("full_attention_interval"):
        return "full_attention" if (layer + 1) % every == 0 else "linear_attention"
    if every := fields.get("attn_layer_period"):
        return "full_attention" if layer % every == int(fields.get("attn_layer_offset") or 0) else "mamba"
    own = fields.get("linear_attn_config") or {}
    if layer + 1 in own.get("kda_layers", ()):
        return "linear_attention"
    windowed = fields.get("sliding_window") and fields.get("use_sliding_window", True)
    return "sliding_attention" if windowed else "full_attention"


def _optional(fields: _Json, what: str) -> int:
    found = next((fields[name] for name in _NAMES[what] if isinstance(fields.get(name), int)), 0)
    return int(found)


def _size(fields: _Json, what: str) -> int:
    return _size_of(fields, *_NAMES[what])


def _size_of(fields: _Json, *names: str) -> int:
    value = next((fields[name] for name in names if fields.get(name) is not None), None)
    if isinstance(value, list) and value:
        value = max(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**40:
        raise ConfigError(f"config.json: {names[0]}={value}: must be a positive number (or {', '.join(names[1:])})")
    return value
