"""State of earlier tokens, so that each further token costs one position; every layer's mixer has its own kind.

Prompts of unequal length each begin at column 0. An encoder-decoder also keeps what its decoder reads of the encoder's
output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.config import ModelConfig, stacks
from moe.config.layer_kinds import LayerKind
from moe.layers.inputs import KEEP_ALL, Rows
from moe.layers.mixers.interface import MixerLayer
from moe.layers.mixers.table import layer_class
from moe.layers.ngram_memory import NgramMemory
from moe.models.block import Block, Record, Stream
from moe.models.encoder_decoder import EncoderDecoder, encoder_rows
from moe.models.factory import Model
from moe.models.segments import LayerStates, create_states, join_moe_layers
from moe.models.stack import Stack
from moe.routing.interface import GateInputs
from moe.routing.routing import Choices


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


#: State of one layer (:class:`moe.layers.mixers.interface.MixerLayer`); with that of its memory if it has one, in a
#: :class:`WithPrompt` if its gate keeps something of the prompt.
Cache = Any


class WithPrompt(NamedTuple):
    """State of a layer whose gate keeps something of the prompt.

    Attributes:
        mixer: of its memory and mixer.
        prompt: pytree of [L,B,...] (:meth:`moe.routing.interface.Gate.of_prompt`); None: before the prompt.
    """

    mixer: Cache
    prompt: Any = None


#: (mixer or memory, its input [B,T,D], its state) → (heads [B,T,N,H] or output [B,T,D], state)
Mix = Callable[[MixerLayer | NgramMemory, Array, Cache], tuple[Array, Cache]]


def empty(config: ModelConfig, rows: int, length: int, *, ahead: int = 0) -> LayerStates:
    """A cache of every layer for ``length`` positions a row.

    ``ahead``: how many tokens beyond one :func:`extend` takes at once.
    """

    def create(kind: LayerKind, repeats: int) -> Cache:
        return empty_layers(config, kind, repeats, rows, length, ahead=ahead)

    return create_states(list(stacks(config).values())[-1], create)


def empty_layers(
    config: ModelConfig, kind: LayerKind, repeats: int, rows: int, length: int, *, ahead: int = 0
) -> Cache:
    """The cache of equal layers, stacked over the repeats; ``length`` and ``ahead`` are those of :func:`empty`."""
    layer = layer_class(kind.mixer)
    state = layer.empty_state(config, kind.mixer, (repeats, rows), length, ahead=ahead)
    state = state if kind.memory is None else (state, NgramMemory.empty_state(config, (repeats, rows)))
    return WithPrompt(state) if kind.gate is not None and kind.gate.keeps_prompt else state


def encode(model: EncoderDecoder, token_ids: Int[Array, "B U"], lengths: Int[Array, " B"]) -> Encoded:
    """Run the encoder; row b's source is its first lengths[b] tokens."""
    mask = jnp.arange(token_ids.shape[1]) < lengths[:, None]
    hidden, _ = model.encode(encoder_rows(token_ids, mask=mask), generating=True)

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
    return _run(model, rows, caches, prompt_mix(_decoder(model).with_bias(rows), lengths), encoded)


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


def prompt_mix(rows: Rows, lengths: Int[Array, " B"]) -> Mix:
    """Mixing of prompts that fills the caches."""

    def mix(part: MixerLayer | NgramMemory, x: Array, cache: Cache) -> tuple[Array, Cache]:
        heads, found = part.prefill(x, rows)
        return heads, part.fill(cache, found, lengths)

    return mix


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
    # All distances from the largest on have the same bias.
    biased = _decoder(model).with_bias(rows, model.config.relative_max_distance)
    return _run(model, rows, caches, next_mix(biased), encoded)


def next_rows(token_ids: Int[Array, "B T"], positions: Int[Array, "B T"], active: Bool[Array, " B"]) -> Rows:
    """Rows of further tokens."""
    return Rows(token_ids, jnp.broadcast_to(active.astype(jnp.int32)[:, None], token_ids.shape), positions)


def next_mix(rows: Rows) -> Mix:
    """Mixing of further tokens with those in the caches, to which they are added first."""

    def mix(part: MixerLayer | NgramMemory, x: Array, cache: Cache) -> tuple[Array, Cache]:
        return part.step(x, rows, cache)

    return mix


def _decoder(model: Model) -> Stack:
    """The stack whose positions are cached."""
    return model.decoder if isinstance(model, EncoderDecoder) else model


def _run(
    model: Model, rows: Rows, caches: LayerStates, mix: Mix, encoded: Encoded | None
) -> tuple[Array, LayerStates, Choices | None]:
    """Run all blocks with these mixers; return hidden states [B,T,D] before the final norm, caches, and experts."""
    states = [[(cache, None) for cache in unit] for unit in caches]
    if encoded is not None:
        states = [list(zip(*units, strict=True)) for units in zip(caches, encoded.layers, strict=True)]

    def body(block: Block, stream: Stream, state: Any, layer: Array) -> tuple[Stream, tuple[Cache, Choices | None]]:
        del layer
        x, cache = mixed(block, stream.x, state[0], mix)
        if encoded is not None:
            cross: Any = block.cross.attention
            normalised = block.cross.norm(x)
            query = cross.project_query(normalised, None)
            mask = jnp.broadcast_to(encoded.mask[:, None, None], (len(x), 1, x.shape[1], encoded.mask.shape[1]))
            x = x + cross.join(cross.attend_cached(query, *state[1], mask), normalised)
        x, record, cache = feed_forward(block, x, rows, cache, carry=stream.carry)
        stream, record = stream.after(x, record)
        return stream, (cache, None if record.routing is None else record.routing.choices)

    decoder = _decoder(model)
    stream, states = decoder.scan(body, decoder.begin(model.embed(rows.token_ids)), states)
    caches, choices = ([[state[i] for state in unit] for unit in states] for i in (0, 1))
    return stream.x, caches, join_moe_layers(choices)


def mixed(block: Block, x: Array, cache: Cache, mix: Mix) -> tuple[Array, Cache]:
    """x plus the outputs of a block's memory and mixer, and its cache."""
    if isinstance(cache, WithPrompt):
        x, own = mixed(block, x, cache.mixer, mix)
        return x, cache._replace(mixer=own)
    memory = None
    if block.kind.memory is not None:
        cache, memory = cache
        recalled, memory = mix(block.memory, x, memory)
        x = block.add_recalled(x, recalled)
    h = block.mixer_input(x)
    heads, cache = mix(block.token_mixer, h, cache)
    x = block.add_mixed(x, block.token_mixer.join(heads, h), KEEP_ALL)
    return x, cache if memory is None else (cache, memory)


def feed_forward(block: Block, x: Array, rows: Rows, cache: Cache, *, carry: Any = None) -> tuple[Array, Record, Cache]:
    """:meth:`moe.models.block.Block.feed_forward`, and the layer's cache, into which the first call puts what the gate
    keeps of the prompt."""
    if not isinstance(cache, WithPrompt):
        return *block.feed_forward(x, rows, carry=carry, generating=True), cache
    x, record = block.feed_forward(x, rows, carry=carry, prompt=cache.prompt, generating=True)
    if cache.prompt is None:
        gate, routing = block.kind.gate, record.routing
        assert gate is not None
        assert routing is not None
        inputs = GateInputs((rows.segment_ids > 0) & ~routing.broken, segment_ids=rows.segment_ids)
        cache = cache._replace(prompt=gate.of_prompt(routing.router_logits, inputs))
    return x, record, cache


def next_logits(model: Model, x: Float[Array, "B 1 D"]) -> Float[Array, "B V"]:
    """Logits of the next token, from the last one's hidden state before the final norm."""
    hidden = model.scaled(_decoder(model).final_norm(x))
    return (hidden[:, 0] @ model.output_matrix()).astype(jnp.float32)
