"""Causal attention over packed documents: all scores at once, or in blocks, so that T x T is never held.

In: query [B,T,N,H], key and value [B,U,M,H], documents [B,T]. Out: [B,T,N,H]. Both forms compute the same function.
"blocked" is JAX's splash attention kernel on TPU where its shapes allow, and elsewhere a loop over blocks of queries:
each by cuDNN's fused kernel on GPUs where its shapes allow, else as plain matmuls whose scores the backward pass
computes again.

Letters: B batch, T sequence, U key positions, N query heads, M key/value heads, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from moe.layers.attention.cpu import causal_attention
from moe.layers.attention.tpu import LANES, runs_splash, splash_attention
from moe.parallel import target


def attend(query: Array, key: Array, value: Array, segment_ids: Array, *, window: int, kind: str) -> Array:
    """softmax(query·key / sqrt(H))·value over earlier positions of the same document.

    Args:
        query: [B,T,N,H].
        key: [B,T,M,H], M dividing N.
        value: [B,T,M,H].
        segment_ids: [B,T] int32.
        window: positions a query sees, its own included; 0: all.
        kind: of :data:`ATTENTIONS`.

    Returns:
        [B,T,N,H] in the dtype of the query.
    """
    if kind == "full" and target.is_cpu():  # the same function, for CPUs
        return causal_attention(query, key, value, segment_ids, window)
    if kind == "full":
        same_document = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]  # [B,1,T,U]
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=same_document,
            is_causal=True,
            # A window of w tokens counts the query's own, as Mistral's does.
            local_window_size=(window - 1, 0) if window else None,
        )
    if runs_splash() and query.shape[1] % LANES == 0 and query.shape[-1] % LANES == 0:
        return splash_attention(query, key, value, segment_ids, window)
    return _query_blocks(query, key, value, segment_ids, window)


def _runs_cudnn(query: Array, size: int) -> bool:
    """Whether cuDNN's kernel takes blocks of ``size`` queries: bfloat16 (in float16 its mask is a finite -32768), H a
    multiple of 8 of at most 128, even lengths (for its gradient under a mask), an NVIDIA GPU from Ampere on."""
    return (
        target.current().compute_capability >= 8
        and query.dtype == jnp.bfloat16
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 128
        and query.shape[1] % 2 == size % 2 == 0
    )


def _block(length: int, largest: int) -> int:
    """The largest divisor of a length that is at most this."""
    return next(size for size in range(min(length, largest), 0, -1) if length % size == 0)


def _query_blocks(query: Array, key: Array, value: Array, segment_ids: Array, window: int) -> Array:
    batch, length, heads, head_dim = query.shape
    size = _block(length, 512)
    positions = jnp.arange(length, dtype=jnp.int32)
    # The mask is all of [size,U]: cuDNN itself knows documents only as offsets, of a number fixed beforehand.
    implementation = "cudnn" if _runs_cudnn(query, size) else None

    @jax.checkpoint
    def block(inputs: tuple[Array, Array, Array]) -> Array:
        part, part_segments, part_positions = inputs
        distance = part_positions[:, None] - positions  # [size,U]
        seen = (distance >= 0) & ((distance < window) if window else True)
        mask = seen & (part_segments[:, :, None] == segment_ids[:, None, :])
        return jax.nn.dot_product_attention(part, key, value, mask=mask[:, None], implementation=implementation)

    # [B,T,...] → [B,T/size,size,...] → [T/size,B,size,...], and back
    def split(x: Array) -> Array:
        return x.reshape(batch, length // size, size, *x.shape[2:]).swapaxes(0, 1)

    parts = jax.lax.map(block, (split(query), split(segment_ids), positions.reshape(-1, size)))
    return parts.swapaxes(0, 1).reshape(batch, length, heads, head_dim)
