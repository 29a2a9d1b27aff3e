"""Layout of the parameters of repeated layers, and of other trees with a value per layer.

Equal neighbouring layers are stored stacked, under ``segment_i/block_j`` (:func:`segments`). Only this module and
:mod:`moe.models.stack`, which runs the layers, depend on it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.config import ModelConfig
from moe.config.layer_kinds import LayerKind, layer_kinds, stacks
from moe.config.mixers import PATHS

#: Name of the layers of multi-token prediction (moe.models.prediction) in a model, stacked along a leading axis.
PREDICTION = "prediction"

#: One tree per layer, grouped as the layers are stored: by segment, then by block of its unit, the arrays of each
#: stacked over the repeats.
LayerStates = list[list[Any]]


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
    for part in ("memory", "shared", "latent", "null", "router", "experts", "dense", "embedding", "unembedding"):
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


def join_layers(states: LayerStates) -> Any:
    """The states that are not None, stacked in layer order; None if all are. Undoes :func:`split_moe_layers`."""
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
