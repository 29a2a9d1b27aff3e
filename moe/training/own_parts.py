"""Checks of a user's token mixers and MoE layers on random numbers: no token may read what generation cannot know."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moe.config import Config, ConfigError, MeshConfig, ModelConfig
from moe.config.mixers import FIELD
from moe.layers.inputs import Rows
from moe.layers.mixers.interface import MixerLayer
from moe.layers.mixers.table import layer_class as mixer_class
from moe.layers.moe_layer import create_layer, layer_class
from moe.parallel.mesh import make_mesh
from moe.routing.balancing import LayerReport
from moe.routing.interface import Gate
from moe.routing.routing import Routing
from moe.system.fields import raised_as_errors
from moe.system.guarded import is_own

#: Most parameters of a part whose numbers are computed; larger ones are checked in their shapes alone.
_LARGEST = 1 << 24
_LENGTH = 8
_PROMPT = 5  # tokens


def probe_parts(config: Config) -> None:
    """Refuse a user's mixer or layer that mixes rows or documents, reads later tokens, or generates something else.

    Raises:
        ConfigError: the part is named, and what it reads.
    """
    parts = [*map(layer_class, config.model.moe.gates), *map(mixer_class, filter(None, [config.model.mixer]))]
    if not any(map(is_own, parts)):
        return
    model = dataclasses.replace(config.model, dtype="float32")
    with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.local_devices()[:1])):
        mixer = model.mixer
        if mixer is not None and is_own(mixer_class(mixer)):
            where, kind = f"{FIELD}={mixer.name!r}", mixer_class(mixer)
            with raised_as_errors(f"{where}: it"):
                _probe_mixer(where, model, lambda: kind(model, mixer, rngs=nnx.Rngs(0)))
        for gate in {layer_class(gate): gate for gate in model.moe.gates}.values():
            if is_own(layer_class(gate)) and not gate.looks_ahead:
                with raised_as_errors(f"gate {gate.name!r}: its layer"):
                    _probe_layer(model, gate)


def _is_small(make: Callable[[], nnx.Module]) -> bool:
    parameters = nnx.state(nnx.eval_shape(make), nnx.Param)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters)) <= _LARGEST


def _probe_mixer(where: str, model: ModelConfig, make: Callable[[], MixerLayer]) -> None:
    if not _is_small(make):
        return
    layer = nnx.jit(make)()
    # Two rows: documents of five and three tokens, and one of six with padding.
    documents = jnp.asarray([[1] * 5 + [2] * 3, [1] * 6 + [0] * 2])
    positions = jnp.asarray([[*range(5), *range(3)], [*range(6), 0, 0]])
    x, other = (jax.random.normal(jax.random.key(seed), (2, _LENGTH, model.d_model)) for seed in (1, 2))
    ids = jnp.arange(2 * _LENGTH).reshape(2, _LENGTH) % model.vocab_size

    def mixed(x: Array, ids: Array) -> Array:
        return layer.join(layer.prefill(x, Rows(ids, documents, positions))[0], x)

    mix = jax.jit(mixed)
    y = mix(x, ids)
    _require(bool(jnp.isfinite(y[documents > 0]).all()), where, "its output is not finite")
    row, place = (jnp.arange(size) for size in (2, _LENGTH))
    first = (row == 0)[:, None]
    for kept, what in (
        (jnp.broadcast_to(first, documents.shape), "other rows"),
        (first & (place < 3), "later tokens"),
        (first & (place >= 5), "other documents"),
        (~first & (place < 6), "padding, or other rows"),
    ):
        changed = mix(jnp.where(kept[..., None], x, other), jnp.where(kept, ids, ids[::-1, ::-1]))
        _require(_alike(changed[kept], y[kept]), where, f"its output for a token depends on {what}")
    _probe_generation(where, model, layer, x)


def _probe_generation(where: str, model: ModelConfig, layer: MixerLayer, x: Array) -> None:
    """Compare rows that are read at once with a prompt, padded in one row, and one token after another."""
    ids = jnp.arange(2 * _LENGTH).reshape(2, _LENGTH) % model.vocab_size
    lengths = jnp.asarray([_PROMPT, _PROMPT - 2])
    place = jnp.broadcast_to(jnp.arange(_LENGTH), ids.shape)

    @jax.jit
    def whole() -> Array:
        return layer.join(layer.prefill(x, Rows(ids, jnp.ones_like(ids), place))[0], x)

    @jax.jit
    def steps() -> Array:
        real = (place < lengths[:, None]).astype(jnp.int32)[:, :_PROMPT]
        rows = Rows(ids[:, :_PROMPT], real, place[:, :_PROMPT] * real)
        empty = type(layer).empty_state(model, layer.mixer, (1, 2), _LENGTH)
        found = layer.prefill(x[:, :_PROMPT], rows)[1]
        state, outputs = layer.fill(jax.tree.map(lambda leaf: leaf[0], empty), found, lengths), []
        for i in range(_LENGTH - _PROMPT):
            at = (lengths + i)[:, None]
            token = jnp.take_along_axis(x, at[..., None], axis=1)
            rows = Rows(jnp.take_along_axis(ids, at, axis=1), jnp.ones_like(at), at)
            heads, state = layer.step(token, rows, state)
            outputs.append(layer.join(heads, token))
        return jnp.concatenate(outputs, axis=1)

    at = lengths[:, None] + jnp.arange(_LENGTH - _PROMPT)
    expected = jnp.take_along_axis(whole(), at[..., None], axis=1)
    _require(_alike(steps(), expected), where, "prefill and step give a token that is generated another output")


def _probe_layer(model: ModelConfig, gate: Gate) -> None:
    moe = model.moe
    capacity = dataclasses.replace(moe.capacity, eval=float(moe.num_experts))  # drops nothing
    settings = dataclasses.replace(model, moe=dataclasses.replace(moe, group_size=0, capacity=capacity))
    own = None if gate == moe.gate else gate

    def make() -> nnx.Module:
        return create_layer(settings, gate=own, rngs=nnx.Rngs(0))

    if not _is_small(make):
        return
    layer: Any = nnx.jit(make)()
    x, other = (jax.random.normal(jax.random.key(seed), (2, _LENGTH, model.d_model)) for seed in (1, 2))
    ids, ones = jnp.arange(2 * _LENGTH).reshape(2, _LENGTH) % model.vocab_size, jnp.ones((2, _LENGTH), jnp.int32)
    kept = (jnp.arange(2) == 0)[:, None] & (jnp.arange(_LENGTH) % 2 == 0)

    where = f"gate {gate.name!r}"

    @jax.jit
    def output(x: Array, ids: Array, mask: Array) -> Array:
        found = layer(x, mask, token_ids=ids, segment_ids=ones)
        kinds = [type(part) for part in found]
        right = len(kinds) == 3 and kinds[1:] == [LayerReport, Routing]
        names = ", ".join("Array" if isinstance(part, Array) else type(part).__name__ for part in found)
        _require(right, where, f"its layer must return y, a LayerReport and a Routing, not {names}")
        shape = list(jnp.shape(found[1].sparsity_penalty))
        _require(
            not shape, where, f"the sparsity_penalty that its layer reports must be a number, not an array {shape}"
        )
        return found[0]

    y = output(x, ids, ones > 0)
    _require(bool(jnp.isfinite(y).all()), where, "the output of its layer is not finite")
    alone = "the output of its layer for a token depends on other tokens, and the gate has no looks_ahead = True"
    for left in (kept, kept[::-1, ::-1]):  # of the first row, and of the last one without its first token
        mask = left | (jnp.arange(_LENGTH) % 4 != 3)
        changed = output(jnp.where(left[..., None], x, other), jnp.where(left, ids, ids[::-1, ::-1]), mask)
        _require(_alike(changed[left], y[left]), where, alone)


def _alike(one: Array, other: Array) -> bool:
    return np.allclose(one, other, rtol=1e-3, atol=1e-4 * float(jnp.max(jnp.abs(other), initial=0.0)))


def _require(holds: bool, where: str, what: str) -> None:
    if not holds:
        raise ConfigError(f"{where}: {what}")
