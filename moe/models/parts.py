"""Parts of each kind of layer, in order; one table for training, evaluation and generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array, Float

from moe.config import ModelConfig
from moe.config.layer_kinds import LayerKind
from moe.layers.call import Call, Report
from moe.layers.cross_attention import CrossAttention
from moe.layers.ffn import DenseFFN
from moe.layers.handed_on import HandedOn, first_handed
from moe.layers.inputs import Site
from moe.layers.mixers.table import layer_class
from moe.layers.moe_layer import create_layer
from moe.layers.ngram_memory import NgramMemory
from moe.layers.prompt import KeepsPrompt
from moe.layers.shortcut import Late, Shortcut, first_late

#: (layer, its input [B,T,D], call) → (output [B,T,D], report)
Run = Callable[[Any, Array, Call], tuple[Array, Report]]


def run_layer(layer: Any, x: Array, call: Call) -> tuple[Array, Report]:
    """Apply a layer as it is."""
    return layer.run(x, call)


class Part(NamedTuple):
    """One part of a block.

    Attributes:
        scope: name of the part in profiles and plans.
        layer: attribute of the block that holds its layer.
        norm: ``NORM_norm`` is the block's norm before the part, or after it with ``model.norms="after"``; None: the
            layer has its own.
        site: of the dropout of the output; None: the layer has its own.
        run: applies the layer.
    """

    scope: str
    layer: str
    norm: str | None = None
    site: Site | None = None
    run: Run = run_layer


def create_parts(config: ModelConfig, kind: LayerKind, rngs: nnx.Rngs) -> Iterator[tuple[Part, nnx.Module]]:
    """Parts of a layer of this kind with their layers, in order."""
    if kind.memory is not None:
        yield Part("memory", "memory"), NgramMemory(config, kind.memory, rngs=rngs)
    mixer = Part("attention", kind.mixer.path, "attention", Site.ATTENTION_OUTPUT)
    yield mixer, layer_class(kind.mixer)(config, kind.mixer, rngs=rngs)
    if kind.role == "cross":
        yield Part("cross_attention", "cross"), CrossAttention(config, rngs=rngs)
    if kind.gate is None:
        yield Part("ffn", "dense", "ffn", Site.FFN_OUTPUT), DenseFFN(config, config.d_ff, rngs=rngs)
        if config.moe.shortcut:
            yield Part("ffn", "late"), Late()
        return
    run: Run = run_layer
    if kind.gate.keeps_prompt:
        run = KeepsPrompt(run)
    if _hands_on(config):
        run = HandedOn(run)
    if config.moe.shortcut:
        run = Shortcut(run)
    yield Part("moe", "moe", "ffn", Site.FFN_OUTPUT, run), create_layer(config, gate=kind.gate, rngs=rngs)


def handed_to_first(config: ModelConfig, kinds: tuple[LayerKind, ...], x: Float[Array, "B T D"]) -> dict[str, Any]:
    """Input of the first layer of a stack in the place of what a layer below hands on. Raises ConfigError if routers
    hand on different shapes."""
    handed = first_late(x) if config.moe.shortcut else {}
    if _hands_on(config):
        handed |= first_handed(config.moe, kinds, x.shape[:2])
    return handed


def _hands_on(config: ModelConfig) -> bool:
    """Whether a router of the model hands anything on to that of the next MoE layer."""
    return any(gate.hands_on for gate in config.moe.gates)
