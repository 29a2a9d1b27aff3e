"""Attention under a mask, in one piece: by XLA's matmuls or by cuDNN's kernel."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

#: Rows that a sink adds to keys and dimensions that it adds to heads: one of each is used, and cuDNN takes multiples.
_ALIGNMENT = 8


def visible_keys(
    query_positions: Int[Array, " Q"],
    key_positions: Int[Array, " U"],
    query_segments: Int[Array, "B Q"],
    key_segments: Int[Array, "B U"],
    window: int,
) -> Bool[Array, "B 1 Q U"]:
    """Whether a query sees a key: in its document, not later, and among the last ``window`` positions (0: any)."""
    distance = query_positions[:, None] - key_positions
    visible = (distance >= 0) & ((distance < window) if window else True)
    return (visible & (query_segments[:, :, None] == key_segments[:, None, :]))[:, None]


def masked_attention(
    query: Float[Array, "B Q N H"],
    key: Float[Array, "B U M H"],
    value: Float[Array, "B U M H"],
    mask: Bool[Array, "B 1 Q U"],
    sinks: Float[Array, " N"] | None = None,
    implementation: Literal["cudnn"] | None = None,
) -> Float[Array, "B Q N H"]:
    """softmax(query·key / sqrt(H))·value over the visible keys.

    Args:
        query: N is a multiple of M.
        key: M key heads.
        value: M value heads.
        mask: visible keys.
        sinks: logit of a further key without a value that every query of a head sees (gpt-oss); None: none.
        implementation: None: XLA's.
    """
    if sinks is None:
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)
    # The sink as one more key, so that every kernel computes it and its gradient: a further dimension of the query
    # holds it and that key alone has 1 there.
    head_dim, scale = query.shape[-1], query.shape[-1] ** -0.5
    logit = jnp.broadcast_to((sinks / scale).astype(query.dtype)[:, None], (*query.shape[:3], 1))
    query = jnp.pad(jnp.concatenate([query, logit], axis=-1), [(0, 0)] * 3 + [(0, _ALIGNMENT - 1)])
    further = [(0, 0), (0, _ALIGNMENT), (0, 0), (0, _ALIGNMENT)]
    key, value = jnp.pad(key, further), jnp.pad(value, further)
    key = key.at[:, -_ALIGNMENT, :, head_dim].set(1)
    mask = jnp.pad(mask, [(0, 0)] * 3 + [(0, _ALIGNMENT)]).at[..., -_ALIGNMENT].set(True)
    heads = jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale, implementation=implementation)
    return heads[..., :head_dim]
