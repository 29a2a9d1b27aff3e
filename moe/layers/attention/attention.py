"""Causal grouped-query attention with rotary positions."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe.config import ModelConfig
from moe.layers.attention.attend import attend
from moe.layers.attention.masked import masked_attention
from moe.layers.attention.rotary import rotate
from moe.layers.norms import RMSNorm
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.parallel.weights import gather_for_matmul, matrix, zeros


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions; no attention between documents of one row."""

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
        self.sinks = zeros((c.num_heads,)) if c.attention_sinks else None
        if c.qk_norm == "head":
            self.query_norm = RMSNorm(c.head_dim, c.norm_eps)
            self.key_norm = RMSNorm(c.head_dim, c.norm_eps)
        elif c.qk_norm == "full":
            self.query_norm = RMSNorm(c.num_heads * c.head_dim, c.norm_eps)
            self.key_norm = RMSNorm(c.num_kv_heads * c.head_dim, c.norm_eps)

    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Attend within each document.

        Args:
            x: normalised activations.
            segment_ids: the document of each token; 0 is padding.
            positions: position within the document.
        """
        return self.join(self.prefill(x, segment_ids, positions)[0])

    @staticmethod
    def cache_shapes(config: ModelConfig) -> tuple[tuple[int, int], tuple[int, int]]:
        """[heads, dim] of the key and of the value that are cached for a position."""
        return (config.num_kv_heads, config.head_dim), (config.num_kv_heads, config.head_dim)

    def prefill(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T M H"], Float[Array, "B T M H"]]:
        """Attend over whole rows; return the heads, and the keys and values to cache."""
        query, key, value = self.project_cached(x, positions)
        kind, sinks = self.config.attention, self._sinks()
        return attend(query, key, value, segment_ids, window=self.window, kind=kind, sinks=sinks), key, value

    def attend_cached(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B W M H"],
        value: Float[Array, "B W M H"],
        mask: Bool[Array, "B 1 T W"],
    ) -> Float[Array, "B T N H"]:
        """Attend to cached keys and values."""
        return masked_attention(query, key, value, mask, self._sinks())

    def project_cached(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T M H"], Float[Array, "B T M H"]]:
        """Query, key and value; query and key are rotated."""
        c = self.config
        query = jnp.einsum("btd,dnh->btnh", x, gather_for_matmul("attention.query", self.query[...], x.dtype))
        key = jnp.einsum("bud,dmh->bumh", x, gather_for_matmul("attention.key", self.key[...], x.dtype))
        value = jnp.einsum("bud,dmh->bumh", x, gather_for_matmul("attention.value", self.value[...], x.dtype))
        if c.attention_bias != "none":
            query = query + self.query_bias[...].astype(x.dtype)
            key = key + self.key_bias[...].astype(x.dtype)
            value = value + self.value_bias[...].astype(x.dtype)
        if c.qk_norm != "none":
            query, key = self._normalise(self.query_norm, query), self._normalise(self.key_norm, key)
        if c.clip_qkv:
            query, key, value = (jnp.clip(heads, -c.clip_qkv, c.clip_qkv) for heads in (query, key, value))
        query = constrain(rotate(query, positions, c), partition_specs.HEADS)
        key = constrain(rotate(key, positions, c), partition_specs.HEADS)
        value = constrain(value, partition_specs.HEADS)
        return query, key, value

    def join(self, heads: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """Output projection of all heads."""
        y = jnp.einsum("btnh,nhd->btd", heads, gather_for_matmul("attention.out", self.out[...], heads.dtype))
        return y + self.out_bias[...].astype(y.dtype) if self.config.attention_bias == "all" else y

    def _sinks(self) -> Float[Array, " N"] | None:
        return None if self.sinks is None else self.sinks[...]

    def _normalise(self, norm: RMSNorm, heads: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """QK-norm: per head, or over all heads at once."""
        if self.config.qk_norm == "head":
            return norm(heads)
        # [B,T,N,H] → [B,T,N·H] → [B,T,N,H]
        return norm(heads.reshape(*heads.shape[:2], -1)).reshape(heads.shape)
