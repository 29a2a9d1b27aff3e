"""Attention over packed documents: the implementation is chosen by the target and the config.

Where the target has no kernel, attention is a loop over blocks of queries, so that T x U scores are never held.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax._src.cudnn import fused_attention_stablehlo
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from moe.config import ConfigError
from moe.layers.attention.cpu import causal_attention
from moe.layers.attention.ring import Ring, ring_attention
from moe.layers.attention.scoring import ADDED, Scoring, append_sink, bias_of_rows
from moe.layers.attention.tpu import runs_splash, splash_attention
from moe.layers.inputs import Dropout
from moe.parallel import partition_specs, target
from moe.parallel.mesh import axis_of, axis_size, in_pipeline, on_mesh
from moe.parallel.partition_specs import ATTENTION


def runs_cudnn(query: Float[Array, "B T N H"], block_size: int, head_dim: int) -> bool:
    """Whether cuDNN's kernel takes blocks of this many queries: an NVIDIA GPU from Ampere on, bfloat16 (in float16 its
    mask value is a finite -32768), even lengths (for its gradient under a mask), and heads in multiples of 8, sinks
    included, up to 128 on Ampere and 256 from Hopper on."""
    capability = target.current().compute_capability
    return (
        capability >= 8
        and query.dtype == jnp.bfloat16
        and head_dim % 8 == 0
        and head_dim <= (256 if capability >= 9 else 128)
        and query.shape[1] % 2 == block_size % 2 == 0
    )


@contextlib.contextmanager
def checked_for_target() -> Iterator[None]:
    """Let JAX check the limits of cuDNN's kernel for the target of the program being traced, which may be absent: JAX
    itself asks the default device, and without a GPU refuses heads above 128."""
    check = fused_attention_stablehlo.check_compute_capability

    def check_target(capability: str) -> bool:
        return target.current().compute_capability >= int(capability.partition(".")[0])

    fused_attention_stablehlo.check_compute_capability = check_target
    try:
        yield
    finally:
        fused_attention_stablehlo.check_compute_capability = check


#: Maximum number of queries in a block under a window, or where the block's scores are held in memory.
_LARGEST_BLOCK = 512

#: Maximum number of queries in other blocks, whose scores cuDNN does not hold. With larger blocks there are fewer
#: gradients of keys and values to add up.
_CUDNN_BLOCK = 1024

#: Parts of a causal row; queries get no keys of later parts, so that 4 parts compute 10/16 of the scores.
_PARTS = 4

#: The number of keys of a window is a multiple of this, which cuDNN's gradient under a mask requires.
_KEYS = 64


def blocked_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B U M H"],
    value: Float[Array, "B U M V"],
    segment_ids: Int[Array, "B T"],
    key_segment_ids: Int[Array, "B U"],
    scoring: Scoring,
    *,
    one_block: bool = False,
    first: Int[Array, ""] | int = 0,
) -> Float[Array, "B T N V"]:
    """Same function as :func:`moe.layers.attention.attend.attend`: each block by cuDNN's kernel where GPUs and shapes
    allow it, elsewhere as matmuls whose scores the backward pass recomputes. The queries are those from position
    ``first`` on. Causal self-attention leaves out the keys before a block's window, or after its part of the row."""
    batch, length, heads, head_dim = query.shape
    bias = scoring.bias
    value_dim = value.shape[-1]
    factor = scoring.factor(head_dim)
    # JAX's function takes heads of one dimension: the shorter ones are padded with zeros.
    query, key, value = (_widen(x, max(head_dim, value_dim)) for x in (query, key, value))
    size = largest_divisor(length, _LARGEST_BLOCK if scoring.window else _CUDNN_BLOCK)
    # Documents are given as a mask [size,U]: cuDNN's own form of them, offsets, fixes their number in the shapes.
    plain = bias is None and key.shape[1] % 2 == 0 and not one_block
    width = query.shape[-1] + (0 if scoring.sinks is None else ADDED)
    implementation = "cudnn" if plain and runs_cudnn(query, size, width) else None
    if implementation is None:
        size = length if one_block else largest_divisor(length, _LARGEST_BLOCK)

    def block(inputs: tuple[Array, Array, Array], seen: tuple[Array, Array, Array], low: Array | int) -> Array:
        """Attention of a block of queries to these keys, the first of which is at position ``low``."""
        (part, part_segments, start), (key, value, key_segments) = inputs, seen
        mask = scoring.mask(part_segments, key_segments, start, low)
        block_bias = None
        if bias is not None:  # from the distance between the block's last query and the first key on
            distance_bias = jax.lax.dynamic_slice_in_dim(bias, length - size - start, size + key.shape[1] - 1, axis=1)
            block_bias = bias_of_rows(distance_bias, size)[None].astype(part.dtype)
        arrays = part, key, value, mask, block_bias
        if scoring.sinks is not None:
            arrays = append_sink(scoring.sinks, *arrays, factor)
        if scoring.drop.active:
            return _with_dropout(*arrays, factor, scoring.drop, start)[..., :value_dim]
        part, keys, values, mask, block_bias = arrays
        heads = jax.nn.dot_product_attention(
            part, keys, values, block_bias, mask[:, None], scale=factor, implementation=implementation
        )
        return heads[..., :value_dim]

    everything = key, value, key_segment_ids
    if one_block:
        return block((query, segment_ids, jnp.int32(first)), everything, 0)

    # [B,T,...] → [B,T/size,size,...] → [T/size,B,size,...], and back
    def split(x: Array) -> Array:
        return x.reshape(batch, length // size, size, *x.shape[2:]).swapaxes(0, 1)

    starts = first + jnp.arange(0, length, size, dtype=jnp.int32)
    blocks = split(query), split(segment_ids), starts
    ordered = scoring.causal and bias is None and scoring.prefix is None and key.shape[1] == length
    # Keys given to a block: the window before it and the block itself; at the start of a row also keys after it.
    span = math.ceil((size + scoring.window - 1) / _KEYS) * _KEYS

    def in_window(inputs: tuple[Array, Array, Array]) -> Array:
        low = jnp.clip(inputs[2] + size - span, 0, length - span)
        seen = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, low, span, axis=1), everything)
        return block(inputs, seen, low)

    def up_to(end: int, inputs: tuple[Array, Array, Array]) -> Array:
        return block(inputs, jax.tree.map(lambda x: x[:, :end], everything), 0)

    keep = functools.partial(jax.checkpoint, policy=_keeps_cudnn)
    if ordered and scoring.window and span < length:
        parts = jax.lax.map(keep(in_window), blocks)
    else:
        count = math.gcd(length // size, _PARTS) if ordered else 1
        each = length // size // count
        outputs = []
        for i in range(count):
            ours = jax.tree.map(lambda x, i=i: x[i * each : (i + 1) * each], blocks)
            end = (i + 1) * length // count if ordered else key.shape[1]
            outputs.append(jax.lax.map(keep(functools.partial(up_to, end)), ours))
        parts = jnp.concatenate(outputs)
    return parts.swapaxes(0, 1).reshape(batch, length, heads, value_dim)


def _keeps_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """Checkpoint policy of a block: keep what cuDNN's kernel returns, heads and one number for each, which its gradient
    reads; recompute scores."""
    return primitive is fused_attention_stablehlo._dot_product_attention_fwd_p_wrapper


def _widen(heads: Array, width: int) -> Array:
    """Pad every head with zeros to this width."""
    return jnp.pad(heads, [(0, 0)] * 3 + [(0, width - heads.shape[-1])])


def _with_dropout(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    bias: Array | None,
    scale: float,
    drop: Dropout,
    start: Array,
) -> Array:
    """Attention of the queries from ``start`` on, with dropout of its weights, which JAX's own function lacks."""
    batch, length, heads, head_dim = query.shape
    query = query.reshape(batch, length, key.shape[2], -1, head_dim)
    scores = jnp.einsum("btmnh,bumh->bmntu", query, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, heads, length, -1) * scale
    scores = jnp.where(mask[:, None], scores if bias is None else scores + bias, jnp.finfo(jnp.float32).min)
    drop = dataclasses.replace(drop, rng=None if drop.rng is None else jax.random.fold_in(drop.rng, start))
    weights = drop(jax.nn.softmax(scores, axis=-1).astype(value.dtype))
    weights = weights.reshape(batch, key.shape[2], -1, length, key.shape[1])
    return jnp.einsum("bmntu,bumh->btmnh", weights, value).reshape(batch, length, heads, head_dim)


def largest_divisor(length: int, largest: int) -> int:
    """Largest divisor of ``length`` that is at most ``largest``."""
    return next(size for size in range(min(length, largest), 0, -1) if length % size == 0)


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B U M H"],
    value: Float[Array, "B U M V"],
    segment_ids: Int[Array, "B T"],
    key_segment_ids: Int[Array, "B U"] | None = None,
    *,
    kind: str,
    scoring: Scoring,
) -> Float[Array, "B T N V"]:
    """softmax(scale·query·key + bias)·value over positions of the same document, in the dtype of the query.

    Args:
        query: N is a multiple of M.
        key: M key heads.
        value: M value heads, of a dimension of their own.
        segment_ids: document of each query.
        key_segment_ids: of each key; None: those of the queries.
        kind: "full" computes all scores at once. "blocked" never holds T x U scores: splash attention on TPUs where its
            shapes allow, elsewhere a loop over blocks of queries. "ring" does so too where rows are split, without
            gathering keys (:mod:`moe.layers.attention.ring`), and is "blocked" elsewhere.
        scoring: which keys are seen, and what else the weights depend on.
    """
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
    splash = kind != "full" and scoring.is_plain and axis_size("context") == 1
    if splash and runs_splash(query, value):
        return splash_attention(query, key, value, segment_ids, scoring)
    query, key, value = (checkpoint_name(heads, ATTENTION) for heads in (query, key, value))
    if axis_size("context") > 1:
        if scoring.bias is not None or scoring.prefix is not None or scoring.drop.active:
            raise ConfigError("mesh.context: must be 1 with relative positions, a prefix or dropout")
        heads = _attend_split(query, key, value, segment_ids, key_segment_ids, scoring, kind=kind)
    elif kind != "full" and in_pipeline() and scoring.bias is None and not scoring.drop.active:
        # cuDNN's kernel may compute this, and XLA cannot partition it within a pipeline.
        heads = _attend_split(query, key, value, segment_ids, key_segment_ids, scoring)
    elif kind == "full" and scoring.is_plain and target.is_cpu():
        factor = scoring.factor(query.shape[-1])
        heads = causal_attention(query, key, value, segment_ids, scoring.sinks, scoring.window, factor)
    else:
        documents = segment_ids, key_segment_ids
        heads = blocked_attention(query, key, value, *documents, scoring, one_block=kind == "full")
    return checkpoint_name(heads, ATTENTION)


def _attend_split(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    key_segment_ids: Array,
    scoring: Scoring,
    *,
    kind: str = "blocked",
) -> Float[Array, "B T N V"]:
    """Attention by each device for its own rows and heads; where rows are split over ``context``, each device gathers
    the keys and values for its queries, or with "ring" receives them part by part."""
    axis, split = axis_of("context"), axis_size("context") > 1

    def local(query, key, value, segment_ids, key_segment_ids, sinks, prefix):
        first = 0
        if split and kind == "ring":
            block = largest_divisor(query.shape[1], _LARGEST_BLOCK)
            ring = Ring(axis, axis_size("context"), scoring.window, scoring.factor(query.shape[-1]), block)
            return ring_attention(query, key, value, segment_ids, key_segment_ids, sinks, ring)
        if split:
            key, value, key_segment_ids = (
                jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (key, value, key_segment_ids)
            )
            first = jax.lax.axis_index(axis) * query.shape[1]
        local_scoring = dataclasses.replace(scoring, sinks=sinks, prefix=prefix)
        return blocked_attention(query, key, value, segment_ids, key_segment_ids, local_scoring, first=first)

    heads, row = on_mesh(partition_specs.HEADS), on_mesh(partition_specs.BATCH)
    in_specs = (heads, heads, heads, row, row, on_mesh(partition_specs.SINKS), row)
    return jax.shard_map(local, in_specs=in_specs, out_specs=heads, check_vma=False)(
        query, key, value, segment_ids, key_segment_ids, scoring.sinks, scoring.prefix
    )
