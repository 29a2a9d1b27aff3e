"""RMSNorm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe.parallel.parameters import parameter
from moe.parallel.partition_specs import REPLICATED


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + epsilon) · scale over the last axis, computed in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, epsilon: float):
        self.scale = parameter(jnp.ones((dim,), jnp.float32), REPLICATED)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalise x and return it in its own dtype."""
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * self.scale[...]).astype(x.dtype)
