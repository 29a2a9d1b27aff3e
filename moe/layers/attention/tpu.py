"""Splash attention, the Pallas kernel for TPUs."""

from __future__ import annotations

import functools

import jax
from jax import Array
from jax.sharding import PartitionSpec as P

from moe.parallel import partition_specs, target

LANES = 128  # splash attention wants H and T in multiples of a TPU's vector lanes


def runs_splash() -> bool:
    """Whether this program is for a TPU that has the kernel; v2 and v3 lack its bfloat16 products.

    The mesh says what it is for, also when it is compiled for devices that are not here.
    """
    here = target.current()
    return here.platform == "tpu" and here.device_kind not in ("TPU v2", "TPU v3")


def splash_attention(query: Array, key: Array, value: Array, segment_ids: Array, window: int) -> Array:
    """Splash attention over each device\'s rows and heads; same function as :func:`moe.layers.attention.attend.attend`."""
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
        in_specs=(partition_specs.HEADS, partition_specs.HEADS, partition_specs.HEADS, P(*partition_specs.BATCH)),
        out_specs=partition_specs.HEADS,
        check_vma=False,
    )
    return spread(local)(query, key, value, segment_ids)
