"""Carry from a router to that of the next MoE layer: a vector or a decision (residual routers of MoE++ and ZAYA)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moe.routing.interface import Gate
from moe.system.fields import ConfigError

#: Name of the carry among what gates read.
HANDED = "carry"


def first_carry(gates: Iterable[Gate], num_experts: int) -> Any:
    """Initial carry of one token, for the lowest of these gates' layers; None: no gate hands anything on.

    Args:
        gates: of a model's MoE layers, the lowest first.
        num_experts: E, columns of the router.

    Raises:
        ConfigError: an array is not float32, or two gates hand on different shapes.
    """
    first, owner = None, ""
    for gate in gates:
        carry = jax.tree.map(jnp.asarray, gate.first_carry(num_experts))
        if carry is None:
            continue
        if any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(carry)):
            raise ConfigError(f"gate {gate.name}: first_carry returns {describe(carry)}: must be float32 arrays")
        if first is None:
            first, owner = carry, gate.name
        elif not _same_shapes(carry, first):
            raise ConfigError(
                f"gate {gate.name}: first_carry returns {describe(carry)}: must have the shapes of gate {owner} of the "
                f"same model, {describe(first)}"
            )
    return first


def begin(gate: Gate, num_experts: int, read: Mapping[str, Any], shape: tuple[int, ...]) -> Mapping[str, Any]:
    """Inputs that tokens of this shape read, with the gate's first carry if nothing was handed on."""
    if read.get(HANDED) is not None:
        return read
    return {**read, HANDED: of_tokens(first_carry([gate], num_experts), shape)}


def of_tokens(carry: Any, shape: tuple[int, ...]) -> Any:
    """Repeat what one token carries for tokens of this shape; None stays None."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*shape, *leaf.shape)), carry)


def regrouped(carry: Any, shape: tuple[int, ...]) -> Any:
    """[B,T,...] as [G,S,...], or back: the first two axes get this shape."""
    return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[2:]), carry)


def handed_on(gate: Gate, before: Any, after: Any, valid: Array) -> Any:
    """Carry after a gate, 0 for tokens that are not routed.

    Args:
        before: ``GateInputs.carry``.
        after: ``GateOutput.carry``.
        valid: [G,S] bool.

    Raises:
        ConfigError: the two have different shapes.
    """
    after = before if after is None else after
    if not _same_shapes(after, before):
        raise ConfigError(
            f"gate {type(gate).__name__}: carry is {describe(after)}, must be {describe(before)}, as first_carry says"
        )
    return jax.tree.map(lambda leaf: jnp.where(valid.reshape(*valid.shape, *(1,) * (leaf.ndim - 2)), leaf, 0.0), after)


def _same_shapes(one: Any, other: Any) -> bool:
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(jnp.shape(a) == jnp.shape(b) and jnp.asarray(a).dtype == jnp.asarray(b).dtype for a, b in pairs)


def describe(carry: Any) -> str:
    """Types and shapes of a pytree's arrays."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(carry)]
    return ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves) or "no arrays"
