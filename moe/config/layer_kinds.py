"""Which layers are MoE and which have a window."""

from __future__ import annotations

from typing import NamedTuple

from moe.config.schema import ModelConfig


class LayerKind(NamedTuple):
    """What distinguishes one layer from another."""

    sparse: bool  # MoE
    window: int  # tokens a query sees, itself included; 0: all


def sparse_layers(config: ModelConfig) -> tuple[bool, ...]:
    """[L] which layers are MoE."""
    moe = config.moe
    if moe.gate != "none" and moe.layers:
        return tuple(layer in moe.layers for layer in range(config.num_layers))
    return tuple(
        moe.gate != "none" and layer >= moe.first_dense and (layer + 1) % moe.every == 0
        for layer in range(config.num_layers)
    )


def layer_kinds(config: ModelConfig) -> tuple[LayerKind, ...]:
    """[L] the kind of each layer."""
    windowed = config.sliding_window_layers or range(config.num_layers)
    return tuple(
        LayerKind(sparse, config.sliding_window if layer in windowed else 0)
        for layer, sparse in enumerate(sparse_layers(config))
    )
