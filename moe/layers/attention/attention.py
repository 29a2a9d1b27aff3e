"""Grouped-query attention with rotary positions or T5's relative ones, within a stack or from decoder to encoder, and
multi-head latent attention."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from moe.config import ModelConfig
from moe.dispatch import quantized
from moe.layers.attention.attend import attend
from moe.layers.attention.scoring import Scoring, append_sink, rotate, yarn_mscale
from moe.layers.basic import KEEP_ALL, Dropout, RMSNorm, Rows, matrix, zeros
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.parallel.parameters import gather_for_matmul, project, project_joined
from moe.parallel.partition_specs import HEADS_IN, HEADS_OUT, STORED


class Attention(nnx.Module):
    """Grouped-query attention; no attention between documents of one row.

    With ``relative_buckets``, positions enter as biases of the scores and 1/sqrt(H) is part of the initial query matrix
    (T5). Attention to an encoder's output has no positions at all.
    """

    def __init__(self, config: ModelConfig, *, window: int, causal: bool = True, rngs: nnx.Rngs):
        c = config
        self.config = config
        self.window = window
        self.causal = causal
        self.scale = c.attention_scale or (1.0 if c.relative_buckets else None)
        query_fan_in = c.d_model * (c.head_dim if c.relative_buckets else 1)
        heads, kv_heads = (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)
        self.query = matrix(rngs, (c.d_model, *heads), HEADS_IN, fan_in=query_fan_in, scale=c.init_scale)
        self.key = matrix(rngs, (c.d_model, *kv_heads), HEADS_IN, fan_in=c.d_model, scale=c.init_scale)
        self.value = matrix(rngs, (c.d_model, *kv_heads), HEADS_IN, fan_in=c.d_model, scale=c.init_scale)
        out_fan_in = c.num_heads * c.head_dim
        self.out = matrix(rngs, (*heads, c.d_model), HEADS_OUT, fan_in=out_fan_in, scale=c.init_scale, inputs=2)
        if c.gated_attention:
            self.gate = matrix(rngs, (c.d_model, *heads), HEADS_IN, fan_in=c.d_model, scale=c.init_scale)
        if c.attention_bias != "none":
            if c.gated_attention:
                self.gate_bias = zeros(heads, P("tensor", None))
            self.query_bias = zeros(heads, P("tensor", None))
            self.key_bias = zeros(kv_heads, P("tensor", None))
            self.value_bias = zeros(kv_heads, P("tensor", None))
        if c.attention_bias == "all":
            self.out_bias = zeros((c.d_model,))
        self.sinks = zeros((c.num_heads,), partition_specs.SINKS) if c.attention_sinks else None
        if c.qk_norm in ("head", "rotated"):
            self.query_norm = RMSNorm.of(c, c.head_dim)
            self.key_norm = RMSNorm.of(c, c.head_dim)
        elif c.qk_norm == "full":
            self.query_norm = RMSNorm.of(c, c.num_heads * c.head_dim)
            self.key_norm = RMSNorm.of(c, c.num_kv_heads * c.head_dim)

    @staticmethod
    def cache_shapes(config: ModelConfig) -> tuple[tuple[int, int], tuple[int, int]]:
        """[heads, dim] of the key and of the value that are cached for a position."""
        return (config.num_kv_heads, config.head_dim), (config.num_kv_heads, config.head_dim)

    def prefill(
        self, x: Float[Array, "B T D"], rows: Rows, bias: Float[Array, "N P"] | None = None, drop: Dropout = KEEP_ALL
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T M H"], Float[Array, "B T M H"]]:
        """Attend over whole rows, within each document; return the heads, and the keys and values to cache.

        ``bias``: relative position biases by distance.
        """
        query, key, value = self.project_cached(x, rows.positions)
        scoring = Scoring(self.window, self.causal, bias, rows.prefix, drop=drop)
        return self._attend(query, key, value, rows.segment_ids, rows.key_segment_ids, scoring=scoring), key, value

    def attend_to(
        self,
        x: Float[Array, "B T D"],
        encoded: Float[Array, "B U D"],
        segment_ids: Int[Array, "B T"],
        encoded_segment_ids: Int[Array, "B U"],
        drop: Dropout = KEEP_ALL,
    ) -> Float[Array, "B T N H"]:
        """Attend from each document to the encoder's output for the document of the same number."""
        query, (key, value) = self.project_query(x, None), self.project_keys(encoded, None)
        scoring = Scoring(causal=False, drop=drop)
        return self._attend(query, key, value, segment_ids, encoded_segment_ids, scoring=scoring)

    def _attend(self, *arrays: Any, scoring: Scoring) -> Float[Array, "B T N H"]:
        """:func:`moe.layers.attention.attend.attend` with what the config and the parameters give."""
        sinks = None if self.sinks is None else self.sinks[...]
        scoring = dataclasses.replace(scoring, scale=self.scale, sinks=sinks)
        return attend(*arrays, kind=self.config.attention, scoring=scoring)

    def attend_cached(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B W M H"],
        value: Float[Array, "B W M H"],
        mask: Bool[Array, "B 1 T W"],
        bias: Float[Array, "B N T W"] | None = None,
    ) -> Float[Array, "B T N H"]:
        """Attend to cached keys and values."""
        if self.sinks is None:
            return jax.nn.dot_product_attention(query, key, value, bias, mask, scale=self.scale)
        size, scale = query.shape[-1], Scoring(scale=self.scale).factor(query.shape[-1])
        query, key, value, mask, bias = append_sink(self.sinks[...], query, key, value, mask, bias, scale)
        return jax.nn.dot_product_attention(query, key, value, bias, mask, scale=scale)[..., :size]

    def project_cached(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T M H"], Float[Array, "B T M H"]]:
        """Query, key and value; query and key are rotated."""
        return self.project_query(x, positions), *self.project_keys(x, positions)

    def project_query(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"] | None) -> Float[Array, "B T N H"]:
        """Queries, rotated where they have positions."""
        return self._rotated("query", x, positions)

    def project_keys(
        self, x: Float[Array, "B U D"], positions: Int[Array, "B U"] | None
    ) -> tuple[Float[Array, "B U M H"], Float[Array, "B U M H"]]:
        """Keys and values; keys are rotated where they have positions."""
        return self._rotated("key", x, positions), self._finish(self._project("value", x), None)

    def _rotated(self, name: str, x: Array, positions: Array | None) -> Array:
        """Queries or keys, normalised before the rotation or after it."""
        heads, kind = self._project(name, x), self.config.qk_norm
        if kind == "none":
            return self._finish(heads, positions)
        norm = self.query_norm if name == "query" else self.key_norm
        if kind == "rotated":
            return norm(self._finish(heads, positions))
        return self._finish(self._normalise(norm, heads), positions)

    def _project(self, name: str, x: Array) -> Array:
        """[B,T,D] → heads by the matrix and the bias of this name."""
        heads = _project(x, getattr(self, name), self.config)
        if self.config.attention_bias == "none":
            return heads
        return _add_bias(heads, getattr(self, f"{name}_bias"))

    def _finish(self, heads: Array, positions: Array | None) -> Array:
        """Clip and rotate."""
        c = self.config
        if c.clip_qkv:
            heads = jnp.clip(heads, -c.clip_qkv, c.clip_qkv)
        if positions is not None and not c.relative_buckets:
            heads = rotate(heads, positions, c, interleaved=c.rope_interleaved)
        return constrain(heads, partition_specs.HEADS)

    def join(self, heads: Float[Array, "B T N H"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Output projection of all heads, gated by the layer's input where ``model.gated_attention`` is set."""
        if self.config.gated_attention:
            heads *= jax.nn.sigmoid(self._project("gate", x))
        y = _project(heads, self.out, self.config)
        return _add_bias(y, self.out_bias) if self.config.attention_bias == "all" else y

    def _normalise(self, norm: RMSNorm, heads: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """QK-norm: per head, or over all heads at once."""
        if self.config.qk_norm == "head":
            return norm(heads)
        # [B,T,N,H] → [B,T,N·H] → [B,T,N,H]
        return norm(heads.reshape(*heads.shape[:2], -1)).reshape(heads.shape)


def _project(x: Array, weights: nnx.Param[Array], config: ModelConfig) -> Array:
    """:func:`moe.parallel.parameters.project`, with quantised factors where the config asks for them."""
    precision = config.low_precision_everywhere
    if precision == "none":
        return project(x, weights)
    return project_joined(x, weights, functools.partial(quantized.matmul, precision=precision))


def _add_bias(x: Float[Array, "*batch"], bias: nnx.Param[Array]) -> Float[Array, "*batch"]:
    """Add a bias in float32. In bfloat16 its gradient, a sum over all tokens, would be rounded at every addition."""
    return (x.astype(jnp.float32) + bias[...].astype(jnp.float32)).astype(x.dtype)


#: Epsilon of the norms of the compressed vectors, in the published code independent of ``model.norm_eps``.
LATENT_NORM_EPS = 1e-6


class LatentAttention(nnx.Module):
    """Causal attention whose keys and values are up-projections of a latent of ``kv_lora_rank`` dimensions (multi-head
    latent attention, DeepSeek-V2 2024, section 2.1).

    A head of queries and keys has ``head_dim`` dimensions, of which the last ``rope_dim`` are rotated; the rotated part
    of the key is one vector for all heads. Documents packed into one row never attend to each other.
    """

    def __init__(self, config: ModelConfig, *, window: int, rngs: nnx.Rngs):
        c = config
        self.config = config
        self.window = window
        self.unrotated_dim = c.head_dim - c.rope_dim
        heads, scale = (c.num_heads, c.head_dim), c.init_scale

        def from_model(rank: int) -> nnx.Param[Array]:
            return matrix(rngs, (c.d_model, rank), P(STORED, None), fan_in=c.d_model, scale=scale)

        if c.q_lora_rank:
            self.query_down = from_model(c.q_lora_rank)
            self.query_latent_norm = RMSNorm(c.q_lora_rank, LATENT_NORM_EPS)
            self.query_up = matrix(rngs, (c.q_lora_rank, *heads), HEADS_IN, fan_in=c.q_lora_rank, scale=scale)
        else:
            self.query = matrix(rngs, (c.d_model, *heads), HEADS_IN, fan_in=c.d_model, scale=scale)
        self.kv_down = from_model(c.kv_lora_rank + c.rope_dim)
        self.kv_latent_norm = RMSNorm(c.kv_lora_rank, LATENT_NORM_EPS)
        up_shape = (c.kv_lora_rank, c.num_heads, self.unrotated_dim + c.value_dim)
        self.kv_up = matrix(rngs, up_shape, HEADS_IN, fan_in=c.kv_lora_rank, scale=scale)
        out_shape = (c.num_heads, c.value_dim, c.d_model)
        self.out = matrix(rngs, out_shape, HEADS_OUT, fan_in=c.num_heads * c.value_dim, scale=scale, inputs=2)

    @staticmethod
    def cache_shapes(config: ModelConfig) -> tuple[tuple[int, int], None]:
        """[heads, dim] of what is cached for a position: the latent and the rotated key, no values."""
        return (1, config.kv_lora_rank + config.rope_dim), None

    def prefill(
        self, x: Float[Array, "B T D"], rows: Rows, bias: Array | None = None, drop: Dropout = KEEP_ALL
    ) -> tuple[Float[Array, "B T N V"], Float[Array, "B T 1 R"], None]:
        """Attend over expanded keys and values; return the heads and what is cached."""
        rows.require_plain(bias)
        c = self.config
        query, latent = self._query(x, rows.positions), self._latent(x, rows.positions)
        key_up, value_up = jnp.split(gather_for_matmul(self.kv_up, x.dtype), [self.unrotated_dim], axis=-1)
        # Keys are one product with the whole latent, in which an identity matrix copies the rotated part to every head:
        # a separate broadcast and concatenation would each be a pass over all keys.
        copies = jnp.broadcast_to(jnp.eye(c.rope_dim, dtype=x.dtype)[:, None], (c.rope_dim, c.num_heads, c.rope_dim))
        key_up = jnp.pad(key_up, ((0, 0), (0, 0), (0, c.rope_dim)))
        key_up = jnp.concatenate([key_up, jnp.pad(copies, ((0, 0), (0, 0), (self.unrotated_dim, 0)))])
        key = jnp.einsum("buor,rnh->bunh", latent, key_up)
        value = jnp.einsum("buor,rnh->bunh", latent[..., : c.kv_lora_rank], value_up)
        query, key, value = (constrain(heads, partition_specs.HEADS) for heads in (query, key, value))
        scoring = Scoring(window=self.window, drop=drop, scale=self._score_scale())
        return attend(query, key, value, rows.segment_ids, kind=c.attention, scoring=scoring), latent, None

    def project_cached(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N R"], Float[Array, "B T 1 R"], None]:
        """Queries that attend to latents directly, with the up-projection of the keys absorbed, and the latents."""
        query, rotated = jnp.split(self._query(x, positions), [self.unrotated_dim], axis=-1)
        key_up = gather_for_matmul(self.kv_up, x.dtype)[..., : self.unrotated_dim]
        query = jnp.concatenate([jnp.einsum("btnh,rnh->btnr", query, key_up), rotated], axis=-1)
        return query, self._latent(x, positions), None

    def attend_cached(
        self, query: Float[Array, "B T N R"], key: Float[Array, "B W 1 R"], value: None, mask: Bool[Array, "B 1 T W"]
    ) -> Float[Array, "B T N V"]:
        """Attend to cached latents; the up-projection of the values comes last."""
        del value
        heads = jax.nn.dot_product_attention(query, key, key, mask=mask, scale=self._score_scale())
        value_up = gather_for_matmul(self.kv_up, query.dtype)[..., self.unrotated_dim :]
        return jnp.einsum("btnr,rnh->btnh", heads[..., : self.config.kv_lora_rank], value_up)

    def join(self, heads: Float[Array, "B T N V"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Project the heads back to the model dimension; the layer's input is not used."""
        del x
        return _project(heads, self.out, self.config)

    def _query(self, x: Array, positions: Array) -> Array:
        """[B,T,D] → rotated queries [B,T,N,H]."""
        if self.config.q_lora_rank:
            x, up = self.query_latent_norm(self._down(x, self.query_down)), self.query_up
        else:
            up = self.query
        # The matrix is split rather than its product, whose parts would each be copied.
        ups = jnp.split(gather_for_matmul(up, x.dtype), [self.unrotated_dim], axis=-1)
        query, rotated = (self._up(x, part) for part in (ups[0], self._in_halves(ups[1])))
        query = jnp.concatenate([query, rotate(rotated, positions, self.config)], axis=-1)
        return constrain(query, partition_specs.HEADS)

    def _down(self, x: Array, weights: nnx.Param[Array]) -> Array:
        """[B,T,D] → [B,T,rank]."""
        by = quantized.matmul_in(self.config.low_precision_everywhere, jnp.matmul)
        return by(x, gather_for_matmul(weights, x.dtype))

    def _up(self, x: Array, matrix: Array) -> Array:
        """Queries or a part of them by a gathered matrix [rank,N,H]: [B,T,rank] → [B,T,N,H]."""
        precision = self.config.low_precision_everywhere
        if precision == "none":
            return jnp.tensordot(x, matrix, 1)
        joined = quantized.matmul(x, matrix.reshape(matrix.shape[0], -1), precision)
        return joined.reshape(*x.shape[:-1], *matrix.shape[1:])

    def _in_halves(self, rotated: Array) -> Array:
        """Reorder dimensions to be rotated from pairs (2i, 2i + 1), if the checkpoint has these, to (i, i + H/2), which
        keeps the products of queries and keys. Matrices are reordered instead of their products, which are larger."""
        if not self.config.rope_interleaved:
            return rotated
        return jnp.concatenate([rotated[..., ::2], rotated[..., 1::2]], axis=-1)

    def _latent(self, x: Array, positions: Array) -> Array:
        """[B,T,D] → [B,T,1,kv_lora_rank + rope_dim]: the normalised latent and the rotated key."""
        latent = self._down(x, self.kv_down)
        compressed, key = jnp.split(latent, [self.config.kv_lora_rank], axis=-1)
        key = rotate(self._in_halves(key)[:, :, None], positions, self.config)
        return jnp.concatenate([self.kv_latent_norm(compressed)[:, :, None], key], axis=-1)

    def _score_scale(self) -> float:
        """Factor of query·key: 1/sqrt(H), under YaRN times its squared temperature (DeepSeek-V2, section 3.1.4)."""
        scaling, scale = self.config.rope_scaling, self.config.head_dim**-0.5
        if scaling.kind == "none" or not scaling.mscale_all_dim:
            return scale
        return scale * yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
