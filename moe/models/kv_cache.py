"""State of earlier tokens, so that each further token costs one position: keys and values, or a layer's memory.

Prompts of unequal length each begin at column 0. A layer with a sliding window keeps its last W positions in a ring:
position p lies in slot p mod W. An encoder-decoder also keeps what its decoder reads of the encoder's output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.config import ModelConfig, stacks
from moe.config.model_section import LayerKind
from moe.layers.attention.scoring import sees
from moe.layers.basic import KEEP_ALL, Rows
from moe.layers.gated_delta_net import DeltaState, GatedDeltaNet
from moe.models.block import Block, attention_class
from moe.models.encoder_decoder import EncoderDecoder, encoder_rows
from moe.models.factory import Model
from moe.models.stack import LayerStates, Stack, create_states, join_moe_layers
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.routing.routing import Choices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer; stacked over layers it gains a leading axis.

    Attributes:
        key: [B,W,M,H], rotated; for latent attention the latent and the rotated key, [B,W,1,R].
        value: [B,W,M,H]; None for latent attention.
        position: [B,W] int32, the position held in each slot; -1 where it is empty.
    """

    key: Array
    value: Array | None
    position: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """Output of the encoder as the decoder's layers read it.

    Attributes:
        layers: key and value [B,U,M,H] of every decoder layer.
        mask: [B,U] bool, True for tokens of the source.
    """

    layers: LayerStates
    mask: Array


#: State of one layer; its mixer determines the kind.
Cache = LayerCache | DeltaState

#: (block, normalised x, cache) → (heads [B,T,N,H], cache)
CachedAttention = Callable[[Block, Array, Any], tuple[Array, Cache]]


def empty(config: ModelConfig, rows: int, length: int, *, ahead: int = 0) -> LayerStates:
    """A cache of every layer for ``length`` positions a row, or for the window where a layer has a shorter one.

    ``ahead``: how many tokens beyond one :func:`extend` takes at once.
    """

    def create(kind: LayerKind, repeats: int) -> Cache:
        return empty_layers(config, kind, repeats, rows, length, ahead=ahead)

    return create_states(list(stacks(config).values())[-1], create)


def empty_layers(
    config: ModelConfig, kind: LayerKind, repeats: int, rows: int, length: int, *, ahead: int = 0
) -> Cache:
    """The cache of equal layers, stacked over the repeats; ``length`` and ``ahead`` are those of :func:`empty`."""
    if kind.mixer == "gated_delta_net":
        return GatedDeltaNet.empty_state(config, repeats, rows)
    slots = min(kind.window + ahead, length) if kind.window else length

    def zeros(shape: tuple[int, int] | None) -> Array | None:
        if shape is None:
            return None
        spec = partition_specs.CACHE if shape[0] > 1 else partition_specs.CACHE_OF_ONE_HEAD
        return constrain(jnp.zeros((repeats, rows, slots, *shape), config.dtype), spec)

    key, value = (zeros(shape) for shape in attention_class(config).cache_shapes(config))
    assert key is not None
    return LayerCache(key, value, jnp.full((repeats, rows, slots), -1, jnp.int32))


def encode(model: EncoderDecoder, token_ids: Int[Array, "B U"], lengths: Int[Array, " B"]) -> Encoded:
    """Run the encoder; row b's source is its first lengths[b] tokens."""
    mask = jnp.arange(token_ids.shape[1]) < lengths[:, None]
    hidden, _, _ = model.encode(encoder_rows(token_ids, mask=mask), generating=True)

    def body(block: Block, x: Array, _: None, layer: Array) -> tuple[Array, Any]:
        del layer
        return x, block.cross.attention.project_keys(x, None)

    return Encoded(model.decoder.scan(body, hidden)[1], mask)


def run_prompt(
    model: Model,
    token_ids: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    caches: LayerStates,
    encoded: Encoded | None = None,
    *,
    prefix: bool = False,
) -> tuple[Float[Array, "B T D"], LayerStates, Choices | None]:
    """Run the prompts.

    Args:
        token_ids: row b's prompt is its first lengths[b] tokens.
        lengths: at least 1.
        caches: from :func:`empty`.
        encoded: from :func:`encode`, of an encoder-decoder.
        prefix: the prompts are seen in both directions (prefix LM).

    Returns:
        hidden states of all tokens before the final norm, the filled caches, and the tokens' experts [L,B,T,K] in the
        MoE layers, if there are any.
    """
    rows = prompt_rows(token_ids, lengths)
    rows = dataclasses.replace(rows, prefix=rows.segment_ids) if prefix else rows
    bias = _decoder(model).position_bias(token_ids.shape[1])
    return _run(model, rows, caches, prompt_attention(rows, lengths, bias), encoded)


def prompt_logits(model: Model, x: Float[Array, "B T D"], lengths: Int[Array, " B"]) -> Float[Array, "B V"]:
    """Logits of the token after each prompt, from the hidden states of :func:`run_prompt`."""
    # [B,T,D] → [B,1,D]: the last token of each prompt
    return next_logits(model, jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1))


def prompt_rows(token_ids: Int[Array, "B T"], lengths: Int[Array, " B"]) -> Rows:
    """Rows of prompts, each from column 0 on."""
    columns = jnp.arange(token_ids.shape[1], dtype=jnp.int32)
    segment_ids = (columns < lengths[:, None]).astype(jnp.int32)
    positions = columns * segment_ids  # 0 in the padding: rotary positions may depend on a row's length
    return Rows(token_ids, segment_ids, positions)


def prompt_attention(rows: Rows, lengths: Int[Array, " B"], bias: Float[Array, "N P"] | None = None) -> CachedAttention:
    """Attention of prompts that fills the caches."""

    def attention(block: Block, x: Array, cache: Any) -> tuple[Array, Cache]:
        if isinstance(block.mixer, GatedDeltaNet):
            return block.mixer.prefill(x, rows, bias)
        heads, key, value = block.attention.prefill(x, rows, bias)
        return heads, _fill(cache, key, value, lengths)

    return attention


def extend(
    model: Model,
    token_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    active: Bool[Array, " B"],
    caches: LayerStates,
    encoded: Encoded | None = None,
) -> tuple[Float[Array, "B T D"], LayerStates, Choices | None]:
    """Run further tokens of each row, usually one; the result is like that of :func:`run_prompt`.

    A token sees only itself and those before it. A rejected token is overwritten by the next one at its position.

    Args:
        active: False for rows that are done, whose tokens go through no expert.
        caches: of all tokens before.
    """
    rows = next_rows(token_ids, positions, active)
    relative = _decoder(model).relative_bias if model.config.relative_buckets else None
    return _run(model, rows, caches, next_attention(positions, relative), encoded)


def next_rows(token_ids: Int[Array, "B T"], positions: Int[Array, "B T"], active: Bool[Array, " B"]) -> Rows:
    """Rows of further tokens."""
    return Rows(token_ids, jnp.broadcast_to(active.astype(jnp.int32)[:, None], token_ids.shape), positions)


def next_attention(positions: Int[Array, "B T"], relative: Any = None) -> CachedAttention:
    """Attention of further tokens to the cache, to which they are added first."""

    def attention(block: Block, x: Array, cache: Any) -> tuple[Array, Cache]:
        if isinstance(block.mixer, GatedDeltaNet):
            return block.mixer.step(x, cache)
        query, key, value = block.attention.project_cached(x, positions)
        for i in range(positions.shape[1]):
            one = None if value is None else value[:, i : i + 1]
            cache = _append(cache, key[:, i : i + 1], one, positions[:, i])
        age = positions[:, :, None] - cache.position[:, None]  # [B,T,W]
        seen = (cache.position >= 0)[:, None] & sees(age, block.attention.window)
        # Typed by the module: latent attention has no cached values.
        attend_cached: Any = block.attention.attend_cached
        bias = {}
        if relative is not None:  # [B,T,W,N] → [B,N,T,W]
            bias["bias"] = jnp.moveaxis(relative(-age), -1, 1).astype(x.dtype)
        return attend_cached(query, cache.key, cache.value, seen[:, None], **bias), cache

    return attention


def _decoder(model: Model) -> Stack:
    """The stack whose positions are cached."""
    return model.decoder if isinstance(model, EncoderDecoder) else model


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
    slot = jnp.arange(slots) == (positions % slots)[:, None]  # [B,W]

    def put(new: Array, old: Array) -> Array:
        return jnp.where(slot[..., None, None], new.astype(old.dtype), old)

    kept = None if value is None or cache.value is None else put(value, cache.value)
    return LayerCache(put(key, cache.key), kept, jnp.where(slot, positions[:, None], cache.position))


def _run(
    model: Model, rows: Rows, caches: LayerStates, attention: CachedAttention, encoded: Encoded | None
) -> tuple[Array, LayerStates, Choices | None]:
    """Run all blocks with this attention; return hidden states [B,T,D] before the final norm, caches, and experts."""
    states = [[(cache, None) for cache in unit] for unit in caches]
    if encoded is not None:
        states = [list(zip(*units, strict=True)) for units in zip(caches, encoded.layers, strict=True)]

    def body(block: Block, x: Array, state: Any, layer: Array) -> tuple[Array, tuple[Cache, Choices | None]]:
        del layer
        x, cache = attend(block, x, state[0], attention)
        if encoded is not None:
            cross: Any = block.cross.attention
            normalised = block.cross.norm(x)
            query = cross.project_query(normalised, None)
            mask = jnp.broadcast_to(encoded.mask[:, None, None], (len(x), 1, x.shape[1], encoded.mask.shape[1]))
            x = x + cross.join(cross.attend_cached(query, *state[1], mask), normalised)
        x, record = block.feed_forward(x, rows, generating=True)
        return x, (cache, None if record is None else record[1].choices)

    x, states = _decoder(model).scan(body, model.embed(rows.token_ids), states)
    caches, choices = ([[state[i] for state in unit] for unit in states] for i in (0, 1))
    return x, caches, join_moe_layers(choices)


def attend(block: Block, x: Array, cache: Cache, attention: CachedAttention) -> tuple[Array, Cache]:
    """x plus a block's attention, and its cache."""
    norm = block.attention_norm
    h = block.input_of(norm, x)
    heads, cache = attention(block, h, cache)
    return block.add(norm, x, block.mixer.join(heads, h), KEEP_ALL), cache


def next_logits(model: Model, x: Float[Array, "B 1 D"]) -> Float[Array, "B V"]:
    """Logits of the next token, from the last one's hidden state before the final norm."""
    hidden = model.scaled(_decoder(model).final_norm(x))
    return (hidden[:, 0] @ model.output_matrix()).astype(jnp.float32)
