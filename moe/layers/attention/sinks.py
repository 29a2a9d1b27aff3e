"""Attention sinks (gpt-oss): every query of a head also sees a key of a learnt logit and no value."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

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
