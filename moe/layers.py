"""The dense parts of a Transformer block: RMSNorm, rotary attention, FFN, embeddings.

In and out: activations [B,T,D] in the compute dtype. Parameters are float32 and go through
:func:`moe.sharding.use`, which casts them and gathers what is stored split.

Letters: B batch, T sequence, U key positions, D model dim, F hidden dim, N query heads, M key/value heads,
H head dim, V vocab.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe import sharding
from moe.attention import attend
from moe.config import ModelConfig

#: geglu is T5's, by the tanh approximation; geglu_exact is by the error function.
GATED_ACTIVATIONS = {
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
    "geglu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "reglu": jax.nn.relu,
}
PLAIN_ACTIVATIONS = {"gelu": jax.nn.gelu, "relu": jax.nn.relu}


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, scale: float) -> nnx.Param[Array]:
    """A float32 parameter drawn from a truncated normal, sigma = sqrt(scale / fan_in), cut at two sigma
    (Switch 2021, section 2.4)."""
    return nnx.Param(jax.nn.initializers.truncated_normal((scale / fan_in) ** 0.5)(rngs.params(), shape, jnp.float32))


def zeros(shape: tuple[int, ...]) -> nnx.Param[Array]:
    """A float32 parameter of zeros: a bias."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + epsilon) · scale over the last axis, computed in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        """[...,D] → [...,D], same dtype."""
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * self.scale[...]).astype(x.dtype)


def rotate(x: Array, positions: Array, theta: float) -> Array:
    """Rotary positions, halves paired as (i, i + H/2) (RoFormer 2021, in the layout of open checkpoints).

    Args:
        x: [B,T,N,H], H even.
        positions: [B,T] int32.
        theta: base; frequency i is theta^(-2i/H).
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies  # [B,T,1,H/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions; documents packed into one row never see each other."""

    def __init__(self, config: ModelConfig, *, window: int, rngs: nnx.Rngs):
        c = config
        self.config = config
        self.window = window
        self.query = matrix(rngs, (c.d_model, c.num_heads, c.head_dim), c.d_model, c.init_scale)
        self.key = matrix(rngs, (c.d_model, c.num_kv_heads, c.head_dim), c.d_model, c.init_scale)
        self.value = matrix(rngs, (c.d_model, c.num_kv_heads, c.head_dim), c.d_model, c.init_scale)
        self.out = matrix(rngs, (c.num_heads, c.head_dim, c.d_model), c.num_heads * c.head_dim, c.init_scale)
        if c.attention_bias != "none":
            self.query_bias = zeros((c.num_heads, c.head_dim))
            self.key_bias = zeros((c.num_kv_heads, c.head_dim))
            self.value_bias = zeros((c.num_kv_heads, c.head_dim))
        if c.attention_bias == "all":
            self.out_bias = zeros((c.d_model,))
        if c.qk_norm == "head":
            self.query_norm = RMSNorm(c.head_dim, c.norm_eps)
            self.key_norm = RMSNorm(c.head_dim, c.norm_eps)
        elif c.qk_norm == "full":
            self.query_norm = RMSNorm(c.num_heads * c.head_dim, c.norm_eps)
            self.key_norm = RMSNorm(c.num_kv_heads * c.head_dim, c.norm_eps)

    def __call__(self, x: Array, segment_ids: Array, positions: Array) -> Array:
        """[B,T,D] → [B,T,D].

        Args:
            x: [B,T,D].
            segment_ids: [B,T] int32, the document of each token; 0 is padding.
            positions: [B,T] int32, position within the document.
        """
        query, key, value = self.project(x, positions)
        return self.join(attend(query, key, value, segment_ids, window=self.window, kind=self.config.attention))

    def project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """[B,T,D] and positions [B,T] → query [B,T,N,H], key and value [B,T,M,H], rotated."""
        c = self.config
        query = jnp.einsum("btd,dnh->btnh", x, sharding.use("attention.query", self.query[...], x.dtype))
        key = jnp.einsum("bud,dmh->bumh", x, sharding.use("attention.key", self.key[...], x.dtype))
        value = jnp.einsum("bud,dmh->bumh", x, sharding.use("attention.value", self.value[...], x.dtype))
        if c.attention_bias != "none":
            query = query + self.query_bias[...].astype(x.dtype)
            key = key + self.key_bias[...].astype(x.dtype)
            value = value + self.value_bias[...].astype(x.dtype)
        if c.qk_norm != "none":
            query, key = self._normalise(self.query_norm, query), self._normalise(self.key_norm, key)
        if c.clip_qkv:
            query, key, value = (jnp.clip(heads, -c.clip_qkv, c.clip_qkv) for heads in (query, key, value))
        query = sharding.constrain(rotate(query, positions, c.rope_theta), sharding.HEADS)
        key = sharding.constrain(rotate(key, positions, c.rope_theta), sharding.HEADS)
        value = sharding.constrain(value, sharding.HEADS)
        return query, key, value

    def join(self, heads: Array) -> Array:
        """[B,T,N,H] → [B,T,D]."""
        y = jnp.einsum("btnh,nhd->btd", heads, sharding.use("attention.out", self.out[...], heads.dtype))
        return y + self.out_bias[...].astype(y.dtype) if self.config.attention_bias == "all" else y

    def _normalise(self, norm: RMSNorm, heads: Array) -> Array:
        """QK-norm of [B,T,N,H]: per head, or over all heads at once."""
        if self.config.qk_norm == "head":
            return norm(heads)
        # [B,T,N,H] → [B,T,N·H] → [B,T,N,H]
        return norm(heads.reshape(*heads.shape[:2], -1)).reshape(heads.shape)


def activate(activation: str, up: Array, gate: Array | None) -> Array:
    """The hidden activation of an FFN: act(gate)·up where gated (Shazeer 2020), act(up) otherwise."""
    if gate is not None:
        return GATED_ACTIVATIONS[activation](gate) * up
    return PLAIN_ACTIVATIONS[activation](up)


class DenseFFN(nnx.Module):
    """down(act(gate(x))·up(x)), or down(act(up(x))) for a plain activation. No biases."""

    def __init__(self, config: ModelConfig, d_ff: int, *, rngs: nnx.Rngs):
        d, f = config.d_model, d_ff
        self.activation = config.activation
        self.up = matrix(rngs, (d, f), d, config.init_scale)
        self.down = matrix(rngs, (f, d), f, config.init_scale)
        self.gate = matrix(rngs, (d, f), d, config.init_scale) if self.activation in GATED_ACTIVATIONS else None

    def __call__(self, x: Array) -> Array:
        """[B,T,D] → [B,T,D]."""
        up = x @ sharding.use("dense.up", self.up[...], x.dtype)
        gate = None if self.gate is None else x @ sharding.use("dense.gate", self.gate[...], x.dtype)
        return activate(self.activation, up, gate) @ sharding.use("dense.down", self.down[...], x.dtype)


class Embedding(nnx.Module):
    """Tokens to vectors, and, where tied, vectors back to logits."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.table = matrix(rngs, (config.vocab_size, config.d_model), config.d_model, config.init_scale)

    def __call__(self, tokens: Array, dtype: jnp.dtype) -> Array:
        """[B,T] int32 → [B,T,D]."""
        # Pinned here, the table's gradient is scatter-added where its tokens are and only then split over D; XLA, given
        # the final split alone, brings every token's gradient to every device.
        table = sharding.constrain(sharding.use("embedding.table", self.table[...], dtype), sharding.TABLE)
        return sharding.constrain(table[tokens], sharding.BATCH)

    def matrix(self, dtype: jnp.dtype) -> Array:
        """[V,D] in this dtype, for tied logits."""
        return sharding.use("embedding.table", self.table[...], dtype)


class Unembedding(nnx.Module):
    """Vectors to logits."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.kernel = matrix(rngs, (config.d_model, config.vocab_size), config.d_model, config.init_scale)

    def matrix(self, dtype: jnp.dtype) -> Array:
        """[D,V] in this dtype."""
        return sharding.use("unembedding.kernel", self.kernel[...], dtype)
