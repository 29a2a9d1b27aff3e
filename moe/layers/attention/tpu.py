"""Splash attention, the Pallas kernel for TPUs."""

from __future__ import annotations

import functools

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Float, Int

from moe.layers.attention.scoring import Scoring
from moe.parallel import partition_specs, target
from moe.parallel.axes import on_mesh
from moe.parallel.remat import ATTENTION

#: Vector lanes of a TPU: splash attention takes H and T in multiples of them.
LANES = 128


def runs_splash() -> bool:
    """Whether this program is for a TPU that has the kernel; v2 and v3 lack its bfloat16 products."""
    device = target.current()
    return device.platform == "tpu" and device.device_kind not in ("TPU v2", "TPU v3")


def splash_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T M H"],
    value: Float[Array, "B T M H"],
    segment_ids: Int[Array, "B T"],
    scoring: Scoring,
) -> Float[Array, "B T N H"]:
    """Same function as :func:`moe.layers.attention.attend.attend`, by each device on its rows and heads."""
    length, window, sinks = query.shape[1], scoring.window, scoring.sinks
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

    # Rows and heads of one device.
    def local(query: Array, key: Array, value: Array, segment_ids: Array, sinks: Array | None) -> Array:
        shape = (length, length)
        mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * query.shape[2]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=ATTENTION,
        )
        query = query * query.shape[-1] ** -0.5
        # [B,T,N,H] → [B,N,T,H]
        by_head = [checkpoint_name(x.swapaxes(1, 2), ATTENTION) for x in (query, key, value)]
        spread_over_rows = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))
        result: Array = spread_over_rows(*by_head, kernels.SegmentIds(segment_ids, segment_ids), sinks)  # pyright: ignore[reportAssignmentType]
        return result.swapaxes(1, 2).astype(query.dtype)

    if jax.sharding.get_abstract_mesh().empty:
        return local(query, key, value, segment_ids, sinks)
    heads = on_mesh(partition_specs.HEADS)
    # XLA cannot partition a kernel: each device runs it on its own rows and heads.
    spread = functools.partial(
        jax.shard_map,
        in_specs=(heads, heads, heads, on_mesh(partition_specs.BATCH), on_mesh(partition_specs.SINKS)),
        out_specs=heads,
        check_vma=False,
    )
    return spread(local)(query, key, value, segment_ids, sinks)
