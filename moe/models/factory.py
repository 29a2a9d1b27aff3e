"""The model of a config, and its parameters as shapes."""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import nnx

from moe.config import LoraConfig, ModelConfig
from moe.layers.router import SelectionBias
from moe.models.adapters import initial_adapters
from moe.models.decoder import Transformer
from moe.models.encoder_decoder import EncoderDecoder
from moe.parallel.parameters import parameter_specs

#: A model of either kind.
Model = Transformer | EncoderDecoder


def create_model(config: ModelConfig, *, rngs: nnx.Rngs) -> Model:
    """The model of a config, with random parameters."""
    return (EncoderDecoder if config.encoder_layers else Transformer)(config, rngs=rngs)


def abstract_model(config: ModelConfig) -> Model:
    """The model with ShapeDtypeStructs as parameters; nothing is allocated. Each call makes new modules."""
    return nnx.clone(_traced_model(config))


@functools.cache
def _traced_model(config: ModelConfig) -> Model:
    """Trace the model of a config once; callers get clones, so that this one never changes."""
    return nnx.eval_shape(lambda: create_model(config, rngs=nnx.Rngs(0)))


def abstract_parameters(config: ModelConfig) -> nnx.State:
    """Parameters of a model with ShapeDtypeStructs as values."""
    return nnx.state(abstract_model(config), nnx.Param)


def abstract_selection_biases(config: ModelConfig) -> nnx.State:
    """The routers' selection biases with ShapeDtypeStructs as values; empty for gates without them."""
    return nnx.state(abstract_model(config), SelectionBias)


def abstract_trained(model: ModelConfig, lora: LoraConfig) -> nnx.State:
    """Parameters that a run trains, with ShapeDtypeStructs as values: those of its model, or adapters of them."""
    parameters = abstract_parameters(model)
    if not lora.rank:
        return parameters
    return jax.eval_shape(lambda base: initial_adapters(base, lora, jax.random.key(0)), parameters)


def variable_specs(config: ModelConfig) -> dict[str, Any]:
    """PartitionSpecs of everything a model reads, on the mesh in context, as a nested dict."""
    return parameter_specs(nnx.state(abstract_model(config)))
