"""Merging of experts, after permuting their hidden units to fit each other."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import optimize

from moe.analysis import surgery
from moe.config import ModelConfig
from moe.models.segments import restack_layers, unstack_layers

#: Axis of the hidden units in one expert's arrays; ``down_bias`` has none.
_HIDDEN = {"up": 1, "gate": 1, "up_bias": 0, "gate_bias": 0, "down": 0}


def absorb(
    model: ModelConfig, parameters: dict[str, Any], biases: dict[str, Any], kept: np.ndarray, usage: np.ndarray
) -> surgery.Model:
    """A model of the kept experts only, into which the other experts are merged.

    An expert joins the kept one with the most similar router column (cosine). The weights of a group are averaged by
    usage, after the hidden units of each are permuted to fit the kept expert's; the kept expert's column stays. Li et
    al. merge in this way (2023, "Merge, then compress", arXiv 2310.01334, section 3.2), but group by router logits.

    Args:
        model: config of a model whose router scores tokens.
        parameters: of the whole model.
        biases: its selection biases; empty without.
        kept: [L,E'] experts of each MoE layer.
        usage: [L,E] weights of the averages, such as shares of the assignments.

    Raises:
        ConfigError: too few experts for the gate, or a model that cannot be cut.
    """
    surgery.check(model)
    flat = unstack_layers(model, parameters)
    for number, layer in enumerate(surgery.moe_layers(model)):
        arrays = {
            path[2]: np.array(array)
            for (own, path), array in flat.items()
            if own == layer and path[:2] == ("moe", "experts")
        }
        columns = np.asarray(flat[layer, ("moe", "router", "kernel")], np.float64)[:, : model.moe.num_experts]
        columns = columns / np.maximum(np.linalg.norm(columns, axis=0), 1e-30)
        stays = kept[number].tolist()
        groups: dict[int, list[int]] = {home: [home] for home in stays}
        for expert in sorted(set(range(columns.shape[1])) - set(stays)):
            groups[stays[int(np.argmax(columns[:, expert] @ columns[:, stays]))]].append(expert)
        for home, group in groups.items():
            shares = np.maximum(usage[number, group], 1e-12)
            merged = _average(arrays, home, group, shares / shares.sum())
            for name, array in merged.items():
                arrays[name][home] = array
        flat |= {(layer, ("moe", "experts", name)): array for name, array in arrays.items()}
    return surgery.prune(model, restack_layers(model, parameters, flat), biases, kept)


def _average(arrays: dict[str, np.ndarray], home: int, group: list[int], shares: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays of the expert into which a group is merged."""
    total = {name: np.zeros(array.shape[1:]) for name, array in arrays.items()}
    for expert, share in zip(group, shares, strict=True):
        order = match_units(arrays, home, expert)
        for name, array in arrays.items():
            own = array[expert]
            total[name] += share * (np.take(own, order, axis=_HIDDEN[name]) if name in _HIDDEN else own)
    return {name: array.astype(arrays[name].dtype) for name, array in total.items()}


def match_units(arrays: dict[str, np.ndarray], one: int, other: int) -> np.ndarray:
    """The hidden unit of the other expert that matches each of the first's, [F]: the permutation with the largest sum
    of inner products of their weights (Hungarian method)."""
    similar: Any = 0.0
    for name, axis in _HIDDEN.items():
        if name in arrays:
            a, b = (np.moveaxis(arrays[name][expert].astype(np.float64), axis, 0) for expert in (one, other))
            similar = similar + a.reshape(len(a), -1) @ b.reshape(len(b), -1).T
    return optimize.linear_sum_assignment(similar, maximize=True)[1]
