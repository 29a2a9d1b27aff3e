"""Settings of attention beside its arrays, as every implementation takes them, and attention sinks."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from moe.layers.basic import KEEP_ALL, Dropout


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Which keys a query sees, and what their weights depend on beside query·key.

    Attributes:
        window: positions a query sees, its own included; 0: all.
        causal: a query sees earlier positions and its own; else all.
        bias: of the distances 1 − T … T − 1 (:meth:`moe.layers.attention.positions.RelativeBias.by_distance`).
        prefix: 1 for keys that all queries of their document see, whatever ``causal``.
        scale: of the products; None: 1/sqrt(H).
        drop: dropout of the weights.
        sinks: logit of a further key without a value (:mod:`moe.layers.attention.scoring`); None: none.
    """

    window: int = 0
    causal: bool = True
    bias: Float[Array, "N D"] | None = None
    prefix: Int[Array, "B U"] | None = None
    scale: float | None = None
    drop: Dropout = KEEP_ALL
    sinks: Float[Array, " N"] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the kernels of :mod:`moe.layers.attention.cpu` and :mod:`moe.layers.attention.tpu` compute it."""
        return self.causal and self.bias is None and self.prefix is None and not self.drop.active

    def factor(self, head_dim: int) -> float:
        """Factor of query·key."""
        return head_dim**-0.5 if self.scale is None else self.scale


def sees(distance: Int[Array, "*batch"], window: int) -> Bool[Array, "*batch"]:
    """Whether a query of a causal model sees a key so many positions before it.

    Args:
        distance: of the key.
        window: positions that a query sees, its own included; 0: all.
    """
    return (distance >= 0) & ((distance < window) if window else True)


#: Keys, and dimensions of a head, that a sink adds: one of each is used, and cuDNN takes multiples of this.
ADDED = 8


def append_sink(
    sinks: Float[Array, " N"],
    query: Float[Array, "B T N H"],
    key: Float[Array, "B U M H"],
    value: Float[Array, "B U M H"],
    mask: Bool[Array, "B *heads T U"],
    bias: Float[Array, "B N T U"] | None,
    scale: float,
) -> tuple[Array, Array, Array, Array, Array | None]:
    """Queries, keys, values, mask and bias of an attention whose result has the sink, in its first H dimensions.

    The sink is one more key, so that every kernel computes it and its gradient: a further dimension of the queries
    holds it, and that key alone has 1 there.
    """
    head_dim = query.shape[-1]
    logit = jnp.broadcast_to((sinks / scale).astype(query.dtype)[:, None], (*query.shape[:3], 1))
    query = jnp.pad(jnp.concatenate([query, logit], axis=-1), [(0, 0)] * 3 + [(0, ADDED - 1)])
    further = [(0, 0), (0, ADDED), (0, 0), (0, ADDED)]
    key = jnp.pad(key, further).at[:, -ADDED, :, head_dim].set(1)
    columns = [(0, 0)] * (mask.ndim - 1) + [(0, ADDED)]
    mask = jnp.pad(mask, columns).at[..., -ADDED].set(True)
    bias = None if bias is None else jnp.pad(bias, [(0, 0)] * 3 + [(0, ADDED)])
    return query, key, jnp.pad(value, further), mask, bias
