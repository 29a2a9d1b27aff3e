"""Grouped-query attention with rotary positions or T5's relative ones, within a stack or from decoder to encoder."""

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
from moe.config.mixers import GroupedQuery
from moe.dispatch import quantized
from moe.layers.attention.attend import attend
from moe.layers.attention.cache import LayerCache, slots
from moe.layers.attention.largest import largest_scores
from moe.layers.attention.scoring import Rotation, Scoring, append_sink, grow
from moe.layers.inputs import KEEP_ALL, Dropout, Rows
from moe.layers.mixers.interface import MixerLayer
from moe.layers.norms import RMSNorm
from moe.layers.parameter import matrix, zeros
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.parallel.parameters import project, project_joined
from moe.parallel.partition_specs import HEADS_IN, HEADS_OUT


class Attention(MixerLayer):
    """Grouped-query attention; no attention between documents of one row.

    With buckets of distances, positions enter as biases of the scores and 1/sqrt(H) is part of the initial query matrix
    (T5). Attention to an encoder's output has no positions at all.
    """

    signals = ("largest_scores",)

    def __init__(self, config: ModelConfig, mixer: GroupedQuery, *, rngs: nnx.Rngs):
        super().__init__(config, mixer, rngs=rngs)
        c, m = config, mixer
        self.scale = m.scale or (1.0 if m.buckets else None)
        self.rotation, self.growth = None, None
        if m.rotated and not m.buckets:
            self.rotation = Rotation.of(c, interleaved=c.rope_interleaved, theta=m.theta)
            self.growth = c.rope_scaling if c.rope_scaling.query_growth and not m.theta else None
        query_fan_in = c.d_model * (m.head_dim if m.buckets else 1)
        heads, kv_heads = (m.heads, m.head_dim), (m.kv_heads, m.head_dim)
        self.query = matrix(rngs, (c.d_model, *heads), HEADS_IN, fan_in=query_fan_in, scale=c.init_scale)
        self.key = matrix(rngs, (c.d_model, *kv_heads), HEADS_IN, fan_in=c.d_model, scale=c.init_scale)
        self.create_values(rngs)
        if m.gated:
            self.gate = matrix(rngs, (c.d_model, *heads), HEADS_IN, fan_in=c.d_model, scale=c.init_scale)
        if m.bias != "none":
            if m.gated:
                self.gate_bias = zeros(heads, P("tensor", None))
            self.query_bias = zeros(heads, P("tensor", None))
            self.key_bias = zeros(kv_heads, P("tensor", None))
            self.value_bias = zeros(kv_heads, P("tensor", None))
        if m.bias == "all":
            self.out_bias = zeros((c.d_model,))
        self.sinks = zeros((m.heads,), partition_specs.SINKS) if m.sinks else None
        if m.qk_norm in ("head", "rotated"):
            self.query_norm = RMSNorm.of(c, m.head_dim)
            self.key_norm = RMSNorm.of(c, m.head_dim)
        elif m.qk_norm == "full":
            self.query_norm = RMSNorm.of(c, m.heads * m.head_dim)
            self.key_norm = RMSNorm.of(c, m.kv_heads * m.head_dim)

    def create_values(self, rngs: nnx.Rngs) -> None:
        """Draw the matrices of values and of the output; a derived layer may have others."""
        c, m = self.config, self.mixer
        d, scale = c.d_model, c.init_scale
        self.value = matrix(rngs, (d, m.kv_heads, m.head_dim), HEADS_IN, fan_in=d, scale=scale)
        out_fan_in = m.heads * m.head_dim
        self.out = matrix(rngs, (m.heads, m.head_dim, d), HEADS_OUT, fan_in=out_fan_in, scale=scale, inputs=2)

    @classmethod
    def empty_state(
        cls, config: ModelConfig, mixer: GroupedQuery, leading: tuple[int, int], length: int, *, ahead: int = 0
    ) -> LayerCache:
        """Slots of the keys and values of all heads."""
        heads = mixer.kv_heads, mixer.head_dim
        return LayerCache.empty(leading, slots(mixer.window, length, ahead), heads, heads, config.dtype)

    def prefill(
        self, x: Float[Array, "B T D"], rows: Rows, drop: Dropout = KEEP_ALL
    ) -> tuple[Float[Array, "B T N H"], tuple[Float[Array, "B T M H"], Float[Array, "B T M H"]]]:
        """Attend over whole rows, within each document; return the heads, and the keys and values to cache."""
        query, key, value = self.project_cached(x, rows.positions)
        scoring = Scoring(self.mixer.window, self.mixer.causal, rows.bias, rows.prefix, drop=drop)
        heads = self._attend(query, key, value, rows.segment_ids, rows.key_segment_ids, scoring=scoring)
        return heads, (key, value)

    def largest_scores(self, x: Float[Array, "B T D"], rows: Rows) -> Float[Array, " N"]:
        """Largest score of each head."""
        query, key, _ = self.project_cached(x, rows.positions)
        scoring = Scoring(self.mixer.window, self.mixer.causal, prefix=rows.prefix, scale=self.scale)
        return largest_scores(query, key, rows.segment_ids, rows.as_keys, scoring)

    @classmethod
    def score_factors(cls, mixer: GroupedQuery, factors: Float[Array, "*layers N"]) -> dict[str, Float[Array, ...]]:
        """The root of the smallest factor of the heads that share keys, for their queries and for these keys."""
        shared = factors.reshape(*factors.shape[:-1], mixer.kv_heads, -1)
        key = jnp.sqrt(jnp.min(shared, axis=-1))
        query = jnp.repeat(key, shared.shape[-1], axis=-1)
        parts = {"query": query[..., None], "key": key[..., None]}  # [...,N,1], as the biases [N,H]
        return {name: part[..., None, :, :] for name, part in parts.items()} | {
            f"{name}_bias": part for name, part in parts.items()
        }

    def fill(self, state: LayerCache, found: tuple[Array, Array], lengths: Int[Array, " B"]) -> LayerCache:
        """Cache the keys and values of prompts."""
        return state.fill(*found, lengths)

    def step(
        self, x: Float[Array, "B T D"], rows: Rows, state: LayerCache
    ) -> tuple[Float[Array, "B T N H"], LayerCache]:
        """Cache the keys and values of further tokens, then attend to the cache."""
        positions = rows.positions
        query, key, value = self.project_cached(x, positions)
        cache = state.extend(key, value, positions)
        assert cache.value is not None
        bias = None
        if rows.bias is not None:
            farthest = rows.bias.shape[1] // 2
            distance = jnp.clip(-cache.age(positions), -farthest, farthest)  # [B,T,W]
            bias = jnp.moveaxis(rows.bias[:, distance + farthest], 0, 1).astype(x.dtype)  # [N,B,T,W] → [B,N,T,W]
        mask = cache.seen(positions, self.mixer.window)
        return self.attend_cached(query, cache.key, cache.value, mask, bias), cache

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
        """Queries, rotated and scaled where they have positions."""
        query = self._rotated("query", x, positions)
        return query if positions is None or self.growth is None else grow(query, positions, self.growth)

    def project_keys(
        self, x: Float[Array, "B U D"], positions: Int[Array, "B U"] | None
    ) -> tuple[Float[Array, "B U M H"], Float[Array, "B U M H"]]:
        """Keys and values; keys are rotated where they have positions."""
        return self._rotated("key", x, positions), self._finish(self.project_heads("value", x), None)

    def _rotated(self, name: str, x: Array, positions: Array | None) -> Array:
        """Queries or keys, normalised before the rotation or after it."""
        heads, kind = self.project_heads(name, x), self.mixer.qk_norm
        if kind == "none":
            return self._finish(heads, positions)
        norm = self.query_norm if name == "query" else self.key_norm
        if kind == "rotated":
            return norm(self._finish(heads, positions))
        return self._finish(self._normalise(norm, heads), positions)

    def project_heads(self, name: str, x: Array) -> Array:
        """[B,T,D] → heads by the matrix and the bias of this name."""
        heads = project_in(x, getattr(self, name), self.precision)
        if self.mixer.bias == "none":
            return heads
        return _add_bias(heads, getattr(self, f"{name}_bias"))

    def _finish(self, heads: Array, positions: Array | None) -> Array:
        """Clip and rotate."""
        clip = self.mixer.clip
        if clip:
            heads = jnp.clip(heads, -clip, clip)
        if positions is not None and self.rotation is not None:
            heads = self.rotation(heads, positions)
        return constrain(heads, partition_specs.HEADS)

    def join(self, heads: Float[Array, "B T N H"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Output projection of all heads, gated by the layer's input if the mixer is."""
        if self.mixer.gated:
            heads *= jax.nn.sigmoid(self.project_heads("gate", x))
        y = project_in(heads, self.out, self.precision)
        return _add_bias(y, self.out_bias) if self.mixer.bias == "all" else y

    def _normalise(self, norm: RMSNorm, heads: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """QK-norm: per head, or over all heads at once."""
        if self.mixer.qk_norm == "head":
            return norm(heads)
        # [B,T,N,H] → [B,T,N·H] → [B,T,N,H]
        return norm(heads.reshape(*heads.shape[:2], -1)).reshape(heads.shape)


def project_in(x: Array, weights: nnx.Param[Array], precision: str) -> Array:
    """:func:`moe.parallel.parameters.project`, with factors quantised to this precision unless it is none."""
    if precision == "none":
        return project(x, weights)
    return project_joined(x, weights, functools.partial(quantized.matmul, precision=precision))


def _add_bias(x: Float[Array, "*batch"], bias: nnx.Param[Array]) -> Float[Array, "*batch"]:
    """Add a bias in float32. In bfloat16 its gradient, a sum over all tokens, would be rounded at every addition."""
    return (x.astype(jnp.float32) + bias[...].astype(jnp.float32)).astype(x.dtype)
