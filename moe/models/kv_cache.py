"""State of earlier tokens, so that each further token costs one position; every layer's mixer has its own kind.

Prompts of unequal length each begin at column 0. An encoder-decoder also keeps what its decoder reads of the encoder's
output.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.config import ModelConfig, stacks
from moe.config.layer_kinds import LayerKind
from moe.layers.call import Call
from moe.layers.cross_attention import STATE as CROSS
from moe.layers.inputs import Rows
from moe.layers.mixers.interface import MixerLayer
from moe.layers.mixers.table import layer_class
from moe.layers.ngram_memory import NgramMemory
from moe.layers.prompt import STATE as PROMPT
from moe.models.block import Block
from moe.models.encoder_decoder import EncoderDecoder, encoder_rows
from moe.models.factory import Model
from moe.models.segments import LayerStates, create_states, join_layers
from moe.models.stack import Flow, Stack
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


#: State of one layer by its parts: the mixer's, and that of others which keep one.
Cache = dict[str, Any]


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
    cache: Cache = {"mixer": layer.empty_state(config, kind.mixer, (repeats, rows), length, ahead=ahead)}
    if kind.memory is not None:
        cache["memory"] = NgramMemory.empty_state(config, (repeats, rows))
    if kind.gate is not None and kind.gate.keeps_prompt:
        cache[PROMPT] = None
    return cache


def encode(model: EncoderDecoder, token_ids: Int[Array, "B U"], lengths: Int[Array, " B"]) -> Encoded:
    """Run the encoder; row b's source is its first lengths[b] tokens."""
    mask = jnp.arange(token_ids.shape[1]) < lengths[:, None]
    hidden, _ = model.encode(Call(encoder_rows(token_ids, mask=mask), generating=True))

    def body(block: Any, x: Array, _: None, layer: Array) -> tuple[Array, Any]:
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
    rows = _decoder(model).with_bias(rows)
    return _run(model, prompt_call(rows, lengths), caches, encoded)


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


def prompt_call(rows: Rows, lengths: Int[Array, " B"]) -> Call:
    """A call that runs prompts and fills the caches."""

    def mix(part: MixerLayer | NgramMemory, x: Array, cache: Any) -> tuple[Array, Any]:
        heads, found = part.prefill(x, rows)
        return heads, part.fill(cache, found, lengths)

    return Call(rows, generating=True, mix=mix, signals=("routing",))


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
    rows = _decoder(model).with_bias(rows, model.config.relative_max_distance)
    return _run(model, next_call(rows), caches, encoded)


def next_rows(token_ids: Int[Array, "B T"], positions: Int[Array, "B T"], active: Bool[Array, " B"]) -> Rows:
    """Rows of further tokens."""
    return Rows(token_ids, jnp.broadcast_to(active.astype(jnp.int32)[:, None], token_ids.shape), positions)


def next_call(rows: Rows) -> Call:
    """A call that runs further tokens, which are added to the caches first."""

    def mix(part: MixerLayer | NgramMemory, x: Array, cache: Any) -> tuple[Array, Any]:
        return part.step(x, rows, cache)

    return Call(rows, generating=True, mix=mix, signals=("routing",))


def _decoder(model: Model) -> Stack:
    """The stack whose positions are cached."""
    return model.decoder if isinstance(model, EncoderDecoder) else model


def _run(
    model: Model, call: Call, caches: LayerStates, encoded: Encoded | None
) -> tuple[Array, LayerStates, Choices | None]:
    """Run all blocks; return hidden states [B,T,D] before the final norm, caches, and experts."""
    states, decoder = caches, _decoder(model)
    if encoded is not None:
        pairs = zip(caches, encoded.layers, strict=True)
        states = [[cache | {CROSS: keys} for cache, keys in zip(*unit, strict=True)] for unit in pairs]
        call = call.replace(rows=dataclasses.replace(call.rows, encoded_segment_ids=encoded.mask.astype(jnp.int32)))

    def body(block: Block, flow: Flow, cache: Cache, layer: Array) -> tuple[Flow, tuple[Cache, Choices | None]]:
        flow, report = decoder.apply(block, flow, call.replace(state=cache), layer)
        routing = report.signals.get("routing")
        return flow, (report.state, None if routing is None else routing.choices)

    flow, states = decoder.scan(body, decoder.begin(model.embed(call.rows.token_ids)), states)
    caches, choices = ([[state[i] for state in unit] for unit in states] for i in (0, 1))
    return decoder.residual.last(flow.stream), caches, join_layers(choices)


def next_logits(model: Model, x: Float[Array, "B 1 D"]) -> Float[Array, "B V"]:
    """Logits of the next token, from the last one's hidden state before the final norm."""
    hidden = model.scaled(_decoder(model).final_norm(x))
    return (hidden[:, 0] @ model.output_matrix()).astype(jnp.float32)
