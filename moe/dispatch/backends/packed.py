"""Experts' weights as grouped matmuls of accelerators read them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from moe.dispatch.ffn import GATED_ACTIVATIONS, ExpertWeights
from moe.parallel.parameters import gather_shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeights(ExpertWeights):
    """Weights with gate beside up in one matrix: rows are read once, and their gradient is one product instead of a sum
    of two.

    Attributes:
        up: [E,D,2F] of a gated FFN, whose ``gate`` is None; [E,D,F] of a plain one.
        down: [E,F,D], or [E,D,F] if ``down_transposed``.
        down_transposed: static.
    """

    down_transposed: bool = dataclasses.field(default=False, kw_only=True, metadata={"static": True})  # pyright: ignore

    def split(self, products: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
        """Both halves of the columns of a gated FFN."""
        joined = products[1] is None and self.activation in GATED_ACTIVATIONS
        return halves(products[0]) if joined else products


def with_transposed_down(weights: ExpertWeights) -> PackedWeights:
    """Separate matrices, with down as [E,D,F]."""
    fields: dict[str, Any] = vars(weights) | {"down": weights.down.swapaxes(1, 2), "down_transposed": True}
    return PackedWeights(**fields)


def pack(weights: ExpertWeights) -> PackedWeights:
    """Join up and gate."""
    packed = weights if isinstance(weights, PackedWeights) else PackedWeights(**vars(weights))
    if packed.gate is None:
        return packed
    return dataclasses.replace(packed, up=jnp.concatenate([packed.up, packed.gate], axis=-1), gate=None)


def pack_shards(shards: ExpertWeights) -> PackedWeights:
    """One device's experts, within ``shard_map``, gathered over ``fsdp`` from shards.

    Up and gate are joined, and down is transposed, while they are shards, so that no whole matrix is copied, as
    gradients scattered over the last dimension would be.
    """
    return gathered(pack(with_transposed_down(shards)))


def gathered[W: PackedWeights](packed: W) -> W:
    """Packed shards, with transposed down, gathered over ``fsdp``."""
    return dataclasses.replace(packed, up=gather_shard(packed.up, 1), down=gather_shard(packed.down, 1))


@jax.custom_vjp
def halves(joined: Float[Array, "R J"]) -> tuple[Float[Array, "R F"], Float[Array, "R F"]]:
    """Split joined columns into up and gate. Both gradients are written straight into one array: XLA would write them
    twice, separately and then concatenated."""
    up, gate = jnp.split(joined, 2, axis=-1)
    return up, gate


def _halves_bwd(_: None, gradients: tuple[Array, Array]) -> tuple[Array]:
    up, gate = gradients
    joined = jax.lax.empty((*up.shape[:-1], 2 * up.shape[-1]), up.dtype)
    joined = jax.lax.dynamic_update_slice_in_dim(joined, up, 0, axis=-1)
    return (jax.lax.dynamic_update_slice_in_dim(joined, gate, up.shape[-1], axis=-1),)


halves.defvjp(lambda joined: (halves(joined), None), _halves_bwd)
