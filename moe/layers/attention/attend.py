"""Causal attention over packed documents: the implementation is chosen by the target and the config."""

from __future__ import annotations

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from moe.layers.attention.blocked import blocked_attention
from moe.layers.attention.cpu import causal_attention
from moe.layers.attention.tpu import LANES, runs_splash, splash_attention
from moe.parallel import target
from moe.parallel.remat import ATTENTION


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T M H"],
    value: Float[Array, "B T M H"],
    segment_ids: Int[Array, "B T"],
    *,
    window: int,
    kind: str,
) -> Float[Array, "B T N H"]:
    """softmax(query·key / sqrt(H))·value over earlier positions of the same document, in the dtype of the query.

    Args:
        query: N is a multiple of M.
        key: M key heads.
        value: M value heads.
        segment_ids: document of each position.
        window: positions a query sees, its own included; 0: all.
        kind: "full" computes all scores at once. "blocked" never holds T x T scores: splash attention on TPUs where its
            shapes allow, elsewhere a loop over blocks of queries.
    """
    if kind == "blocked" and runs_splash() and query.shape[1] % LANES == query.shape[-1] % LANES == 0:
        return splash_attention(query, key, value, segment_ids, window)
    query, key, value = (checkpoint_name(heads, ATTENTION) for heads in (query, key, value))
    return checkpoint_name(_attend(query, key, value, segment_ids, window, kind), ATTENTION)


def _attend(query: Array, key: Array, value: Array, segment_ids: Array, window: int, kind: str) -> Array:
    if kind == "blocked":
        return blocked_attention(query, key, value, segment_ids, window)
    if target.is_cpu():
        return causal_attention(query, key, value, segment_ids, window)
    same_document = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]  # [B,1,T,U]
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=same_document,
        is_causal=True,
        # A window of w positions includes the query's own, as in Mistral.
        local_window_size=(window - 1, 0) if window else None,
    )
