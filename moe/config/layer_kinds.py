"""Kind of each layer: dense or MoE, and its attention window."""

from __future__ import annotations

from typing import NamedTuple

from moe.config.schema import ModelConfig


class LayerKind(NamedTuple):
    """Properties in which layers of one model differ."""

    sparse: bool  # MoE
    window: int  # tokens a query attends to, including its own; 0: all


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
    windowed = config.sliding_window_layers or range(config.num_layers)
    return tuple(
        LayerKind(sparse, config.sliding_window if layer in windowed else 0)
        for layer, sparse in enumerate(sparse_layers(config))
    )
