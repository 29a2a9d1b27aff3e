"""Links of the optimizer's chain that a train step needs: skipped updates, and schedules that count steps.

The state that an update returns is an :class:`Outcome`; its ``state`` goes into the next update and into checkpoints.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from moe.models.state import set_schedule_step


class Outcome(NamedTuple):
    """State of the optimizer after an update, and whether the update was applied, [] bool."""

    state: Any
    applied: Bool[Array, ""]


def kept_unless(applied: Bool[Array, ""], updates: Any, after: Any, before: Any) -> tuple[Any, Any]:
    """(updates, state) of an update if it is applied, else updates that change nothing and the state before it."""
    # A select joins the loop that writes the update; a branch would keep old and new state side by side. -0.0 is the
    # number that changes no parameter, 0.0 turns -0.0 into 0.0.
    updates = jax.tree.map(lambda update: jnp.where(applied, update, -0.0), updates)
    return updates, jax.tree.map(lambda new, old: jnp.where(applied, new, old), after, before)


def skip_not_finite(optimizer: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """Skip updates unless ``loss=`` and ``norm=``, the gradients', are finite."""

    def update(updates: Any, state: Any, params: Any = None, **known: Any) -> tuple[Any, Outcome]:
        applied = jnp.isfinite(known["loss"]) & jnp.isfinite(known["norm"])
        moved, after = optimizer.update(updates, state, params, **known)
        moved, kept = kept_unless(applied, moved, after, state)
        return moved, Outcome(kept, applied)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def follow_steps(optimizer: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """Count the steps of schedules as the run does, ``step=``, with those that were skipped."""

    def update(updates: Any, state: Any, params: Any = None, **known: Any) -> tuple[Any, Outcome]:
        step = known["step"]
        outcome: Any
        moved, outcome = optimizer.update(updates, set_schedule_step(state, step), params, **known)
        return moved, outcome._replace(state=set_schedule_step(outcome.state, step + 1))

    return optax.GradientTransformationExtraArgs(optimizer.init, update)
