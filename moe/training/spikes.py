"""Spikes: steps whose loss or gradient norm is far above those of the steps before (OLMo-core's SkipStepOptimizer).

The update of such a step is skipped. The losses and norms of the last steps are part of the optimizer's
state, so a continued run decides as an uninterrupted one. Values that are not finite are left out of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from moe.training.skipping import Outcome, kept_unless

#: Last steps that a step is compared with; there is no spike before half of them.
WINDOW = 128


class History(NamedTuple):
    """Losses and gradient norms of the last steps, in a ring.

    Attributes:
        steps: [] int32, number of steps recorded so far.
        losses: [WINDOW] float32.
        norms: [WINDOW] float32.
    """

    steps: Array
    losses: Array
    norms: Array

    def is_spike(self, deviations: float, loss: Float[Array, ""], norm: Float[Array, ""]) -> Bool[Array, ""]:
        """Whether the loss or the norm is more than this many standard deviations above its mean over the window."""
        return (self.steps >= WINDOW // 2) & (
            self._is_above(self.losses, deviations, loss) | self._is_above(self.norms, deviations, norm)
        )

    def recorded(self, loss: Float[Array, ""], norm: Float[Array, ""]) -> History:
        """With one more step."""
        place = self.steps % WINDOW
        return History(self.steps + 1, self.losses.at[place].set(loss), self.norms.at[place].set(norm))

    def _is_above(self, values: Float[Array, " W"], deviations: float, value: Float[Array, ""]) -> Bool[Array, ""]:
        inside = jnp.arange(WINDOW) < self.steps
        mean = jnp.mean(values, where=inside)
        return value > mean + deviations * jnp.std(values, where=inside, ddof=1)


def is_history(node: Any) -> bool:
    """Whether a node of an optimizer's state is the history of its steps."""
    return isinstance(node, History)


class Watched(NamedTuple):
    """State of an optimizer, and the history of its steps."""

    history: History
    optimizer: Any


def skip_spikes(
    optimizer: optax.GradientTransformationExtraArgs, deviations: float
) -> optax.GradientTransformationExtraArgs:
    """Skip updates of spikes too, by ``loss=`` and ``norm=``, which the history of the steps then gets if both are
    finite. The optimizer's own state after an update is an :class:`~moe.training.skipping.Outcome`."""

    def init(params: Any) -> Watched:
        empty = History(jnp.zeros((), jnp.int32), jnp.zeros(WINDOW), jnp.zeros(WINDOW))
        return Watched(empty, optimizer.init(params))

    def update(updates: Any, state: Any, params: Any = None, **known: Any) -> tuple[Any, Outcome]:
        loss, norm = known["loss"], known["norm"]
        spike = state.history.is_spike(deviations, loss, norm)
        outcome: Any
        moved, outcome = optimizer.update(updates, state.optimizer, params, **known)
        moved, kept = kept_unless(~spike, moved, outcome.state, state.optimizer)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        history = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), state.history.recorded(loss, norm), state.history
        )
        return moved, Outcome(Watched(history, kept), outcome.applied & ~spike)

    return optax.GradientTransformationExtraArgs(init, update)
