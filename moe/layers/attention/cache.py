"""Keys and values of earlier positions, in slots: with a window of W, position p is in slot p mod W."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moe.layers.attention.scoring import sees
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer; stacked over layers it gains a leading axis.

    Attributes:
        key: [B,W,M,H], rotated; for latent attention the latent and the rotated key, [B,W,1,R].
        value: [B,W,M,H]; None for latent attention.
        position: [B,W] int32, the position held in each slot; -1 where it is empty.
    """

    key: Array
    value: Array | None
    position: Array

    @classmethod
    def empty(
        cls, leading: tuple[int, int], slots: int, key: tuple[int, int], value: tuple[int, int] | None, dtype: str
    ) -> LayerCache:
        """A cache of layers and rows (``leading``) without positions; ``key`` and ``value`` are [heads, dim]."""

        def zeros(shape: tuple[int, int]) -> Array:
            spec = partition_specs.CACHE if shape[0] > 1 else partition_specs.CACHE_OF_ONE_HEAD
            return constrain(jnp.zeros((*leading, slots, *shape), dtype), spec)

        return cls(zeros(key), None if value is None else zeros(value), jnp.full((*leading, slots), -1, jnp.int32))

    def fill(self, key: Array, value: Array | None, lengths: Int[Array, " B"]) -> LayerCache:
        """Put the last W positions of each row into their slots."""
        slots = self.position.shape[1]
        last = lengths[:, None] - 1
        # The newest position congruent to the slot's number modulo W; negative where the prompt is too short to reach
        # it.
        position = last - (last - jnp.arange(slots)) % slots  # [B,W]
        index = jnp.maximum(position, 0)[..., None, None]

        def take(heads: Array) -> Array:
            return jnp.take_along_axis(heads, index, axis=1).astype(self.key.dtype)

        return LayerCache(take(key), None if value is None else take(value), jnp.maximum(position, -1))

    def extend(self, key: Array, value: Array | None, positions: Int[Array, "B T"]) -> LayerCache:
        """Add further positions of each row, one after another; a rejected one is overwritten by its successor."""
        cache = self
        for i in range(positions.shape[1]):
            one = None if value is None else value[:, i : i + 1]
            cache = cache._append(key[:, i : i + 1], one, positions[:, i])
        return cache

    def _append(self, key: Array, value: Array | None, positions: Array) -> LayerCache:
        """Put position p of each row into slot p mod W: by selection, since a scatter would move rows between
        devices."""
        slots = self.position.shape[1]
        slot = jnp.arange(slots) == (positions % slots)[:, None]  # [B,W]

        def put(new: Array, old: Array) -> Array:
            return jnp.where(slot[..., None, None], new.astype(old.dtype), old)

        kept = None if value is None or self.value is None else put(value, self.value)
        return LayerCache(put(key, self.key), kept, jnp.where(slot, positions[:, None], self.position))

    def age(self, positions: Int[Array, "B T"]) -> Int[Array, "B T W"]:
        """How many positions each slot's comes before a query's."""
        return positions[:, :, None] - self.position[:, None]

    def seen(self, positions: Int[Array, "B T"], window: int) -> Bool[Array, "B 1 T W"]:
        """Mask of the slots that queries at these positions see."""
        return ((self.position >= 0)[:, None] & sees(self.age(positions), window))[:, None]


def slots(window: int, length: int, ahead: int) -> int:
    """Slots of a row: for all ``length`` positions, or for the window where it is shorter, and ``ahead`` tokens more
    than one that come at once."""
    return min(window + ahead, length) if window else length
