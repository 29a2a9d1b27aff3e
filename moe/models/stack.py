"""Storage and scan of repeated layers."""

from __future__ import annotations

import operator
from typing import Any

import jax
from flax import nnx
from jax import Array

from moe.config import ModelConfig
from moe.config.layer_kinds import LayerKind, layer_kinds
from moe.models.block import Block

#: What the backward pass recomputes. "none": nothing; "dots": all but matmuls without a batch axis; "full": the layer.
REMAT_POLICIES: dict[str, Any] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def segments(config: ModelConfig) -> list[tuple[tuple[LayerKind, ...], int]]:
    """The layers as (unit, repeats) runs: a unit is a pattern of blocks, repeated.

    Example: MoE in every second of 12 layers is [((dense, sparse), 6)]; all but the first of 4 is
    [((dense,), 1), ((sparse,), 3)].
    """
    layers = layer_kinds(config)
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
    return runs


def split_layers(config: ModelConfig, layers: Any) -> list[list[Any]]:
    """What belongs to each MoE layer, by segment and by MoE block of its unit, stacked over the repeats.

    Args:
        config: of the model.
        layers: a tree whose arrays lead with the number of MoE layers, in layer order; or None.
    """
    result, start = [], 0
    for unit, repeats in segments(config):
        sparse = sum(kind.sparse for kind in unit)
        # [L,...] → [R·unit,...], of which every unit-th: [R,...]
        stop = start + sparse * repeats
        result.append(
            [jax.tree.map(operator.itemgetter(slice(start + i, stop, sparse)), layers) for i in range(sparse)]
        )
        start = stop
    return result


def selection_biases(config: ModelConfig, layers: Array) -> dict[str, Any]:
    """The nested dict in which a model keeps one [E] of every MoE layer as its router's bias. layers: [L,E]."""
    biases: dict[str, Any] = {}
    for i, blocks in enumerate(split_layers(config, layers)):
        stacked = iter(blocks)
        for j, kind in enumerate(segments(config)[i][0]):
            if kind.sparse:
                biases.setdefault(f"segment_{i}", {})[f"block_{j}"] = {"moe": {"router": {"bias": next(stacked)}}}
    return biases


class Segment(nnx.Module):
    """Blocks of one unit, each with parameters stacked over the repeats (:func:`segments`)."""

    def __init__(self, config: ModelConfig, unit: tuple[LayerKind, ...], *, rngs: nnx.Rngs):
        self.size = len(unit)
        for i, kind in enumerate(unit):
            setattr(self, f"block_{i}", Block(config, kind, rngs=rngs))

    @staticmethod
    def stacked(config: ModelConfig, unit: tuple[LayerKind, ...], repeats: int, *, rngs: nnx.Rngs) -> Segment:
        """Every repeat drawn from its own key, then stacked along a new leading axis."""

        @nnx.vmap
        def create(key: Array) -> Segment:
            return Segment(config, unit, rngs=nnx.Rngs(params=key))

        return create(jax.random.split(rngs.params(), repeats))

    def blocks(self) -> list[Block]:
        """The blocks of the unit, in order."""
        return [getattr(self, f"block_{i}") for i in range(self.size)]


def parameter_layers(config: ModelConfig, path: tuple[str, ...]) -> tuple[tuple[int, ...], str]:
    """Numbers of the layers that a parameter's leading axis runs over, and its dotted name within the block.

    A parameter outside the blocks has no layers, (), and its name is the whole path.
    """
    if not path[0].startswith("segment_"):
        return (), ".".join(path)
    first = 0
    for i, (unit, repeats) in enumerate(segments(config)):
        if path[0] == f"segment_{i}":
            start = first + int(path[1].removeprefix("block_"))
            return tuple(range(start, start + len(unit) * repeats, len(unit))), ".".join(path[2:])
        first += len(unit) * repeats
    raise KeyError(path[0])
