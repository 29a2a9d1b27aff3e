"""Splash attention, the Pallas kernel for TPUs."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Float, Int

from moe.layers.attention.scoring import Scoring
from moe.parallel import partition_specs, target
from moe.parallel.mesh import on_mesh
from moe.parallel.parameters import times
from moe.parallel.partition_specs import ATTENTION

#: Head dimensions of queries and of values that compile for every generation: each a multiple of 16 up to 256.
_HEAD_STEP, _LARGEST_HEAD = 16, 256

#: Side of a block of scores whose computation takes about as long as starting it.
_OVERHEAD_SIDE = 256

#: Maximum number of partial gradients of the queries, one for each block of keys, that are in memory at once.
_MOST_PARTIALS = 16


def runs_splash(query: Float[Array, "B T N H"], value: Float[Array, "B U M V"]) -> bool:
    """Whether this program is for a TPU that has the kernel, and the kernel takes these shapes."""
    if not target.current().runs_splash_attention:
        return False
    heads = query.shape[-1], value.shape[-1]
    return query.shape[1] % target.LANES == 0 and all(
        size % _HEAD_STEP == 0 and size <= _LARGEST_HEAD for size in heads
    )


def splash_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T M H"],
    value: Float[Array, "B T M V"],
    segment_ids: Int[Array, "B T"],
    scoring: Scoring,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N V"]:
    """Same function as :func:`moe.layers.attention.attend.attend`, by each device on its rows and heads.

    Args:
        query, key, value, segment_ids, scoring: as there; ``scoring.is_plain``.
        interpret: run the kernels on the CPU, for tests.
    """
    length, sinks = query.shape[1], scoring.sinks
    window = scoring.window if scoring.window < length else 0
    sizes = block_sizes(length, window)

    # Rows and heads of one device.
    def local(query: Array, key: Array, value: Array, segment_ids: Array, sinks: Array | None) -> Array:
        shape = (length, length)
        mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * query.shape[2]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            save_residuals=True,
            interpret=interpret,
        )
        query = times(query, scoring.factor(query.shape[-1]))
        # [B,T,N,H] → [B,N,T,H]
        by_head = (checkpoint_name(x.swapaxes(1, 2), ATTENTION) for x in (query, key, value))
        result = _attend(kernel, *by_head, kernels.SegmentIds(segment_ids, segment_ids), sinks)
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


@jax.custom_vjp
def _attend(kernel: kernels.SplashAttentionKernel, query: Array, key: Array, value: Array, segments: Any, sinks: Any):
    """Heads [B,N,T,V] of queries [B,N,T,H]. What is kept for the backward pass has the layout of the code around the
    kernels, not theirs: see :func:`_relaid`."""
    return _attend_fwd(kernel, query, key, value, segments, sinks)[0]


def _attend_fwd(kernel, query, key, value, segments, sinks):
    by_row = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))
    result, (logsumexp,) = by_row(*(_relaid(x, True) for x in (query, key, value)), segments, sinks)
    result, logsumexp = (checkpoint_name(x, ATTENTION) for x in (_relaid(result, False), logsumexp))
    return result, (kernel, query, key, value, segments, sinks, result, logsumexp)


def _attend_bwd(residuals, gradient):
    """Gradients as in the kernels' own backward pass, with two changes; JAX does not expose its parts separately.

    Results are multiplied by their gradients before these are copied, and the partial gradients of the queries are
    added one by one: XLA's sum over an axis takes five times as long (compiled for v5p, [4,4,32,4096,128]).
    """
    kernel, *inputs, segments, sinks, result, logsumexp = residuals
    query, key, value, d_result = (_relaid(x, True) for x in (*inputs, gradient))
    products = jnp.sum(result.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)
    d_sinks = None
    if sinks is not None:
        of_sinks = jnp.exp(sinks.astype(jnp.float32)[:, None] - logsumexp)
        d_sinks = -jnp.sum(of_sinks * products, axis=(0, 2)).astype(sinks.dtype)
    arrays = (query, key, value, segments, sinks, logsumexp, d_result, products)
    by_row = jax.vmap(functools.partial(_gradients, kernel), in_axes=(0, 0, 0, 0, None, 0, 0, 0))
    gradients = jaxpr_as_fun(_with_added_partials(jax.make_jaxpr(by_row)(*arrays)))(*jax.tree.leaves(arrays))
    return None, *(_relaid(x, False) for x in gradients), None, d_sinks


_attend.defvjp(_attend_fwd, _attend_bwd)


def _gradients(kernel: kernels.SplashAttentionKernel, *arrays: Any) -> tuple[Array, Array, Array]:
    """Gradients of one row's queries, keys and values."""
    sizes = kernel.kwargs["block_sizes"]
    shared = "is_mqa", "mask_value", "attn_logits_soft_cap", "mask_function", "interpret"
    options: dict[str, Any] = {name: kernel.kwargs[name] for name in shared}
    options |= {f"{name}_layout": getattr(sizes, f"{name}_layout") for name in "qkv"}
    for_keys = {"mask_info": kernel.dkv_mask_info, "use_fused_bwd_kernel": sizes.use_fused_bwd_kernel}
    blocks = {"bq": sizes.block_q_dkv, "bkv": sizes.block_kv_dkv, "bkv_compute": sizes.block_kv_dkv_compute}
    d_query, d_key, d_value = kernels._splash_attention_bwd_dkv(*arrays, **blocks, **for_keys, **options)
    if d_query is None:
        for_queries = {"mask_info": kernel.dq_mask_info, "bq": sizes.block_q_dq, "bkv": sizes.block_kv_dq}
        d_query = kernels._splash_attention_bwd_dq(*arrays, **for_queries, **options)
    return d_query, d_key, d_value


_TOKENS_IN_LANES, _HEADS_IN_LANES = (Layout(major_to_minor=order) for order in ((0, 1, 3, 2), (0, 1, 2, 3)))


def _relaid(heads: Float[Array, "B N T H"], into_kernel: bool) -> Float[Array, "B N T H"]:
    """Copy heads from a layout with tokens in the lanes to one with a head's dimensions in the lanes, which the kernels
    need, or back; heads that fill the lanes are returned as they are.

    XLA would give the kernels' layout to all code around them: with heads of 64, half the lanes are empty, so kept
    arrays take twice the memory, and projections, rotations and their gradients take twice as long.
    """
    if heads.shape[-1] >= target.LANES:
        return heads
    layouts = (_TOKENS_IN_LANES, _HEADS_IN_LANES) if into_kernel else (_HEADS_IN_LANES, _TOKENS_IN_LANES)
    for layout in layouts:  # the barriers keep XLA from fusing the copy with what is before or after it
        heads = jax.lax.optimization_barrier(with_layout_constraint(heads, layout))
    return heads


def _with_added_partials(closed: Any) -> Any:
    """Replace the sum over blocks of keys, [B,blocks,N,T,H] → [B,N,T,H], in the closed jaxpr of :func:`_gradients` by
    additions."""
    equations, converted = [], {}
    for equation in closed.jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "convert_element_type":
            converted[equation.outvars[0]] = equation.invars[0]
        elif name == "reduce_sum" and equation.invars[0].aval.ndim == 5 and params["axes"] == (1,):
            # In the kernel's own dtype: XLA would write out partials that are converted before they are split.
            partials = converted.get(equation.invars[0], equation.invars[0])
            add = jax.jit(functools.partial(_add_partials, dtype=equation.invars[0].aval.dtype))
            (added,) = jax.make_jaxpr(add)(partials.aval).eqns
            equation = added.replace(invars=[partials], outvars=equation.outvars)
        equations.append(equation)
    return closed.replace(jaxpr=closed.jaxpr.replace(eqns=equations))


def _add_partials(partials: Float[Array, "B blocks N T H"], dtype: Any) -> Float[Array, "B N T H"]:
    return functools.reduce(operator.add, (part.astype(dtype) for part in jnp.unstack(partials, axis=1)))


def block_sizes(length: int, window: int) -> kernels.BlockSizes:
    """Square blocks of scores with the least cost per query; without a window (0), half of all are computed.

    One kernel for all gradients writes a partial gradient of the queries for each block of keys, zeros where the two
    share no block, and adds them. Under a window nearly all would be zeros, and in long rows their memory grows with
    T², so there the queries get a separate kernel, which visits, like the others, only the blocks that are seen.
    """

    def cost(side: int) -> float:
        blocks = 1 + math.ceil((window - 1) / side) if window else (length / side + 1) / 2
        return blocks * (side**2 + _OVERHEAD_SIDE**2) / side

    side = min((side for side in (1024, 512, 256, 128) if length % side == 0), key=cost)
    fused = not window and length // side <= _MOST_PARTIALS
    of_queries = None if fused else side
    return kernels.BlockSizes(
        block_q=side,
        block_kv=side,
        block_kv_compute=min(side, 512),
        block_q_dkv=side,
        block_kv_dkv=side,
        block_kv_dkv_compute=min(side, 512),
        block_q_dq=of_queries,
        block_kv_dq=of_queries,
        use_fused_bwd_kernel=fused,
    )
