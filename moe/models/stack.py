"""Stacks of layers: how their parameters are stored, and the scan over them.

Equal neighbouring layers are stored stacked, under ``segment_i/block_j``, and run as one ``jax.lax.scan``, so that a
model of 32 layers compiles as fast as one of 4. An encoder-decoder has two stacks, ``encoder`` and ``decoder``. No
other module depends on this layout.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moe.config import ModelConfig, MoEConfig
from moe.config.layer_kinds import LayerKind, layer_kinds, stacks
from moe.config.mixers import PATHS
from moe.layers.attention.scoring import RelativeBias
from moe.layers.embedding import Embedding
from moe.layers.inputs import Dropout, Rows, StackSite
from moe.layers.norms import RMSNorm
from moe.models.block import Block, Stream
from moe.parallel.mesh import axis_size
from moe.parallel.parameters import stacked, take_layer
from moe.parallel.partition_specs import INNER_INPUT, REMAT_POLICIES
from moe.routing.balancing import LayerReport
from moe.routing.carry import first_carry, of_tokens
from moe.routing.routing import Choices, Routing

#: Name of the layers of multi-token prediction (moe.models.prediction) in a model, stacked along a leading axis.
PREDICTION = "prediction"

#: One tree per layer, grouped as the layers are stored: by segment, then by block of its unit, the arrays of each
#: stacked over the repeats.
LayerStates = list[list[Any]]

#: (block, x, the layer's state, layer number) → (x, the layer's new state)
Body = Callable[[Block, Any, Any, Int[Array, ""]], tuple[Any, Any]]


@functools.lru_cache
def segments(layers: tuple[LayerKind, ...]) -> tuple[tuple[tuple[LayerKind, ...], int], ...]:
    """Layers of a stack as (unit, repeats) runs: a unit is a pattern of blocks, repeated.

    Example: MoE in every second of 12 layers is (((dense, sparse), 6),); all but the first of 4 is
    (((dense,), 1), ((sparse,), 3)).
    """
    runs: list[tuple[tuple[LayerKind, ...], int]] = []
    start = 0
    while start < len(layers):
        # The repeated unit that covers most layers from here; the shorter one where two cover the same.
        best_unit, best_repeats = layers[start : start + 1], 1
        for size in range(1, (len(layers) - start) // 2 + 1):
            unit = layers[start : start + size]
            repeats = 1
            while layers[start + size * repeats : start + size * (repeats + 1)] == unit:
                repeats += 1
            if repeats > 1 and size * repeats > len(best_unit) * best_repeats:
                best_unit, best_repeats = unit, repeats
        runs.append((best_unit, best_repeats))
        start += len(best_unit) * best_repeats
    return tuple(runs)


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
    ) -> tuple[Float[Array, "B T D"], LayerReport | None, Routing | None]:
        """All layers and the final norm.

        Args:
            rows: the tokens' documents and positions, and the encoder's output.
            train: use training capacity factors and dropout.
            rng: key of routing noise and dropout; None: deterministic.
            routing: of every MoE layer of this stack, to replay.
            return_routing: also return it.
            generating: see :meth:`moe.models.block.Block.feed_forward`.

        Returns:
            Final hidden states, and the reports and routing of the MoE layers, stacked.
        """
        c, drop = self.config, self.outer_dropout(train=train, rng=rng)
        body = self.body(rows, train=train, rng=rng, return_routing=return_routing, generating=generating)
        states = split_moe_layers(self.kinds, routing)
        x = drop.at(StackSite.EMBEDDING)(x)
        stream, records = self.scan(body, self.begin(x), states, remat=c.remat, per_trip=c.layers_per_trip)
        layers, recorded = join_moe_layers(records) or (None, None)
        return drop.at(StackSite.OUTPUT)(self.final_norm(stream.x)), layers, recorded

    def begin(self, x: Float[Array, "B T D"]) -> Stream:
        """Input of the first layer. Raises ConfigError if routers hand on different shapes."""
        return Stream(x, of_tokens(carry_of(self.config.moe, self.kinds), x.shape[:2]))

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
            return stream, record if record is None or return_routing else (record[0], None)

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


def part_of(names: Collection[str]) -> str:
    """The part of a model (:data:`moe.config.run_sections.Part`) that a parameter belongs to.

    Args:
        names: keys of its path.
    """
    if tuple(names)[-2:] == (PREDICTION, "project"):
        return "dense"
    if "relative_bias" in names or not PATHS.isdisjoint(names):
        return "attention"
    # A shared expert is made of a dense FFN, so the order counts.
    for part in ("shared", "latent", "null", "router", "experts", "dense", "embedding", "unembedding"):
        if part in names:
            return part
    return "norms"


def create_states(layers: tuple[LayerKind, ...], create: Callable[[LayerKind, int], Any]) -> LayerStates:
    """A state for every layer of a stack: ``create(kind, repeats)`` makes that of equal layers, stacked over the
    repeats."""
    return [[create(kind, repeats) for kind in unit] for unit, repeats in segments(layers)]


def split_moe_layers(layers: tuple[LayerKind, ...], tree: Any) -> LayerStates:
    """Distribute a tree whose arrays lead with a stack's number of MoE layers, in layer order; dense layers get
    None."""
    result, start = [], 0
    for unit, repeats in segments(layers):
        sparse = sum(kind.sparse for kind in unit)
        stop = start + sparse * repeats
        # [L,...] → [R·sparse,...], every sparse-th of them: [R,...]
        columns = iter([slice(start + i, stop, sparse) for i in range(sparse)])
        result.append(
            [jax.tree.map(operator.itemgetter(next(columns)), tree) if kind.sparse else None for kind in unit]
        )
        start = stop
    return result


def join_moe_layers(states: LayerStates) -> Any:
    """Undo :func:`split_moe_layers`: the states that are not None, stacked in layer order; None if all are."""
    parts = []
    for blocks in states:
        sparse = [state for state in blocks if state is not None]
        if sparse:
            # [R,...] of each → [R,sparse,...] → [R·sparse,...]: layer order
            parts.append(jax.tree.map(lambda *a: jnp.stack(a, 1).reshape(-1, *a[0].shape[1:]), *sparse))
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts) if parts else None


def selection_biases(config: ModelConfig, layers: Any) -> dict[str, Any]:
    """Convert a tree whose arrays lead with the number of MoE layers to the nested dict in which a model keeps its
    routers' states: a part for each group of equal layers. Layers whose gate has no balancing rule are left out."""
    biases: dict[str, Any] = {}
    start = 0
    for name, kinds in stacks(config).items():
        stop = start + sum(kind.sparse for kind in kinds)
        of_stack: dict[str, Any] = {}
        own = jax.tree.map(operator.itemgetter(slice(start, stop)), layers)
        parts = zip(split_moe_layers(kinds, own), segments(kinds), strict=True)
        for i, (blocks, (unit, _)) in enumerate(parts):
            for j, (values, kind) in enumerate(zip(blocks, unit, strict=True)):
                if values is not None and _has_bias(kind):
                    of_stack.setdefault(f"segment_{i}", {})[f"block_{j}"] = {"moe": {"router": {"bias": values}}}
        biases |= {name: of_stack} if name and of_stack else of_stack
        start = stop
    last = layer_kinds(config)[-1]
    if config.prediction_layers and _has_bias(last):
        biases[PREDICTION] = {
            "block": {"moe": {"router": {"bias": jax.tree.map(operator.itemgetter(slice(start, None)), layers)}}}
        }
    return biases


def map_routers(function: Callable[[Any, Any], Any], states: dict[str, Any], signals: dict[str, Any]) -> dict[str, Any]:
    """Apply a function to each router's state and its part of :func:`selection_biases`."""
    return {
        name: function(state, signals[name]) if name == "bias" else map_routers(function, state, signals[name])
        for name, state in states.items()
    }


def _has_bias(kind: LayerKind) -> bool:
    return kind.gate is not None and kind.gate.balancing is not None


def stacked_layers(config: ModelConfig, path: Sequence[str]) -> tuple[range, tuple[str, ...]] | None:
    """The layers whose arrays a parameter stacks, in the order of its leading axis, and its path within each block.

    Layers are numbered as in :func:`moe.config.layer_kinds.layer_kinds`, an encoder's first.

    Args:
        path: keys of the parameter in the nested dict of all parameters.

    Returns:
        None for a parameter outside the layers, such as the embedding.
    """
    name = path[0] if config.encoder_layers else ""
    path = path[1:] if name else path
    if path[0] == PREDICTION:  # numbered after the last layer
        layers = range(config.num_layers, config.num_layers + config.prediction_layers)
        return layers, tuple(path[2:] if path[1] == "block" else path)
    if not path[0].startswith("segment_"):
        return None
    i, j = int(path[0].removeprefix("segment_")), int(path[1].removeprefix("block_"))
    runs = segments(stacks(config)[name])
    start = sum(len(unit) * repeats for unit, repeats in runs[:i])
    start += config.encoder_layers if name == "decoder" else 0
    size, repeats = len(runs[i][0]), runs[i][1]
    return range(start + j, start + size * repeats, size), tuple(path[2:])


def unstack_layers(config: ModelConfig, tree: dict[str, Any]) -> dict[tuple[int, tuple[str, ...]], Any]:
    """Parameters, or moments of them, as {(layer, path within the block): one layer's array}; -1: outside layers."""
    flat: dict[tuple[int, tuple[str, ...]], Any] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = tuple(key.key for key in key_path)
        stacked = stacked_layers(config, path)
        if stacked is None:
            flat[-1, path] = leaf
        else:
            flat |= {(layer, stacked[1]): leaf[repeat] for repeat, layer in enumerate(stacked[0])}
    return flat


def restack_layers(config: ModelConfig, like: dict[str, Any], flat: dict[tuple[int, tuple[str, ...]], Any]) -> Any:
    """Undo :func:`unstack_layers`: a tree of NumPy arrays with the structure of ``like``."""

    def leaf(key_path: tuple[Any, ...], _: Any) -> Any:
        path = tuple(key.key for key in key_path)
        stacked = stacked_layers(config, path)
        if stacked is None:
            return flat[-1, path]
        return np.stack([flat[layer, stacked[1]] for layer in stacked[0]])

    return jax.tree_util.tree_map_with_path(leaf, like)
