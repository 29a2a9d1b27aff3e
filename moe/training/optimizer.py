"""AdamW with clipping of the global gradient norm and frozen parameters, built from Optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from moe.config import OptimizerConfig
from moe.training.schedules import learning_rate_schedule


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """AdamW with weight decay on matrices only; ``update`` takes ``norm=``, the result of :func:`gradient_norm`."""
    adamw = optax.adamw(
        learning_rate_schedule(config, num_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decay_mask,
    )
    optimizer = optax.chain(_clip(config.gradient_clip), adamw) if config.gradient_clip > 0 else adamw
    if not config.frozen:
        return optax.with_extra_args_support(optimizer)

    def labels(parameters: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if _is_frozen(config, path) else "trained", parameters
        )

    # Frozen parameters have no optimizer state.
    return optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def gradient_norm(config: OptimizerConfig, gradients: Any) -> Array:
    """Global norm, [], of the gradients of all parameters that are not frozen."""
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    return optax.global_norm([leaf for path, leaf in leaves if not _is_frozen(config, path)])


def _decay_mask(parameters: Any) -> Any:
    """True for matrices, False for norm scales and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith(("scale", "bias")), parameters)


def _is_frozen(config: OptimizerConfig, path: Any) -> bool:
    return any(key.key in config.frozen for key in path)


def _clip(largest: float) -> optax.GradientTransformationExtraArgs:
    """Clip by a global norm that is already known.

    optax.clip_by_global_norm computes the norm again and materialises the scaled gradients; a multiplication by one
    factor is fused into the optimizer's own pass over them.
    """

    def update(updates: Any, state: Any, params: Any = None, **known: Any) -> tuple[Any, Any]:
        factor = jnp.minimum(1.0, largest / known["norm"])
        return jax.tree.map(lambda gradient: gradient * factor, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
