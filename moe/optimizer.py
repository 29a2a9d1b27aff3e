"""AdamW with linear warm-up, cosine decay and clipping of the global gradient norm, from Optax.

In: :class:`moe.config.OptimizerConfig` and the number of steps. Out: a gradient transformation and its schedule.
"""

from __future__ import annotations

from typing import Any

import jax
import optax

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


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """AdamW whose weight decay spares norm scales and biases."""

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
    optimizer = adamw
    if config.gradient_clip > 0:
        optimizer = optax.chain(optax.clip_by_global_norm(config.gradient_clip), adamw)
    if not config.frozen:
        return optimizer

    def labels(parameters: Any) -> Any:
        """Frozen parameters have no state, and their gradients do not count in the norm."""
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if any(key.key in config.frozen for key in path) else "trained", parameters
        )

    return optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)
