"""Stacks of layers, and the scan over them.

Equal neighbouring layers run as one ``jax.lax.scan``, so that a model of 32 layers compiles as fast as one of 4. An
encoder-decoder has two stacks, ``encoder`` and ``decoder``.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moe.config import ModelConfig, MoEConfig
from moe.config.layer_kinds import LayerKind, stacks
from moe.layers.attention.scoring import RelativeBias
from moe.layers.embedding import Embedding
from moe.layers.inputs import Dropout, Rows, StackSite
from moe.layers.norms import RMSNorm
from moe.models.block import Block, Record, Stream
from moe.models.segments import LayerStates, join_moe_layers, segments, split_moe_layers
from moe.parallel.mesh import axis_size
from moe.parallel.parameters import stacked, take_layer
from moe.parallel.partition_specs import INNER_INPUT, REMAT_POLICIES
from moe.routing.balancing import LayerReport
from moe.routing.carry import first_carry, of_tokens
from moe.routing.routing import Choices, Routing

#: (block, x, the layer's state, layer number) → (x, the layer's new state)
Body = Callable[[Block, Any, Any, Int[Array, ""]], tuple[Any, Any]]


class Records(NamedTuple):
    """Reports of a stack's layers: of its MoE layers with their routing, of token mixers with experts, and the largest
    attention scores [L,N], each stacked over the layers that have one; None without any."""

    layers: LayerReport | None = None
    routing: Routing | None = None
    mixers: LayerReport | None = None
    scores: Array | None = None


def join_records(records: LayerStates) -> Records:
    """Reports of a stack's layers, in layer order."""

    def join(read: Callable[[Record], Any]) -> Any:
        return join_moe_layers([[read(record) for record in unit] for unit in records])

    layers, mixers = join(operator.attrgetter("report")), join(operator.attrgetter("mixer"))
    return Records(layers, join(operator.attrgetter("routing")), mixers, join(operator.attrgetter("scores")))


def carry_of(moe: MoEConfig, layers: tuple[LayerKind, ...]) -> Any:
    """Initial carry of one token for the routers of a stack (:func:`moe.routing.carry.first_carry`)."""
    gates = [kind.gate for kind in layers if kind.gate is not None]
    return first_carry(gates, moe.num_experts + moe.null_experts)


class Segment(nnx.Module):
    """Blocks of one unit, each with parameters stacked over the repeats."""

    def __init__(self, config: ModelConfig, unit: tuple[LayerKind, ...], *, rngs: nnx.Rngs):
        self.size = len(unit)
        for i, kind in enumerate(unit):
            setattr(self, f"block_{i}", Block(config, kind, rngs=rngs))

    def blocks(self) -> list[Block]:
        """The blocks of the unit, in order."""
        return [getattr(self, f"block_{i}") for i in range(self.size)]


class Stack(nnx.Module):
    """All layers of a decoder-only model, of an encoder or of a decoder, in segments, and the norm after them."""

    embedding: Embedding  # of the tokens, where the stack has one of its own

    def __init__(self, config: ModelConfig, name: str = "", *, rngs: nnx.Rngs):
        """Draw the parameters.

        Args:
            name: of the stack (:func:`moe.config.layer_kinds.stacks`).
        """
        self.config = config
        self.name = name
        for i, (unit, repeats) in enumerate(segments(self.kinds)):
            setattr(self, f"segment_{i}", stacked(functools.partial(Segment, config, unit), repeats, rngs))
        self.relative_bias = RelativeBias.of(config, bidirectional=name == "encoder", rngs=rngs)
        self.final_norm = RMSNorm.of(config)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Kind of each layer."""
        return stacks(self.config)[self.name]

    def run(
        self,
        x: Float[Array, "B T D"],
        rows: Rows,
        *,
        train: bool = False,
        rng: PRNGKeyArray | None = None,
        routing: Routing | Choices | None = None,
        return_routing: bool = False,
        generating: bool = False,
    ) -> tuple[Float[Array, "B T D"], Records]:
        """All layers and the final norm.

        Args:
            rows: the tokens' documents and positions, and the encoder's output.
            train: use training capacity factors and dropout.
            rng: key of routing noise and dropout; None: deterministic.
            routing: of every MoE layer of this stack, to replay.
            return_routing: also return it.
            generating: see :meth:`moe.models.block.Block.feed_forward`.

        Returns:
            Final hidden states, and what the layers report.
        """
        c, drop = self.config, self.outer_dropout(train=train, rng=rng)
        body = self.body(rows, train=train, rng=rng, return_routing=return_routing, generating=generating)
        states = split_moe_layers(self.kinds, routing)
        x = drop.at(StackSite.EMBEDDING)(x)
        stream, records = self.scan(body, self.begin(x), states, remat=c.remat, per_trip=c.layers_per_trip)
        return drop.at(StackSite.OUTPUT)(self.final_norm(stream.x)), join_records(records)

    def begin(self, x: Float[Array, "B T D"]) -> Stream:
        """Input of the first layer. Raises ConfigError if routers hand on different shapes."""
        late = jnp.zeros_like(x) if self.config.moe.shortcut else None
        return Stream(x, of_tokens(carry_of(self.config.moe, self.kinds), x.shape[:2]), late)

    @property
    def _first(self) -> int:
        """Number of the first layer: the decoder's layers are numbered after the encoder's."""
        return self.config.encoder_layers if self.name == "decoder" else 0

    def with_bias(self, rows: Rows, farthest: int | None = None) -> Rows:
        """Rows with the biases of T5's attention, up to a distance; None: all that occur in them."""
        if self.relative_bias is None:
            return rows
        length = rows.token_ids.shape[1] if farthest is None else farthest + 1
        return dataclasses.replace(rows, bias=self.relative_bias.by_distance(length))

    def outer_dropout(self, *, train: bool, rng: PRNGKeyArray | None) -> Dropout:
        """Dropout before the first and after the last layer."""
        c, key = self.config, None
        if train and rng is not None:
            key = jax.random.fold_in(rng, c.encoder_layers + c.num_layers + self._first)
        return Dropout(c.dropout, key)

    def body(
        self,
        rows: Rows,
        *,
        train: bool = False,
        rng: PRNGKeyArray | None = None,
        return_routing: bool = False,
        generating: bool = False,
    ) -> Body:
        """One layer over a :class:`Stream`, for :meth:`scan`; arguments are those of :meth:`run`. A layer's input state
        is the routing to replay, its output state what it reports."""
        rows = self.with_bias(rows)

        def body(block: Block, stream: Stream, replayed: Routing | Choices | None, layer: Array) -> tuple[Stream, Any]:
            key = None if rng is None else jax.random.fold_in(rng, self._first + layer)
            settings = {"train": train, "rng": key, "generating": generating}
            stream, record = stream.after(*block(stream.x, rows, carry=stream.carry, routing=replayed, **settings))
            return stream, record if return_routing else record._replace(routing=None)

        return body

    def scan(
        self,
        body: Body,
        x: Any,
        states: LayerStates | None = None,
        *,
        of: range | None = None,
        remat: str = "none",
        per_trip: int = 1,
    ) -> tuple[Any, LayerStates]:
        """Run ``x, state = body(block, x, state, layer)`` over the layers, in order.

        Args:
            body: one layer; ``block`` holds that layer's parameters, ``layer`` is its number, traced.
            x: carried from layer to layer.
            states: an input for every layer, such as a cache; None: None for each.
            of: the segments to run; None: all.
            remat: what the backward pass recomputes, a key of :data:`REMAT_POLICIES`.
            per_trip: repeats unrolled in one iteration of the loop over them; 0: all.

        Returns:
            The last x and the new state of every layer.
        """
        outputs, first = [], 0
        for i, (unit, repeats) in enumerate(segments(self.kinds)):
            if of is None or i in of:
                before = [None] * len(unit) if states is None else states[i]
                segment = getattr(self, f"segment_{i}")
                x, after = scan_segment(segment, body, x, before, first, remat=remat, per_trip=per_trip)
                outputs.append(after)
            first += len(unit) * repeats
        return x, outputs


def scan_segment(
    segment: Segment,
    body: Body,
    x: Any,
    states: list[Any],
    first: Any,
    *,
    repeats: int | None = None,
    take: Callable[[Any, Array], Any] | None = None,
    remat: str,
    per_trip: int,
) -> tuple[Any, list[Any]]:
    """:meth:`Stack.scan` over the repeats of one segment, whose first layer has this number.

    Args:
        repeats: number to run; None: all.
        take: (all variables, repeat) → the repeat's variables, called again in the backward pass; None: slice them.
        remat, per_trip: as there.
    """
    graphdef, stacked = nnx.split(segment)
    repeats = repeats or len(jax.tree.leaves(stacked)[0])
    if take is None and axis_size("pipeline") > 1:
        take = take_layer

    def repeat(x: Any, inputs: tuple[Any, Array, Any]) -> Any:
        variables, index, before = inputs
        variables = variables if take is None else take(stacked, index)
        after = []
        blocks = nnx.merge(graphdef, variables).blocks()
        for j, (block, state) in enumerate(zip(blocks, before, strict=True)):
            x = checkpoint_name(x, INNER_INPUT) if j else x
            x, state = body(block, x, state, first + index * len(blocks) + j)
            after.append(state)
        return x, after

    written_out = not per_trip or 1 < repeats <= per_trip
    if remat != "none":
        # Within a loop XLA cannot merge the recomputation with the forward pass; unrolled it would, and no memory
        # would be saved.
        repeat = jax.checkpoint(repeat, policy=REMAT_POLICIES[remat], prevent_cse=written_out)
    inputs = (stacked if take is None else None, jnp.arange(repeats), states)
    return jax.lax.scan(repeat, x, inputs, unroll=repeats if written_out else min(per_trip, repeats))
