"""The layer of every token mixer."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe.config import ModelConfig
from moe.config.mixers import FIELD, GatedDelta, GroupedQuery, KimiDelta, Mixer, MultiHeadLatent, SwitchHead
from moe.layers.inputs import Rows
from moe.layers.mixers.attention import Attention
from moe.layers.mixers.delta_net import GatedDeltaNet
from moe.layers.mixers.interface import MixerLayer
from moe.layers.mixers.kimi_delta import KimiDeltaAttention
from moe.layers.mixers.latent import LatentAttention
from moe.layers.mixers.switch_head import SwitchHeadAttention
from moe.system.fields import ConfigError, raised_as_errors, require

#: Layer by the class of its mixer.
LAYERS: Mapping[type[Mixer], type[MixerLayer]] = types.MappingProxyType(
    {
        GroupedQuery: Attention,
        MultiHeadLatent: LatentAttention,
        GatedDelta: GatedDeltaNet,
        SwitchHead: SwitchHeadAttention,
        KimiDelta: KimiDeltaAttention,
    }
)


def layer_class(mixer: Mixer) -> type[MixerLayer]:
    """Class of a mixer's layer.

    Raises:
        ConfigError: it names none, or something else.
    """
    kind: Any = mixer.layer or next((LAYERS[cls] for cls in type(mixer).__mro__ if cls in LAYERS), None)
    if not (isinstance(kind, type) and issubclass(kind, MixerLayer)):
        raise ConfigError(f"{FIELD}={mixer.name!r}: its layer={kind!r}: must be a class derived from moe.MixerLayer")
    return kind


def probe(config: ModelConfig, mixer: Mixer) -> None:
    """Check the shapes of a user's mixer, in training and in generation; nothing is computed.

    Raises:
        ConfigError: an exception in its code, an output other than [B,T,D] in the compute dtype, costs that are no
            numbers, or a state that :meth:`MixerLayer.step` changes in structure, shape or dtype.
    """
    where, batch, length = f"{FIELD}={mixer.name!r}", 2, 8
    kind = layer_class(mixer)

    def run(length: int, state: Any) -> tuple[Any, Any]:
        ones = jnp.ones((batch, length), jnp.int32)
        rows = Rows(ones, ones, jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ones.shape))
        x = jnp.zeros((batch, length, config.d_model), config.dtype)
        layer = kind(config, mixer, rngs=nnx.Rngs(0))
        if state is not None:
            heads, state = layer.step(x, rows, state)
        else:
            heads, found = layer.prefill(x, rows)
            empty = jax.tree.map(lambda leaf: leaf[0], kind.empty_state(config, mixer, (1, batch), length))
            state = layer.fill(empty, found, jnp.full(batch, length, jnp.int32))
        return layer.join(heads, x), state

    with raised_as_errors(f"{where}: it"):
        costs = (mixer.flops(length), *mixer.activations(1, 1))
        whole, state = jax.eval_shape(lambda: run(length, None))
        one, after = jax.eval_shape(lambda state: run(1, state), state)
    numbers = all(isinstance(cost, (int, float)) for cost in costs)
    require(numbers, f"{where}: its flops and activations", costs, "must be numbers")
    for name, y, tokens in (("prefill", whole, length), ("step", one, 1)):
        wanted = jax.ShapeDtypeStruct((batch, tokens, config.d_model), jnp.dtype(config.dtype))
        found = (getattr(y, "shape", None), getattr(y, "dtype", None))
        fits = found == (wanted.shape, wanted.dtype)
        require(fits, f"{where}: output after {name}", found, f"must be {wanted.dtype.name}{list(wanted.shape)}")
    empty = jax.eval_shape(lambda: kind.empty_state(config, mixer, (1, batch), length))
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), tree) for tree in (state, after)]
    first = jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype.name), empty)
    same = first == shapes[0] == shapes[1]
    require(same, f"{where}: its state", shapes[1], f"must stay as empty_state makes it, {first}")
