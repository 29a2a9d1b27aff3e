"""Dispatch: moves tokens to the experts that a plan gives them, applies the experts, and combines their outputs.

A user chooses with ``model.moe.dispatch`` whether experts have a capacity. All implementations compute the same
function; which one runs also depends on the target.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from moe.dispatch.backends import backend
from moe.dispatch.buffers import (
    BufferPlan,
    assignment_numbers,
    combine_rows,
    fill_rows,
    index_tables,
    load_per_group,
    take_rows,
)
from moe.dispatch.ffn import ExpertWeights, batched_ffn
from moe.dispatch.on_mesh import by_sorting_on_mesh
from moe.dispatch.sorting import by_sorting
from moe.parallel import partition_specs, target
from moe.parallel.mesh import AXES, TOKEN_AXES, axis_size, constrain
from moe.parallel.partition_specs import EXPERT_OUTPUTS
from moe.routing.routing import Routing

#: (x [G,S,D], routing, plan, weights) → y [G,S,D] float32: Σ_k weight·expert output, 0 for a dropped token.
Implementation = Callable[[Array, Routing, BufferPlan, ExpertWeights], Array]


def apply_in_buffers(expert_inputs: Float[Array, "E G C D"], weights: ExpertWeights) -> Float[Array, "E G C D"]:
    """Move slots from the devices of their tokens to those of their experts, apply the experts, move them back."""
    expert_inputs = constrain(expert_inputs, partition_specs.GROUPED_SLOTS)
    expert_inputs = constrain(expert_inputs, partition_specs.EXPERT_SLOTS)
    num_experts, groups, capacity, model_dim = expert_inputs.shape
    if weights.dropout is not None:
        weights = weights.at(weights.dropout.assignments.reshape(num_experts, -1))
    # [E,G,C,D] → [E,G·C,D] and back
    rows = expert_inputs.reshape(num_experts, groups * capacity, model_dim)
    outputs = batched_ffn(rows, weights.gathered(rows.dtype)).reshape(num_experts, groups, capacity, model_dim)
    outputs = constrain(outputs, partition_specs.EXPERT_SLOTS)
    return checkpoint_name(constrain(outputs, partition_specs.GROUPED_SLOTS), EXPERT_OUTPUTS)


# --- By index into buffers -------------------------------------------------------------------------------------------


def by_index(
    x: Float[Array, "G S D"], routing: Routing, plan: BufferPlan, weights: ExpertWeights
) -> Float[Array, "G S D"]:
    """Move rows by index: no arithmetic on tokens but the weighted sum at the end, in float32.

    The groups of one device share a buffer for each expert, filled from its start: [E,X,R,D], X devices with tokens
    and R rows for all groups of one. A device's part is contiguous in either order of E and X, so nothing is
    transposed.
    """
    groups, tokens, model_dim = x.shape
    num_devices = math.gcd(groups, axis_size(*TOKEN_AXES))
    num_rows = groups // num_devices * plan.capacity
    starts = jnp.arange(plan.num_experts, dtype=jnp.int32) * num_rows
    # [G,...] → [X,G/X,...]
    split = functools.partial(
        jax.tree.map, lambda array: array.reshape(num_devices, groups // num_devices, *array.shape[1:])
    )
    load = split(load_per_group(routing, plan))
    tables = jax.vmap(functools.partial(index_tables, starts=starts, num_rows=plan.num_experts * num_rows))(
        split(routing), split(plan), load
    )
    # [X,E·R] → [X,E,R] → [E,X,R]
    buffers = functools.partial(
        jax.tree.map,
        lambda rows: rows.reshape(num_devices, plan.num_experts, num_rows, *rows.shape[2:]).swapaxes(0, 1),
    )
    if weights.dropout is not None:
        numbers = assignment_numbers(routing).reshape(num_devices, -1)
        weights = weights.at(buffers(jax.vmap(take_rows)(numbers, tables[0])))
    # [G,S,·] → [X,G/X·S,·]
    x = x.reshape(num_devices, -1, model_dim)
    combine_weights = routing.combine_weights.reshape(num_devices, x.shape[1], -1)
    outputs = apply_in_buffers(buffers(jax.vmap(fill_rows)(x, *tables)), weights)
    # [E,X,R,D] → [X,E,R,D] → [X,E·R,D]
    outputs = outputs.swapaxes(0, 1).reshape(num_devices, plan.num_experts * num_rows, model_dim)
    return jax.vmap(combine_rows)(outputs, combine_weights, *tables).reshape(groups, tokens, model_dim)


# --- By one-hot matmuls, and by weighted sums ------------------------------------------------------------------------
_EXACT = jax.lax.Precision.HIGHEST


def by_one_hot(
    x: Float[Array, "G S D"], routing: Routing, plan: BufferPlan, weights: ExpertWeights
) -> Float[Array, "G S D"]:
    """Move rows by one-hot matmuls over [G,S,E,C] (GShard 2020, algorithm 2); returns float32."""
    expert = jax.nn.one_hot(routing.expert_index, plan.num_experts, dtype=jnp.float32)  # [G,S,K,E]
    slot = jax.nn.one_hot(jnp.where(plan.kept, plan.position_in_expert, -1), plan.capacity, dtype=jnp.float32)
    dispatch_mask = jnp.einsum("gske,gskc->gsec", expert, slot)
    # In full float32, as the other modes multiply elementwise: TPUs would round the weights to bfloat16.
    combine_weights = jnp.einsum("gske,gskc,gsk->gsec", expert, slot, routing.combine_weights, precision=_EXACT)
    if weights.dropout is not None:
        places = (expert.astype(jnp.int32), slot.astype(jnp.int32))
        weights = weights.at(jnp.einsum("gske,gskc,gsk->egc", *places, assignment_numbers(routing)))
    return mix(x, dispatch_mask, combine_weights, weights)


def mix(
    x: Float[Array, "G S D"],
    dispatch_weights: Float[Array, "G S E C"],
    combine_weights: Float[Array, "G S E C"],
    weights: ExpertWeights,
) -> Float[Array, "G S D"]:
    """Fill slots with weighted sums of tokens, and tokens with weighted sums of the experts' outputs, in float32.

    Args:
        dispatch_weights: weight of each token in each slot.
        combine_weights: weight of each slot in each token's output.
        weights: of the experts, as stored; dropout is drawn for each slot unless it has rows [E,G,C].
    """
    if weights.dropout is not None and weights.dropout.rows is None:
        groups, _, num_experts, capacity = dispatch_weights.shape
        slots = jnp.arange(num_experts * groups * capacity, dtype=jnp.int32)
        weights = weights.at(slots.reshape(num_experts, groups, capacity))
    expert_inputs = jnp.einsum("gsec,gsd->egcd", dispatch_weights.astype(x.dtype), x)
    outputs = apply_in_buffers(expert_inputs, weights)
    return jnp.einsum("gsec,egcd->gsd", combine_weights, outputs, precision=_EXACT, preferred_element_type=jnp.float32)


#: Implementations by the value of ``model.moe.dispatch``.
_IMPLEMENTATIONS: dict[str, Implementation] = {"gather": by_index, "einsum": by_one_hot, "dropless": by_sorting}

#: Values of ``model.moe.dispatch``.
CONFIG_MODES: tuple[str, ...] = tuple(_IMPLEMENTATIONS)

_DESCRIPTIONS: dict[Implementation, str] = {
    by_index: "rows gathered by index into buffers",
    by_one_hot: "one-hot matmuls into buffers",
    by_sorting: "rows sorted by expert",
    by_sorting_on_mesh: "rows sorted by expert",
}


def _implementation(mode: str) -> Implementation:
    """Implementation of a dispatch in the program being traced."""
    if axis_size(*AXES) > 1:
        return by_sorting_on_mesh if mode == "dropless" else _IMPLEMENTATIONS[mode]
    return by_sorting if mode == "gather" and backend().SORTS_WITH_CAPACITY else _IMPLEMENTATIONS[mode]


def describe(mode: str) -> str:
    """Describe in words how the program being traced computes a dispatch."""
    chosen = _implementation(mode)
    sorts = chosen in (by_sorting, by_sorting_on_mesh)
    kernel = f"grouped FFN of {target.current().platform}" if sorts else "batched FFN"
    limit = "without" if mode == "dropless" else "with"
    return f"{mode}: {limit} a capacity, {_DESCRIPTIONS[chosen]}, {kernel}"


def dispatch(
    mode: str, x: Float[Array, "G S D"], routing: Routing, plan: BufferPlan, weights: ExpertWeights
) -> Float[Array, "G S D"]:
    """Apply the experts by the implementation that ``model.moe.dispatch=mode`` selects on this target.

    Returns:
        Σ_k weight·expert output in float32, 0 for a token whose assignments were all dropped.
    """
    return _implementation(mode)(x, routing, plan, weights)
