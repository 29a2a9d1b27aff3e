"""Kind of each layer: dense or MoE, and its attention window."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

from moe.config.schema import ModelConfig

#: Layers of an encoder see both sides; those of an encoder-decoder's decoder also attend to the encoder's output.
Role = Literal["decoder", "encoder", "cross"]


class LayerKind(NamedTuple):
    """Properties in which layers of one model differ."""

    sparse: bool  # MoE
    window: int  # tokens a query attends to, including its own; 0: all
    role: Role = "decoder"
    gate: str = "none"  # routing rule of an MoE layer


def sparse_layers(config: ModelConfig) -> tuple[bool, ...]:
    """True for each MoE layer, in layer order: an encoder's layers come before the decoder's."""
    moe = config.moe
    if moe.gate is not None and moe.layers:
        return tuple(layer in moe.layers for layer in range(config.encoder_layers + config.num_layers))
    return tuple(
        moe.gate is not None and layer >= moe.first_dense and (layer + 1) % moe.every == 0
        for stack in (config.encoder_layers, config.num_layers)
        for layer in range(stack)
    )


def layer_kinds(config: ModelConfig) -> tuple[LayerKind, ...]:
    """Kind of each layer, in layer order."""
    return tuple(kind for kinds in stacks(config).values() for kind in kinds)


@functools.lru_cache
def stacks(config: ModelConfig) -> dict[str, tuple[LayerKind, ...]]:
    """Kinds of the layers of each stack, by its name in the tree of parameters; "" for the one of a decoder-only
    model."""
    sparse = sparse_layers(config)
    own = iter((*config.moe.layer_gates, *(config.moe.gate_name,) * len(sparse)))
    gates = [next(own) if is_sparse else "none" for is_sparse in sparse]
    if config.encoder_layers:
        kinds = list(zip(sparse, gates, strict=True))
        encoder, decoder = kinds[: config.encoder_layers], kinds[config.encoder_layers :]
        return {
            "encoder": tuple(LayerKind(is_sparse, 0, "encoder", gate) for is_sparse, gate in encoder),
            "decoder": tuple(LayerKind(is_sparse, 0, "cross", gate) for is_sparse, gate in decoder),
        }
    windowed = config.sliding_window_layers or range(config.num_layers)
    windows = [config.sliding_window if layer in windowed else 0 for layer in range(config.num_layers)]
    return {
        "": tuple(
            LayerKind(is_sparse, window, gate=gate)
            for is_sparse, window, gate in zip(sparse, windows, gates, strict=True)
        )
    }
