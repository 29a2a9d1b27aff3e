"""Keys and values of earlier tokens, so that each further token costs one position instead of the whole text.

Prompts of unequal length each begin at column 0. A layer with a sliding window keeps its last W positions in a ring:
position p lies in slot p mod W.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.config import ModelConfig
from moe.config.layer_kinds import LayerKind
from moe.models.block import Block, attention_class
from moe.models.decoder import Transformer
from moe.models.stack import LayerStates, create_states
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer; stacked over layers it gains a leading axis.

    Attributes:
        key: [B,W,M,H], rotated; of latent attention the latent and the rotated key, [B,W,1,R].
        value: [B,W,M,H]; None for latent attention.
        position: [B,W] int32, the position held in each slot; -1 where it is empty.
    """

    key: Array
    value: Array | None
    position: Array


#: (block, normalised x, cache) → (heads [B,T,N,H], cache)
CachedAttention = Callable[[Block, Array, LayerCache], tuple[Array, LayerCache]]


def empty(config: ModelConfig, rows: int, length: int) -> LayerStates:
    """A cache of every layer for ``length`` positions a row, or for the window where a layer has a shorter one."""

    def create(kind: LayerKind, repeats: int) -> LayerCache:
        slots = min(kind.window, length) if kind.window else length

        def zeros(shape: tuple[int, int] | None) -> Array | None:
            if shape is None:
                return None
            spec = partition_specs.CACHE if shape[0] > 1 else partition_specs.CACHE_OF_ONE_HEAD
            return constrain(jnp.zeros((repeats, rows, slots, *shape), config.dtype), spec)

        key, value = (zeros(shape) for shape in attention_class(config).cache_shapes(config))
        assert key is not None
        return LayerCache(key, value, jnp.full((repeats, rows, slots), -1, jnp.int32))

    return create_states(config, create)


def prefill(
    model: Transformer, token_ids: Int[Array, "B T"], lengths: Int[Array, " B"], caches: LayerStates
) -> tuple[Float[Array, "B V"], LayerStates]:
    """Run the prompts.

    Args:
        model: the model.
        token_ids: row b's prompt is its first lengths[b] tokens.
        lengths: at least 1.
        caches: from :func:`empty`.

    Returns:
        logits of the token after each prompt, and the filled caches.
    """
    columns = jnp.arange(token_ids.shape[1], dtype=jnp.int32)
    segment_ids = (columns < lengths[:, None]).astype(jnp.int32)
    positions = columns * segment_ids  # 0 in the padding: rotary positions may depend on a row's length

    def attention(block: Block, x: Array, cache: LayerCache) -> tuple[Array, LayerCache]:
        heads, key, value = block.attention.prefill(x, segment_ids, positions)
        return heads, _fill(cache, key, value, lengths)

    x, caches = _run(model, token_ids, segment_ids, positions, caches, attention)
    # [B,T,D] → [B,1,D]: the last token of each prompt
    return _logits(model, jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)), caches


def decode(
    model: Transformer,
    token_ids: Int[Array, " B"],
    positions: Int[Array, " B"],
    active: Bool[Array, " B"],
    caches: LayerStates,
) -> tuple[Float[Array, "B V"], LayerStates]:
    """Run one more token a row.

    Args:
        model: the model.
        token_ids: the tokens.
        positions: their positions.
        active: rows that are done go through no expert.
        caches: of all tokens before.

    Returns:
        logits of the token after it, and the caches with it.
    """
    segment_ids = active.astype(jnp.int32)[:, None]

    def attention(block: Block, x: Array, cache: LayerCache) -> tuple[Array, LayerCache]:
        query, key, value = block.attention.project_cached(x, positions[:, None])
        cache = _append(cache, key, value, positions)
        age = positions[:, None] - cache.position  # [B,W]
        seen = (cache.position >= 0) & (age >= 0)
        if block.attention.window:
            seen &= age < block.attention.window
        # Typed by the module: latent attention has no cached values.
        attend_cached: Any = block.attention.attend_cached
        return attend_cached(query, cache.key, cache.value, seen[:, None, None]), cache

    x, caches = _run(model, token_ids[:, None], segment_ids, positions[:, None], caches, attention)
    return _logits(model, x), caches


def _fill(cache: LayerCache, key: Array, value: Array | None, lengths: Array) -> LayerCache:
    """Put the last W positions of each row into their slots."""
    slots = cache.position.shape[1]
    last = lengths[:, None] - 1
    # The newest position congruent to the slot's number modulo W; negative where the prompt is too short to reach it.
    position = last - (last - jnp.arange(slots)) % slots  # [B,W]
    index = jnp.maximum(position, 0)[..., None, None]

    def take(heads: Array) -> Array:
        return jnp.take_along_axis(heads, index, axis=1).astype(cache.key.dtype)

    return LayerCache(take(key), None if value is None else take(value), jnp.maximum(position, -1))


def _append(cache: LayerCache, key: Array, value: Array | None, positions: Array) -> LayerCache:
    """Put position p of each row into slot p mod W: by selection, since a scatter would move rows between devices."""
    slots = cache.position.shape[1]
    here = jnp.arange(slots) == (positions % slots)[:, None]  # [B,W]

    def put(new: Array, old: Array) -> Array:
        return jnp.where(here[..., None, None], new.astype(old.dtype), old)

    kept = None if value is None or cache.value is None else put(value, cache.value)
    return LayerCache(put(key, cache.key), kept, jnp.where(here, positions[:, None], cache.position))


def _run(
    model: Transformer,
    token_ids: Array,
    segment_ids: Array,
    positions: Array,
    caches: LayerStates,
    attention: CachedAttention,
) -> tuple[Array, LayerStates]:
    """All blocks with this attention: token_ids [B,T] → hidden states [B,T,D]."""

    def body(block: Block, x: Array, cache: LayerCache, layer: Array) -> tuple[Array, LayerCache]:
        del layer
        heads, cache = attention(block, block.attention_norm(x), cache)
        x = x + block.attention.join(heads)
        x, _ = block.feed_forward(x, segment_ids, token_ids=token_ids, positions=positions)
        return x, cache

    return model.scan(body, model.embedding(token_ids, jnp.dtype(model.config.dtype)), caches)


def _logits(model: Transformer, x: Array) -> Array:
    """[B,1,D] → [B,V] float32."""
    return (model.final_norm(x)[:, 0] @ model.output_matrix()).astype(jnp.float32)
