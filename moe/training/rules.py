"""Update of what has no gradient: the states of the routers, by the balancing rules of their gates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from moe.config import Config
from moe.layers.call import Report
from moe.models.segments import map_routers, selection_biases
from moe.routing.balancing_rules import restored, stored


def update_routers(config: Config, states: dict[str, Any], report: Report, applied: Bool[Array, ""]) -> dict[str, Any]:
    """States of the routers after a step, unless its update was skipped."""
    after = next_states(config, states, report)
    return jax.tree.map(lambda new, old: jnp.where(applied, new, old), after, states)


def next_states(config: Config, states: dict[str, Any], report: Report) -> dict[str, Any]:
    """States of the routers after a step, from the step's report.

    ``optimizer.frozen`` with "router", and adapters without a trained router, keep them as they are.
    """
    layers = report.signals.get("layers")
    fixed = "router" not in config.lora.trained if config.lora.rank else "router" in config.optimizer.frozen
    if not states or layers is None or fixed:
        return states
    moe = config.model.moe
    assert moe.gate is not None
    rule = moe.gate.balancing
    assert rule is not None
    signals = selection_biases(config.model, rule.signal(layers, moe.experts_per_token))
    return map_routers(lambda kept, signal: stored(rule.next_state(restored(rule, kept), signal)), states, signals)
