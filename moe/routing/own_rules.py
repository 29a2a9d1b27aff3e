"""Checks of a user's balancing rule on random reports, before anything of a run is compiled or written."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe.routing.balancing import LayerReport, report
from moe.routing.balancing_rules import BalancingRule
from moe.routing.carry import first_carry, of_tokens
from moe.routing.interface import Gate, GateInputs
from moe.routing.own_gates import one_device
from moe.routing.routing import route
from moe.system.fields import ConfigError, raised_as_errors


def probe_rule(gate: Gate, num_experts: int) -> None:
    """Update the state of a user's balancing rule for two layers, one of which has an expert without tokens, and refuse
    it in one sentence if that fails.

    Args:
        gate: the gate that has the rule.
        num_experts: E, columns of the router.

    Raises:
        ConfigError: the rule raises, a state or a bias is not of finite float32 arrays [E] in the same pytree, a
            penalty is no number, or the rule is no pure function of one layer's state and report.
    """
    rule = gate.balancing
    if rule is None:
        return
    name = f"balancing rule {type(rule).__name__}"
    with raised_as_errors(f"{name}: it"):
        state = rule.first_state(num_experts)
        _check_state(f"{name}: first_state", state, state, (num_experts,))
        bias, penalty = rule.selection_bias(state), rule.penalty(state)
        if bias is not None:
            _check_state(f"{name}: selection_bias", bias, bias, (num_experts,))
        if penalty is not None and not (jnp.shape(penalty) == () and np.isfinite(penalty) and penalty >= 0):
            raise ConfigError(f"{name}: penalty returns {penalty}: must be a number of at least 0, or None")
        reports = _reports(gate, num_experts, state, bias)
        k = gate.experts_per_token(num_experts)
        found = [_next_states(rule, reports, k)]
        with jax.set_mesh(one_device()):
            found.append(_next_states(rule, jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, reports)), k))
    for following in found[0]:
        _check_state(f"{name}: next_state", following, state, (2, num_experts))
    if not _alike(found[0], found[1]) or not _alike(state, rule.first_state(num_experts)):
        raise ConfigError(
            f"{name}: it returns another state when it is called again, or on one device: it must be pure functions "
            "that do not read the mesh"
        )
    if not _alike(*found[0]):
        raise ConfigError(
            f"{name}: next_state depends on which layers it is given together: read one layer's state and report, "
            "along the last axis, and take statistics over layers in signal"
        )


def _reports(gate: Gate, num_experts: int, state: Any, bias: Array | None) -> LayerReport:
    """Reports of two layers; the first expert of the second gets no tokens if it can be avoided."""
    mask, ids = jnp.ones((1, 8), bool), jnp.arange(8, dtype=jnp.int32)[None]
    carry = of_tokens(first_carry([gate], num_experts), mask.shape)
    inputs = GateInputs(mask, token_ids=ids, segment_ids=jnp.ones_like(ids))
    inputs = dataclasses.replace(inputs, state=state, selection_bias=bias, carry=carry)

    @jax.jit
    def reported(logits: Array) -> LayerReport:
        routing = route(gate, logits, inputs)
        return report(routing, mask, routing.chosen, k=gate.experts_per_token(num_experts))

    logits = jax.random.normal(jax.random.key(0), (1, 8, num_experts))
    layers = reported(logits), reported(logits[:, ::-1].at[..., 0].add(-30.0))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def _next_states(rule: BalancingRule, reports: LayerReport, k: int) -> tuple[Any, Any]:
    """States of two layers after a step, updated together and one by one."""
    first = rule.first_state(reports.expert_load.shape[-1])
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 0.1]), first)  # one layer's may differ from another's
    signal = rule.signal(reports, k)
    together = rule.next_state(jax.tree.map(jnp.copy, states), signal)
    alone = [
        rule.next_state(*jax.tree.map(lambda leaf, layer=layer: leaf[layer : layer + 1], (states, signal)))
        for layer in range(2)
    ]
    return together, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *alone)


def _alike(one: Any, other: Any) -> bool:
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in leaves)


def _check_state(where: str, value: Any, like: Any, shape: tuple[int, ...]) -> None:
    leaves = jax.tree.leaves(value)
    same = leaves and jax.tree.structure(value) == jax.tree.structure(like)
    good = all(isinstance(leaf, jax.Array) and leaf.shape == shape and leaf.dtype == jnp.float32 for leaf in leaves)
    if not (same and good and all(np.isfinite(leaf).all() for leaf in leaves)):
        found = ", ".join(f"{jnp.asarray(leaf).dtype}{list(jnp.shape(leaf))}" for leaf in leaves)
        pytree = "the pytree of first_state, of" if value is not like else "a pytree of"
        raise ConfigError(
            f"{where} returns {found or 'no arrays'}: must be {pytree} finite float32{list(shape)} arrays of jax.numpy"
        )
