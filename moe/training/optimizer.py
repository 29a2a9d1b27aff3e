"""AdamW with linear warm-up, cosine decay and clipping of the global gradient norm, from Optax.

In: :class:`moe.config.OptimizerConfig` and the number of steps. Out: a gradient transformation, its schedule, and the
norm that it clips by, which the train step reports too and so computes once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from moe.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Step → learning rate: 0 to the peak over warmup_steps, then a cosine to the final fraction at num_steps."""
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=num_steps,
        end_value=config.learning_rate * config.final_learning_rate_fraction,
    )


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """AdamW whose weight decay spares norm scales and biases; its update wants ``norm=`` :func:`gradient_norm`."""

    def decayed(parameters: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not path[-1].key.endswith(("scale", "bias")), parameters
        )

    adamw = optax.adamw(
        learning_rate_schedule(config, num_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    optimizer = optax.chain(_clip(config.gradient_clip), adamw) if config.gradient_clip > 0 else adamw
    if not config.frozen:
        return optax.with_extra_args_support(optimizer)

    def labels(parameters: Any) -> Any:
        """Frozen parameters have no state."""
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if _frozen(config, path) else "trained", parameters
        )

    return optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def gradient_norm(config: OptimizerConfig, gradients: Any) -> Array:
    """[] global norm of the gradients of all parameters that are trained."""
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    return optax.global_norm([leaf for path, leaf in leaves if not _frozen(config, path)])


def _frozen(config: OptimizerConfig, path: Any) -> bool:
    return any(key.key in config.frozen for key in path)


def _clip(largest: float) -> optax.GradientTransformationExtraArgs:
    """optax.clip_by_global_norm, as one factor of a norm known already: it is multiplied in where a gradient is read,
    while Optax's quotient becomes a pass over all gradients, and its norm another."""

    def update(updates: Any, state: Any, params: Any = None, **known: Any) -> tuple[Any, Any]:
        factor = jnp.minimum(1.0, largest / known["norm"])
        return jax.tree.map(lambda gradient: gradient * factor, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
