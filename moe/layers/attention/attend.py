"""Causal attention over packed documents: the implementation is chosen by the target and the config."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from moe.layers.attention.blocked import blocked_attention
from moe.layers.attention.cpu import causal_attention
from moe.layers.attention.masked import masked_attention, visible_keys
from moe.layers.attention.tpu import LANES, runs_splash, splash_attention
from moe.parallel import target


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T M H"],
    value: Float[Array, "B T M H"],
    segment_ids: Int[Array, "B T"],
    *,
    window: int,
    kind: str,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(query·key / sqrt(H))·value over earlier positions of the same document, in the dtype of the query.

    Args:
        query: N is a multiple of M.
        key: M key heads.
        value: M value heads.
        segment_ids: document of each position.
        window: positions a query sees, its own included, as in Mistral; 0: all.
        kind: "full" computes all scores at once. "blocked" never holds T x T scores: splash attention on TPUs where its
            shapes allow, elsewhere a loop over blocks of queries.
        sinks: logit of a further key without a value that every query of a head sees (gpt-oss); None: none.
    """
    if kind == "full" and target.is_cpu():
        return causal_attention(query, key, value, segment_ids, sinks, window)
    if kind == "full":
        positions = jnp.arange(query.shape[1], dtype=jnp.int32)
        mask = visible_keys(positions, positions, segment_ids, segment_ids, window)
        return masked_attention(query, key, value, mask, sinks)
    if runs_splash() and query.shape[1] % LANES == 0 and query.shape[-1] % LANES == 0:
        return splash_attention(query, key, value, segment_ids, sinks, window)
    return blocked_attention(query, key, value, segment_ids, sinks, window)
