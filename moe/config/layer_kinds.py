"""Kind of each layer: dense or MoE, and its attention window."""

from __future__ import annotations

from typing import NamedTuple

from moe.config.schema import ModelConfig


class LayerKind(NamedTuple):
    """Properties in which layers of one model differ."""

    sparse: bool  # MoE
    window: int  # tokens a query attends to, including its own; 0: all
    gate: str = "none"  # routing rule of an MoE layer


def sparse_layers(config: ModelConfig) -> tuple[bool, ...]:
    """True for each MoE layer, in layer order."""
    moe = config.moe
    if moe.gate != "none" and moe.layers:
        return tuple(layer in moe.layers for layer in range(config.num_layers))
    return tuple(
        moe.gate != "none" and layer >= moe.first_dense and (layer + 1) % moe.every == 0
        for layer in range(config.num_layers)
    )


def layer_kinds(config: ModelConfig) -> tuple[LayerKind, ...]:
    """Kind of each layer, in layer order."""
    windowed, sparse = config.sliding_window_layers or range(config.num_layers), sparse_layers(config)
    gates = (*config.moe.layer_gates, *(config.moe.gate,) * config.num_layers)
    return tuple(
        LayerKind(
            is_sparse,
            config.sliding_window if layer in windowed else 0,
            gates[sum(sparse[:layer])] if is_sparse else "none",
        )
        for layer, is_sparse in enumerate(sparse)
    )
