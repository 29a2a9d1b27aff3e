"""Learning-rate schedules: step → learning rate. All but rsqrt start with a linear warm-up over warmup_steps."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import optax

from moe.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The schedule that ``config.schedule`` names, for a run of ``num_steps``."""
    return SCHEDULES[config.schedule](config, num_steps)


def _cosine(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Cosine decay to the final fraction at num_steps."""
    return optax.warmup_cosine_decay_schedule(
        init_value=_first(config),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=num_steps,
        end_value=config.learning_rate * config.final_learning_rate_fraction,
    )


def _constant(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The peak to the end."""
    del num_steps
    return optax.linear_schedule(_first(config), config.learning_rate, config.warmup_steps)


def _warmup_stable_decay(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The peak, then a linear decay to the final fraction over the last decay_steps (Hu et al. 2024, MiniCPM)."""
    decay = config.decay_steps or max(num_steps // 10, 1)
    end = config.learning_rate * config.final_learning_rate_fraction
    return optax.join_schedules(
        [_constant(config, num_steps), optax.linear_schedule(config.learning_rate, end, decay)],
        [num_steps - decay],
    )


def _rsqrt(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """peak·√(w / max(step, w)), independent of num_steps: the peak for w warm-up steps without a linear start, as in T5
    (2020, section 3.1.2), Switch and GShard (``learning_rate_schedule_noam`` of Mesh TensorFlow, Lingvo's SqrtDecay).
    """
    del num_steps
    warmup = max(config.warmup_steps, 1)
    return lambda step: config.learning_rate * jnp.sqrt(warmup / jnp.maximum(step, warmup))


def _first(config: OptimizerConfig) -> float:
    """Learning rate of the first step: not 0, which would waste it."""
    return config.learning_rate / (config.warmup_steps + 1)


#: One entry per name in moe.config.schema.Schedule.
SCHEDULES: dict[str, Callable[[OptimizerConfig, int], optax.Schedule]] = {
    "cosine": _cosine,
    "constant": _constant,
    "wsd": _warmup_stable_decay,
    "rsqrt": _rsqrt,
}
