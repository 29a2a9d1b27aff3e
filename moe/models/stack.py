"""Stacks of layers, and the scan over them.

Equal neighbouring layers run as one ``jax.lax.scan``, so that a model of 32 layers compiles as fast as one of 4. An
encoder-decoder has two stacks, ``encoder`` and ``decoder``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moe.config import ModelConfig
from moe.config.layer_kinds import LayerKind, stacks
from moe.layers.attention.scoring import RelativeBias
from moe.layers.call import Call, Report
from moe.layers.embedding import Embedding
from moe.layers.inputs import KEEP_ALL, Dropout, Rows, StackSite
from moe.layers.norms import RMSNorm
from moe.layers.residuals.table import residual_kind
from moe.models.block import Block
from moe.models.parts import handed_to_first
from moe.models.segments import LayerStates, join_layers, segments, split_moe_layers
from moe.parallel.mesh import axis_size
from moe.parallel.parameters import stacked, take_layer
from moe.parallel.partition_specs import INNER_INPUT, REMAT_POLICIES
from moe.routing.routing import Choices, Routing

#: (block, x, the layer's state, layer number) → (x, the layer's new state)
Body = Callable[[Block, Any, Any, Int[Array, ""]], tuple[Any, Any]]


class Flow(NamedTuple):
    """The residual stream and, by name, what layers hand on: all that passes from layer to layer."""

    stream: Any
    handed: dict[str, Any]


def joined(reports: LayerStates) -> Report:
    """Reports of a stack's layers as one, each entry stacked over the layers that have it; metrics, which lead with a
    part's rows, are joined by them."""
    entries = {entry for unit in reports for report in unit for entry in report.entries()}

    def read(field: str, name: str) -> Any:
        found = join_layers([[getattr(report, field).get(name) for report in unit] for unit in reports])
        return found.reshape(-1, *found.shape[2:]) if field == "metrics" else found

    return Report.by_entry(read, entries)


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
        self.residual = residual_kind(config).stream(config, self.kinds, rngs=rngs)
        self.final_norm = RMSNorm.of(config)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Kind of each layer."""
        return stacks(self.config)[self.name]

    def run(
        self, x: Float[Array, "B T D"], call: Call, routing: Routing | Choices | None = None
    ) -> tuple[Float[Array, "B T D"], Report]:
        """All layers and the final norm.

        Args:
            call: of the run.
            routing: of every MoE layer of this stack, to replay.

        Returns:
            Final hidden states, and what the layers report.
        """
        c, drop = self.config, self.outer_dropout(call)
        states = split_moe_layers(self.kinds, routing)
        flow = self.begin(drop.at(StackSite.EMBEDDING)(x))
        flow, reports = self.scan(self.body(call), flow, states, remat=c.remat, per_trip=c.layers_per_trip)
        return self.end(flow, drop), joined(reports)

    def begin(self, x: Float[Array, "B T D"]) -> Flow:
        """Input of the first layer. Raises ConfigError if routers hand on different shapes."""
        return Flow(self.residual.first(x), handed_to_first(self.config, self.kinds, x))

    def end(self, flow: Flow, drop: Dropout = KEEP_ALL) -> Float[Array, "B T D"]:
        """Final hidden states."""
        return drop.at(StackSite.OUTPUT)(self.final_norm(self.residual.last(flow.stream)))

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

    def outer_dropout(self, call: Call) -> Dropout:
        """Dropout before the first and after the last layer."""
        c, key = self.config, None
        if call.train and call.rng is not None:
            key = jax.random.fold_in(call.rng, c.encoder_layers + c.num_layers + self._first)
        return Dropout(c.dropout, key)

    def body(self, call: Call) -> Body:
        """One layer over a :class:`Flow`, for :meth:`scan`. A layer's input state is the routing to replay, its output
        state what it reports."""
        call = call.replace(rows=self.with_bias(call.rows))

        def body(block: Block, flow: Flow, replayed: Routing | Choices | None, layer: Array) -> tuple[Flow, Report]:
            return self.apply(block, flow, call.replace(replayed=replayed), layer)

        return body

    def apply(self, block: Block, flow: Flow, call: Call, layer: Int[Array, ""]) -> tuple[Flow, Report]:
        """One layer.

        Args:
            call: of the run, with the layer's ``replayed`` and ``state``.
            layer: its number in the stack.
        """
        key = None if call.rng is None else jax.random.fold_in(call.rng, self._first + layer)
        drop = Dropout(self.config.dropout, key if call.train else None)
        stream, report = block(flow.stream, call.replace(rng=key, drop=drop, handed=flow.handed))
        return Flow(stream, flow.handed | report.handed), report.replace(handed={})

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
