"""Inputs of attention's scores beside query·key: rotary and relative positions, which keys are seen, sinks."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe.config import ModelConfig
from moe.config.mixers import GroupedQuery
from moe.config.rope_section import RopeScalingConfig
from moe.layers.inputs import KEEP_ALL, Dropout
from moe.layers.parameter import matrix
from moe.parallel.partition_specs import REPLICATED


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Which keys a query sees, and what their weights depend on beside query·key.

    Attributes:
        window: positions a query sees, its own included; 0: all.
        causal: a query sees earlier positions and its own; else all.
        bias: of the distances 1 − T … T − 1 (:meth:`RelativeBias.by_distance`).
        prefix: 1 for keys that all queries of their document see, whatever ``causal``.
        scale: of the products; None: 1/sqrt(H).
        drop: dropout of the weights.
        sinks: logit of a further key without a value (:func:`append_sink`); None: none.
    """

    window: int = 0
    causal: bool = True
    bias: Float[Array, "N D"] | None = None
    prefix: Int[Array, "B U"] | None = None
    scale: float | None = None
    drop: Dropout = KEEP_ALL
    sinks: Float[Array, " N"] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the kernels of :mod:`moe.layers.attention.cpu` and :mod:`moe.layers.attention.tpu` support it."""
        return self.causal and self.bias is None and self.prefix is None and not self.drop.active

    def factor(self, head_dim: int) -> float:
        """Factor of query·key."""
        return head_dim**-0.5 if self.scale is None else self.scale

    def mask(
        self,
        segment_ids: Int[Array, "B Q"],
        key_segment_ids: Int[Array, "B U"],
        first: Int[Array, ""] | int,
        first_key: Int[Array, ""] | int,
    ) -> Bool[Array, "B Q U"]:
        """Pairs that attention sees, of queries and keys from these positions on."""
        mask = segment_ids[:, :, None] == key_segment_ids[:, None, :]
        if self.causal:
            distance = first + jnp.arange(mask.shape[1])[:, None] - (first_key + jnp.arange(mask.shape[2]))  # [Q,U]
            visible = sees(distance, self.window)
            mask &= visible if self.prefix is None else visible | (self.prefix[:, None, :] > 0)
        return mask


def sees(distance: Int[Array, "*batch"], window: int) -> Bool[Array, "*batch"]:
    """Whether a query of a causal model sees a key at this distance.

    Args:
        distance: number of positions by which the key comes before the query.
        window: positions that a query sees, its own included; 0: all.
    """
    return (distance >= 0) & ((distance < window) if window else True)


#: Keys, and dimensions of a head, that a sink adds: one of each is used, and cuDNN takes multiples of this.
ADDED = 8


def append_sink(
    sinks: Float[Array, " N"],
    query: Float[Array, "B T N H"],
    key: Float[Array, "B U M H"],
    value: Float[Array, "B U M H"],
    mask: Bool[Array, "B *heads T U"],
    bias: Float[Array, "B N T U"] | None,
    scale: float,
) -> tuple[Array, Array, Array, Array, Array | None]:
    """Queries, keys, values, mask and bias whose attention includes the sink; its first H dimensions are the result.

    The sink is one more key, so that every kernel computes it and its gradient: an extra dimension of the queries
    holds its logit, and only that key has 1 there.
    """
    head_dim = query.shape[-1]
    # Cast last, so that the gradient, a sum over all queries, is one in float32.
    logit = jnp.broadcast_to((sinks / scale)[:, None], (*query.shape[:3], 1)).astype(query.dtype)
    query = jnp.pad(jnp.concatenate([query, logit], axis=-1), [(0, 0)] * 3 + [(0, ADDED - 1)])
    further = [(0, 0), (0, ADDED), (0, 0), (0, ADDED)]
    key = jnp.pad(key, further).at[:, -ADDED, :, head_dim].set(1)
    columns = [(0, 0)] * (mask.ndim - 1) + [(0, ADDED)]
    mask = jnp.pad(mask, columns).at[..., -ADDED].set(True)
    bias = None if bias is None else jnp.pad(bias, [(0, 0)] * 3 + [(0, ADDED)])
    return query, key, jnp.pad(value, further), mask, bias


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Rotary positions of a layer's queries and keys, read from its config when the layer is made.

    Attributes:
        dim: first dimensions of each head that are rotated; 0: all.
        theta: base.
        scaling: of the frequencies.
        interleaved: whether pairs are neighbours (2i, 2i + 1), as in RoFormer and DeepSeek, or halves (i, i + H/2), as
            in most open checkpoints.
        factor: of the rotated queries and keys.
        follows_length: whether the angles of a text depend on how long it is.
    """

    dim: int
    theta: float
    scaling: RopeScalingConfig
    interleaved: bool
    factor: float
    follows_length: bool

    @classmethod
    def of(cls, config: ModelConfig, *, interleaved: bool = False, theta: float = 0.0) -> Rotation:
        """The rotation of a model's layers.

        Args:
            config: base, scaling and ``rope_dim``.
            interleaved: see the class.
            theta: base in place of the config's, without its scaling; 0: the config's.
        """
        base, scaling = (theta, RopeScalingConfig()) if theta else (config.rope_theta, config.rope_scaling)
        return cls(config.rope_dim, base, scaling, interleaved, attention_factor(scaling), scaling.follows_length)

    def __call__(self, x: Float[Array, "B T N H"], positions: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
        """Rotate the first ``dim`` dimensions of each head by angles proportional to the position.

        Args:
            x: queries or keys.
            positions: within the documents.
        """
        size = self.dim or x.shape[-1]
        if size >= x.shape[-1]:
            return self._rotate_all(x, positions)
        rotated, rest = jnp.split(x, [size], axis=-1)
        return jnp.concatenate([self._rotate_all(rotated, positions), rest], axis=-1)

    def _rotate_all(self, x: Array, positions: Array) -> Array:
        length = _document_lengths(positions)[..., None] if self.follows_length else 0
        frequencies = inverse_frequencies(x.shape[-1], self.theta, self.scaling, length)
        angles = positions.astype(jnp.float32)[..., None, None] * frequencies  # [B,T,1,H/2]
        cos, sin = jnp.cos(angles) * self.factor, jnp.sin(angles) * self.factor
        x32 = x.astype(jnp.float32)
        if self.interleaved:
            pairs = x32.reshape(*x.shape[:-1], -1, 2)
            first, second = pairs[..., 0], pairs[..., 1]
            rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
            return rotated.reshape(x.shape).astype(x.dtype)
        first, second = jnp.split(x32, 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def grow(
    query: Float[Array, "B T N H"], positions: Int[Array, "B T"], scaling: RopeScalingConfig
) -> Float[Array, "B T N H"]:
    """Scale queries by 1 + β·ln(1 + ⌊p/L⌋) at position p of a document, L being the context of pre-training, so that
    attention stays sharp over more keys (Mistral 4, ``transformers.models.mistral4``)."""
    times = jnp.log1p((positions // scaling.original_length).astype(jnp.float32))
    return query * (1 + scaling.query_growth * times)[..., None, None].astype(query.dtype)


def _document_lengths(positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Length of each token's document: 1 + the position of its last token in the row."""
    columns = positions.shape[1]
    ends = jnp.pad(positions[:, 1:] != positions[:, :-1] + 1, ((0, 0), (0, 1)), constant_values=True)
    last = jax.lax.cummin(jnp.where(ends, jnp.arange(columns), columns), axis=1, reverse=True)
    return jnp.take_along_axis(positions, last, axis=1) + 1


def inverse_frequencies(
    dim: int, theta: float, scaling: RopeScalingConfig, length: Int[Array, "*row"] | int = 0
) -> Float[Array, "*rows pairs"]:
    """Angle per position of each pair: theta^(-2i/dim), scaled.

    Args:
        dim: rotated dimensions of a head.
        theta: base.
        scaling: its kind and constants.
        length: of each token's document, on which "dynamic" and "longrope" depend beyond the original context. Keys
            that were cached while a text was shorter keep their angles, as in other libraries.
    """
    half = dim // 2
    exponents = -jnp.arange(half, dtype=jnp.float32) / half
    plain = theta**exponents
    if scaling.kind == "dynamic":
        longer = scaling.factor * jnp.maximum(jnp.asarray(length) / scaling.original_length, 1) - (scaling.factor - 1)
        return (theta * longer[..., None] ** (dim / (dim - 2))) ** exponents
    if scaling.kind == "longrope":
        is_long = jnp.asarray(length)[..., None] > scaling.original_length
        return plain / jnp.where(is_long, jnp.asarray(scaling.long_factors), jnp.asarray(scaling.short_factors))
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "yarn":
        share = _yarn_share(dim, theta, scaling)
        return plain / scaling.factor * share + plain * (1.0 - share)
    if scaling.kind == "llama3":
        return plain * _llama3_factor(np.asarray(theta ** (-np.arange(half) / half)), scaling)
    return plain


def attention_factor(scaling: RopeScalingConfig) -> float:
    """Factor of the rotated queries and keys (YaRN 2023, equation 22; with DeepSeek's two constants their quotient;
    LongRoPE 2024, section 3.3)."""
    if scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor:
        return scaling.attention_factor
    if scaling.kind == "longrope":
        return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_length))
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1·mscale·ln(factor) + 1, and 1 for a factor of at most 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_share(dim: int, theta: float, scaling: RopeScalingConfig) -> np.ndarray:
    """Share of each pair that is interpolated: 0 above beta_fast rotations in the original context, 1 below beta_slow
    (YaRN 2023, equations 17-19)."""

    def pair(rotations: float) -> float:
        return dim * math.log(scaling.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    return np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1).astype(np.float32)


def _llama3_factor(frequencies: np.ndarray, scaling: RopeScalingConfig) -> np.ndarray:
    """Factor of each frequency (Llama 3.1): 1/factor for long wavelengths, 1 for short ones, linear between."""
    rotations = scaling.original_length * frequencies / (2 * math.pi)
    smooth = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0, 1)
    return ((1 - smooth) / scaling.factor + smooth).astype(np.float32)


class RelativeBias(nnx.Module):
    """A number per head and bucket of distances, added to attention scores. One table serves all layers of a stack."""

    @classmethod
    def of(cls, config: ModelConfig, *, bidirectional: bool, rngs: nnx.Rngs) -> RelativeBias | None:
        """The table of a model with relative positions; None for one without."""
        buckets = GroupedQuery.of(config).buckets
        return cls(config, buckets, bidirectional=bidirectional, rngs=rngs) if buckets else None

    def __init__(self, config: ModelConfig, buckets: int, *, bidirectional: bool, rngs: nnx.Rngs):
        self.bidirectional = bidirectional
        self.max_distance = config.relative_max_distance
        shape = buckets, config.num_heads
        self.table = matrix(rngs, shape, REPLICATED, fan_in=config.d_model, scale=config.init_scale, inputs=0)

    def __call__(self, distance: Int[Array | np.ndarray, "*batch"]) -> Float[Array, "*batch N"]:
        """Biases of scores whose key lies ``distance`` tokens after the query."""
        num_buckets = self.table.shape[0]
        return self.table[...][relative_bucket(distance, num_buckets, self.max_distance, self.bidirectional)]

    def by_distance(self, length: int) -> Float[Array, "N D"]:
        """Biases of the distances 1 − T … T − 1, all that occur in rows of T tokens."""
        return self(np.arange(1 - length, length)).T


def relative_bucket(
    distance: Int[Array | np.ndarray, "*batch"], num_buckets: int, max_distance: int, bidirectional: bool
) -> Int[Array | np.ndarray, "*batch"]:
    """Bucket of a distance, key position minus query position.

    Half of the buckets hold one distance each, the others logarithmic ranges up to max_distance, and the last one all
    larger distances. Bidirectional: half of all buckets are for keys after the query; else these share bucket 0.
    """
    if bidirectional:
        num_buckets //= 2
    buckets = jnp.asarray(_buckets(num_buckets, max_distance))
    before, after = jnp.clip(-distance, 0, max_distance), jnp.clip(distance, 0, max_distance)
    if not bidirectional:
        return buckets[before]
    return jnp.where(jnp.asarray(distance) > 0, num_buckets + buckets[after], buckets[before])


@functools.lru_cache
def _buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """Buckets of the distances 0 … max_distance, in the float32 arithmetic of the published code."""
    exact = num_buckets // 2
    distance = np.arange(max_distance + 1, dtype=np.float32)
    octaves = np.log(np.maximum(distance, 1) / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    ranges = exact + (octaves * np.float32(num_buckets - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(ranges, num_buckets - 1)).astype(np.int32)


def bias_of_rows(by_distance: Float[Array, "N D"], queries: int) -> Float[Array, "N Q U"]:
    """Spread biases [N,Q+U−1] of distances into those of Q queries and U keys: [n,q,u] is by_distance[n,u−q+Q−1].

    Done by copying and reshaping, since the gradient of an indexed read is a slow scatter.
    """
    heads, count = by_distance.shape
    repeated = jnp.tile(jnp.pad(by_distance, ((0, 0), (0, 1))), (1, queries))
    # Rows one shorter than the period: each begins one element earlier in it. [N,Q·(Q+U)] → [N,Q,Q+U−1]
    return repeated[:, : queries * count].reshape(heads, queries, count)[:, :, queries - 1 :]
