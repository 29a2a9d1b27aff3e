"""Keys and values of the tokens so far: a prompt fills them, and each next token costs one position, not all.

In: a :class:`moe.models.decoder.Transformer` and prompts of unequal length, each beginning at column 0. Out: the logits of
each row's next token. A layer with a sliding window keeps its last W positions in a ring: position p lies in slot
p mod W.

Letters: B rows, T columns of the prompts, W slots, N query heads, M key/value heads, H head dim, D model dim, V vocab,
R repeats of a unit of layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe.config import ModelConfig
from moe.layers.attention.attend import attend
from moe.models.block import Block
from moe.models.decoder import Transformer
from moe.models.stack import segments
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Of one layer; stacked over the repeats of its unit it gains a leading axis.

    Attributes:
        key: [B,W,M,H], rotated.
        value: [B,W,M,H].
        position: [B,W] int32, whose key lies there; -1: nobody's.
    """

    key: Array
    value: Array
    position: Array


#: Per segment, per block of its unit: a stacked LayerCache.
Cache = list[list[LayerCache]]


def empty(config: ModelConfig, rows: int, length: int) -> Cache:
    """Room for that many positions a row, or for the window where a layer has a shorter one."""

    def layer(window: int, repeats: int) -> LayerCache:
        slots = min(window, length) if window else length
        shape = (repeats, rows, slots, config.num_kv_heads, config.head_dim)
        heads = constrain(jnp.zeros(shape, config.dtype), partition_specs.CACHE)
        return LayerCache(heads, heads, jnp.full(shape[:3], -1, jnp.int32))

    return [[layer(kind.window, repeats) for kind in unit] for unit, repeats in segments(config)]


def prefill(model: Transformer, tokens: Array, lengths: Array, cache: Cache) -> tuple[Array, Cache]:
    """Runs the prompts.

    Args:
        model: any.
        tokens: [B,T] int32; row b's prompt is its first lengths[b] tokens.
        lengths: [B] int32, at least 1.
        cache: from :func:`empty`.

    Returns:
        logits [B,V] of the token after each prompt, and the filled cache.
    """
    columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = jnp.broadcast_to(columns, tokens.shape)
    segment_ids = (columns < lengths[:, None]).astype(jnp.int32)

    def attention(block: Block, x: Array, cache: LayerCache) -> tuple[Array, LayerCache]:
        query, key, value = block.attention.project(x, positions)
        kind = block.attention.config.attention
        heads = attend(query, key, value, segment_ids, window=block.attention.window, kind=kind)
        return heads, _fill(cache, key, value, lengths)

    x, cache = _run(model, tokens, segment_ids, cache, attention)
    # [B,T,D] → [B,1,D]: the last token of each prompt
    return _logits(model, jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)), cache


def decode(model: Transformer, tokens: Array, positions: Array, active: Array, cache: Cache) -> tuple[Array, Cache]:
    """Runs one more token a row.

    Args:
        model: any.
        tokens: [B] int32.
        positions: [B] int32, of those tokens.
        active: [B] bool; rows that are done go through no expert.
        cache: of all tokens before.

    Returns:
        logits [B,V] of the token after it, and the cache with it.
    """
    segment_ids = active.astype(jnp.int32)[:, None]

    def attention(block: Block, x: Array, cache: LayerCache) -> tuple[Array, LayerCache]:
        query, key, value = block.attention.project(x, positions[:, None])
        cache = _append(cache, key, value, positions)
        age = positions[:, None] - cache.position  # [B,W]
        seen = (cache.position >= 0) & (age >= 0)
        if block.attention.window:
            seen &= age < block.attention.window
        heads = jax.nn.dot_product_attention(query, cache.key, cache.value, mask=seen[:, None, None])
        return heads, cache

    x, cache = _run(model, tokens[:, None], segment_ids, cache, attention)
    return _logits(model, x), cache


def _fill(cache: LayerCache, key: Array, value: Array, lengths: Array) -> LayerCache:
    """The last W positions of each row, each in its slot."""
    slots = cache.position.shape[1]
    last = lengths[:, None] - 1
    # The newest position that is slot's number modulo W; negative where the prompt is too short to reach the slot.
    position = last - (last - jnp.arange(slots)) % slots  # [B,W]
    index = jnp.maximum(position, 0)[..., None, None]
    key, value = (jnp.take_along_axis(heads, index, axis=1).astype(cache.key.dtype) for heads in (key, value))
    return LayerCache(key, value, jnp.maximum(position, -1))


def _append(cache: LayerCache, key: Array, value: Array, positions: Array) -> LayerCache:
    """Position p of each row into slot p mod W. A choice by slot, not a scatter: rows stay on their devices."""
    slots = cache.position.shape[1]
    here = jnp.arange(slots) == (positions % slots)[:, None]  # [B,W]
    return LayerCache(
        jnp.where(here[..., None, None], key.astype(cache.key.dtype), cache.key),
        jnp.where(here[..., None, None], value.astype(cache.value.dtype), cache.value),
        jnp.where(here, positions[:, None], cache.position),
    )


def _run(
    model: Transformer,
    tokens: Array,
    segment_ids: Array,
    cache: Cache,
    attention: Callable[[Block, Array, LayerCache], tuple[Array, LayerCache]],
) -> tuple[Array, Cache]:
    """All blocks with this attention: tokens [B,T] → [B,T,D]."""
    x = model.embedding(tokens, jnp.dtype(model.config.dtype))
    filled = []
    for i, old in enumerate(cache):
        graphdef, stacked = nnx.split(getattr(model, f"segment_{i}"))

        def repeat(x: Array, inputs: Any, graphdef: Any = graphdef) -> tuple[Array, list[LayerCache]]:
            variables, caches = inputs
            new = []
            for block, layer_cache in zip(nnx.merge(graphdef, variables).blocks(), caches, strict=True):
                heads, layer_cache = attention(block, block.attention_norm(x), layer_cache)
                x = x + block.attention.join(heads)
                x, _ = block.feed_forward(x, segment_ids, tokens=tokens, routing=None, train=False, rng=None)
                new.append(layer_cache)
            return x, new

        x, new = jax.lax.scan(repeat, x, (stacked, old))
        filled.append(new)
    return x, filled


def _logits(model: Transformer, x: Array) -> Array:
    """[B,1,D] → [B,V] float32."""
    return (model.final_norm(x)[:, 0] @ model.output_matrix()).astype(jnp.float32)
