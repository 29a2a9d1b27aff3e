"""Devices of the expert axis that exchange rows with one another, within ``shard_map``: all of the axis, or, where it
spans several hosts, those of one host, or those in the same place of every host."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Shaped

from moe.parallel import target
from moe.parallel.mesh import axis_of, axis_size

#: Offsets and sizes of ``jax.lax.ragged_all_to_all``, int32: slices for one device following each other.
Route = tuple[Array, Array, Array, Array]


@dataclasses.dataclass(frozen=True)
class Peers:
    """One device's peers. The axis is split into consecutive runs of equal length, one per host.

    Attributes:
        hosts: number that the axis spans; 1: all devices of the axis are peers.
        across: the peers are those in the same place of every host, instead of those of the same host.
    """

    hosts: int = 1
    across: bool = False

    @property
    def _of_host(self) -> int:
        """Devices of a host."""
        return axis_size("expert") // self.hosts

    @property
    def size(self) -> int:
        """Number of peers, this device among them."""
        return self.hosts if self.across else self._of_host

    @property
    def me(self) -> Array:
        """This device's number among its peers."""
        index = jax.lax.axis_index(axis_of("expert"))
        if self.hosts == 1:
            return index
        return index // self._of_host if self.across else index % self._of_host

    @property
    def _over(self) -> dict[str, Any]:
        """Arguments of JAX's collectives."""
        axis = {"axis_name": axis_of("expert")}
        if self.hosts == 1:
            return axis
        by_host = [[host * self._of_host + i for i in range(self._of_host)] for host in range(self.hosts)]
        return axis | {"axis_index_groups": list(zip(*by_host, strict=True)) if self.across else by_host}

    def gather(self, tree: Any) -> Any:
        """All peers' arrays: [...] → [peers,...]."""
        if not target.current().gathers_ahead:
            return jax.lax.all_gather(tree, **self._over)
        return jax.tree.map(lambda x: self.swap(jnp.broadcast_to(x, (self.size, *x.shape))), tree)

    def swap(self, parts: Array) -> Array:
        """Send the d-th part of [peers·R,...] to peer d; the part from peer s arrives as the s-th."""
        return jax.lax.all_to_all(parts, split_axis=0, concat_axis=0, tiled=True, **self._over)

    def deliver(self, rows: Shaped[Array, "R D"], num_rows: int, route: Route) -> Shaped[Array, "N D"]:
        """Send rows over a route onto a new buffer of N rows; on CPUs by :meth:`swap`, for which rows to one peer, and
        those from one, have a part of equal size."""
        if not target.current().has_ragged_exchange:
            return self.swap(rows)
        return self.send(rows, num_rows, route)

    def send(self, rows: Shaped[Array, "R D"], onto: Shaped[Array, "N D"] | int, route: Route) -> Shaped[Array, "N D"]:
        """Send rows over a route onto a buffer, or onto a new one of N rows, undefined where nothing arrives; not on
        CPUs."""
        if isinstance(onto, int):
            new = functools.partial(jax.lax.empty, (onto, rows.shape[1]), rows.dtype)
            # JAX hoists an array that depends on nothing out of a loop over layers; a branch prevents it.
            onto = jax.lax.cond(route[1][0] >= 0, new, new) if target.current().copies_hoisted_buffers else new()
        return jax.lax.ragged_all_to_all(rows, onto, *route, **self._over)


#: All devices of the axis.
EVERYONE = Peers()
