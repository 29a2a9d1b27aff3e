"""Experts' weights as the grouped matmuls of TPUs read them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moe.dispatch.backends import packed
from moe.dispatch.backends.gated import ACTIVATIONS
from moe.dispatch.backends.packed import PackedWeights
from moe.dispatch.ffn import ExpertWeights
from moe.parallel import target
from moe.parallel.mesh import axis_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TpuWeights(PackedWeights):
    """Weights of TPUs.

    Attributes:
        fsdp_sharded: the matrices have one device's part of D, over ``fsdp``, which products gather in 8 bits. Static.
    """

    fsdp_sharded: bool = dataclasses.field(default=False, kw_only=True, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Interleaved(TpuWeights):
    """Weights of kernels that also compute the nonlinearity (:mod:`moe.dispatch.backends.gated`).

    Attributes:
        up: up and gate in alternating blocks of LANES columns, [E,D,2F'] with F' a multiple of LANES.
        biases: likewise, [E,2F'], and None.
        down: padded to F' too.
    """

    def separated(self) -> TpuWeights:
        """Up and gate as two matrices, still padded."""

        # [...,2F] → [...,F/LANES,2,LANES] → 2 x [...,F]
        def part(array: Array, index: int) -> Array:
            lanes = array.reshape(*array.shape[:-1], -1, 2, target.LANES)
            return lanes[..., index, :].reshape(*array.shape[:-1], -1)

        biases = None if self.biases is None else (part(self.biases[0], 0), part(self.biases[0], 1))
        fields: dict[str, Any] = vars(self) | {"up": part(self.up, 0), "gate": part(self.up, 1), "biases": biases}
        return TpuWeights(**fields)


def pack(weights: ExpertWeights) -> TpuWeights:
    """Join up and gate, interleaved where the kernels with the nonlinearity take them."""
    if weights.gate is not None and are_activated_by_kernels(weights):
        return _interleaved(weights, weights.gate)
    return TpuWeights(**vars(packed.pack(weights)))


def pack_shards(shards: ExpertWeights) -> TpuWeights:
    """:func:`moe.dispatch.backends.packed.pack_shards`, or shards that products gather themselves."""
    weights = pack(packed.with_transposed_down(shards))
    if are_gathered_in_products(weights):
        return dataclasses.replace(weights, fsdp_sharded=True)
    return packed.gathered(weights)


def are_gathered_in_products(weights: ExpertWeights) -> bool:
    """Whether products quantise one device's shards and gather the quantised ones: in a layer without exchange, where
    each matrix is in few products."""
    return weights.precision != "none" and axis_size("expert") == 1


def are_activated_by_kernels(weights: ExpertWeights) -> bool:
    """Whether the target's grouped matmuls also compute the nonlinearity, from interleaved up and gate."""
    is_plain = weights.dropout is None and weights.up.dtype == jnp.bfloat16
    return target.current().runs_tpu_kernels and is_plain and weights.activation in ACTIVATIONS


def _interleaved(weights: ExpertWeights, gate: Array) -> Interleaved:
    missing = -gate.shape[-1] % target.LANES

    def pad(array: Array, dim: int = -1) -> Array:
        widths = [(0, 0)] * array.ndim
        widths[dim] = (0, missing)
        # XLA for TPUs would fuse the gradient, a slice, with the reduce-scatter before it, and get its shape wrong.
        return jax.lax.optimization_barrier(jnp.pad(array, widths)) if missing else array

    def alternate(up: Array, gate: Array) -> Array:
        # 2 x [...,F] → [...,F/LANES,2,LANES] → [...,2F]
        parts = [pad(array).reshape(*array.shape[:-1], -1, target.LANES) for array in (up, gate)]
        return jnp.stack(parts, axis=-2).reshape(*up.shape[:-1], -1)

    biases = None
    if weights.biases is not None and weights.biases[1] is not None:
        biases = alternate(weights.biases[0], weights.biases[1]), None
    down = pad(weights.down, -1 if weights.down_transposed else -2)
    changed: dict[str, Any] = {"up": alternate(weights.up, gate), "gate": None, "down": down, "biases": biases}
    return Interleaved(**vars(weights) | changed)
