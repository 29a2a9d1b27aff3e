"""Causal attention over packed documents: all scores at once, or in blocks, so that T x T is never held.

In: query [B,T,N,H], key and value [B,U,M,H], documents [B,T]. Out: [B,T,N,H]. Both forms compute the same function.
"blocked" is JAX's splash attention kernel on TPU where its shapes allow, and elsewhere a loop over blocks of queries:
each by cuDNN's fused kernel on GPUs where its shapes allow, else as plain matmuls whose scores the backward pass
computes again.

Letters: B batch, T sequence, U key positions, N query heads, M key/value heads, H head dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from moe import sharding
from moe.causal import causal_attention
from moe.grouped import in_chunks

#: Names of ``model.attention``.
ATTENTIONS = ("full", "blocked")

_LANES = 128  # splash attention wants H and T in multiples of a TPU's vector lanes


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
    if kind == "full" and in_chunks():  # the same function, for CPUs
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
    if _runs_splash() and query.shape[1] % _LANES == 0 and query.shape[-1] % _LANES == 0:
        return _splash(query, key, value, segment_ids, window)
    return _query_blocks(query, key, value, segment_ids, window)


def _runs_splash() -> bool:
    """Whether this program is for a TPU that has the kernel; v2 and v3 lack its bfloat16 products.

    The mesh says what it is for, also when it is compiled for devices that are not here.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None) or jax.devices()[0]
    return device.platform == "tpu" and device.device_kind not in ("TPU v2", "TPU v3")


def _runs_cudnn(query: Array, size: int) -> bool:
    """Whether cuDNN's kernel takes blocks of ``size`` queries: bfloat16 (in float16 its mask is a finite -32768), H a
    multiple of 8 of at most 128, even lengths (for its gradient under a mask), an NVIDIA GPU from Ampere on."""
    device = jax.devices()[0]
    generation = str(getattr(device, "compute_capability", "")).partition(".")[0]  # "9" of "9.0"; AMD's is "gfx90a"
    return (
        device.platform == "gpu"
        and generation.isdigit()
        and int(generation) >= 8
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


def _splash(query: Array, key: Array, value: Array, segment_ids: Array, window: int) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length = query.shape[1]
    size = next(size for size in (1024, 512, 256, 128) if length % size == 0)
    sizes = kernels.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=min(size, 512),
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=min(size, 512),
        use_fused_bwd_kernel=True,
    )

    def local(query: Array, key: Array, value: Array, segment_ids: Array) -> Array:  # one device's rows and heads
        shape = (length, length)
        mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * query.shape[2]), block_sizes=sizes, head_shards=1, q_seq_shards=1
        )
        by_head = [x.swapaxes(1, 2) for x in (query * query.shape[-1] ** -0.5, key, value)]  # [B,T,N,H] → [B,N,T,H]
        result: Array = jax.vmap(kernel)(*by_head, kernels.SegmentIds(segment_ids, segment_ids))  # pyright: ignore[reportAssignmentType]
        return result.swapaxes(1, 2).astype(query.dtype)

    if jax.sharding.get_abstract_mesh().empty:
        return local(query, key, value, segment_ids)
    # XLA cannot split a kernel: each device runs it on the rows and heads that it has.
    spread = functools.partial(
        jax.shard_map,
        in_specs=(sharding.HEADS, sharding.HEADS, sharding.HEADS, P(*sharding.BATCH)),
        out_specs=sharding.HEADS,
        check_vma=False,
    )
    return spread(local)(query, key, value, segment_ids)
