"""Dropless dispatch on a mesh: every device sorts its own tokens and, where experts are split, sends each device the
rows of its experts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from moe.config.exchange import AllGather, AllToAll
from moe.dispatch.backends import backend
from moe.dispatch.buffers import BufferPlan, assignment_numbers
from moe.dispatch.exchange import exchanged_outputs
from moe.dispatch.ffn import ExpertWeights
from moe.dispatch.hosts import Assignments, apply_by_host, apply_to_gathered
from moe.dispatch.peers import EVERYONE
from moe.dispatch.sorting import sort_and_apply
from moe.parallel import partition_specs
from moe.parallel.mesh import axis_of, axis_size, on_mesh
from moe.routing.routing import Routing


def by_sorting_on_mesh(
    x: Float[Array, "G S D"], routing: Routing, plan: BufferPlan, weights: ExpertWeights
) -> Float[Array, "G S D"]:
    """:func:`moe.dispatch.sorting.by_sorting` on every device of a mesh.

    A plan in chunks exchanges each chunk of the tokens by itself, and XLA overlaps the exchange of one with the experts
    of another.
    """
    if weights.dropout is not None:
        weights = weights.at(assignment_numbers(routing))

    def local(x: Array, routing: Routing, plan: BufferPlan, shards: ExpertWeights) -> Array:
        weights, size = backend().pack_shards(shards), x.shape[1] // plan.exchange.chunks

        def chunk(start: int) -> Array:
            tokens = slice(start, start + size)
            part = functools.partial(jax.tree.map, lambda array: array[:, tokens])
            return _summed(_exchange_and_apply(part(x), part(routing), part(plan), weights.part(tokens)))

        return jnp.concatenate([chunk(start) for start in range(0, x.shape[1], size)], axis=1)

    groups = on_mesh(partition_specs.GROUPS)
    stored = jax.tree.map(on_mesh, weights.specs(), is_leaf=lambda leaf: isinstance(leaf, P))
    spread = jax.shard_map(local, in_specs=(groups, groups, groups, stored), out_specs=groups, check_vma=False)
    return spread(x, routing, plan, weights.astype(x.dtype))


def _exchange_and_apply(
    x: Float[Array, "G S D"], routing: Routing, plan: BufferPlan, weights: ExpertWeights
) -> Float[Array, "G S D"]:
    """This device's tokens through their experts, on whichever devices those are."""
    match plan.exchange:
        case AllGather():
            flat, chosen = _assignments(x, routing, plan, weights)
            return apply_to_gathered(flat, chosen, plan.num_experts, weights).reshape(x.shape)
        case AllToAll(hosts=hosts) if hosts > 1:
            flat, chosen = _assignments(x, routing, plan, weights)
            return apply_by_host(flat, chosen, plan.num_experts, hosts, weights).reshape(x.shape)
    if axis_size("expert") == 1:
        return sort_and_apply(x, routing, plan, weights)
    return sort_and_apply(x, routing, plan, weights, functools.partial(exchanged_outputs, peers=EVERYONE))


def _assignments(
    x: Float[Array, "G S D"], routing: Routing, plan: BufferPlan, weights: ExpertWeights
) -> tuple[Float[Array, "N D"], Assignments]:
    """Tokens of all groups and their assignments, for exchanges that send a token once."""
    numbers = None if weights.dropout is None else weights.dropout.assignments
    expert = jnp.where(plan.kept, routing.expert_index, plan.num_experts)
    chosen = Assignments(expert, routing.combine_weights, numbers)
    # [G,S,·] → [G·S,·]
    return jax.tree.map(lambda array: array.reshape(-1, array.shape[-1]), (x, chosen))


def _summed(y: Float[Array, "G S D"]) -> Float[Array, "G S D"]:
    """Outputs of the whole hidden dim, which is split over ``tensor``: each device of that axis has a partial sum."""
    return jax.lax.psum(y, axis_of("tensor")) if axis_size("tensor") > 1 else y
