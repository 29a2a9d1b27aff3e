"""Attention over packed documents: the implementation is chosen by the target and the config."""

from __future__ import annotations

import dataclasses

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from moe.config import ConfigError
from moe.layers.attention.blocked import blocked_attention
from moe.layers.attention.cpu import causal_attention
from moe.layers.attention.scoring import Scoring
from moe.layers.attention.tpu import runs_splash, splash_attention
from moe.parallel import partition_specs, target
from moe.parallel.axes import axis_of, axis_size, on_mesh
from moe.parallel.remat import ATTENTION


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
            shapes allow, elsewhere a loop over blocks of queries.
        scoring: which keys are seen, and what else the weights depend on.
    """
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
    splash = kind == "blocked" and scoring.is_plain and axis_size("context") == 1
    if splash and runs_splash(query, value):
        return splash_attention(query, key, value, segment_ids, scoring)
    query, key, value = (checkpoint_name(heads, ATTENTION) for heads in (query, key, value))
    if axis_size("context") > 1:
        if scoring.bias is not None or scoring.prefix is not None or scoring.drop.active:
            raise ConfigError("mesh.context: must be 1 with relative positions, a prefix or dropout")
        heads = _attend_split(query, key, value, segment_ids, key_segment_ids, scoring)
    elif kind == "full" and scoring.is_plain and target.is_cpu():
        factor = scoring.factor(query.shape[-1])
        heads = causal_attention(query, key, value, segment_ids, scoring.sinks, scoring.window, factor)
    else:
        documents = segment_ids, key_segment_ids
        heads = blocked_attention(query, key, value, *documents, scoring, one_block=kind == "full")
    return checkpoint_name(heads, ATTENTION)


def _attend_split(
    query: Array, key: Array, value: Array, segment_ids: Array, key_segment_ids: Array, scoring: Scoring
) -> Float[Array, "B T N V"]:
    """Attention of rows split over ``context``: each device gathers keys and values of the row for its queries."""
    axis = axis_of("context")

    def local(query: Array, key: Array, value: Array, segment_ids: Array, key_segment_ids: Array, sinks: Array | None):
        key, value, key_segment_ids = (
            jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (key, value, key_segment_ids)
        )
        first = jax.lax.axis_index(axis) * query.shape[1]
        here = dataclasses.replace(scoring, sinks=sinks)
        return blocked_attention(query, key, value, segment_ids, key_segment_ids, here, first=first)

    heads, row = on_mesh(partition_specs.HEADS), on_mesh(partition_specs.BATCH)
    in_specs = (heads, heads, heads, row, row, on_mesh(partition_specs.SINKS))
    return jax.shard_map(local, in_specs=in_specs, out_specs=heads, check_vma=False)(
        query, key, value, segment_ids, key_segment_ids, scoring.sinks
    )
