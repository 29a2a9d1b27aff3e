"""Norms over the last axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe.config import ModelConfig
from moe.layers.parameter import parameter, zeros
from moe.parallel.partition_specs import (
    REPLICATED,
)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + epsilon) · scale over the last axis, computed in float32 (Zhang and Sennrich 2019); 1 + scale
    in place of scale if it is centred at zero."""

    def __init__(self, dim: int, epsilon: float, *, zero_centred: bool = False):
        self.scale = parameter(jnp.full((dim,), 0.0 if zero_centred else 1.0, jnp.float32), REPLICATED)
        self.epsilon = epsilon
        self.zero_centred = zero_centred

    @classmethod
    def of(cls, config: ModelConfig, dim: int = 0) -> RMSNorm:
        """A norm of the model, of ``d_model`` unless another dimension is given."""
        kind = LayerNorm if config.layer_norm else cls
        return kind(dim or config.d_model, config.norm_eps, zero_centred=config.zero_centred_norms)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalise x and return it in its own dtype."""
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        scale = 1.0 + self.scale[...].astype(jnp.float32) if self.zero_centred else self.scale[...]
        return (x32 * scale).astype(x.dtype)


class LayerNorm(RMSNorm):
    """RMSNorm of x − mean(x), plus a bias (Ba et al. 2016)."""

    def __init__(self, dim: int, epsilon: float, *, zero_centred: bool = False):
        super().__init__(dim, epsilon, zero_centred=zero_centred)
        self.bias = zeros((dim,))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalise x and return it in its own dtype."""
        x32 = x.astype(jnp.float32)
        normalised = super().__call__(x32 - jnp.mean(x32, axis=-1, keepdims=True))
        return (normalised + self.bias[...]).astype(x.dtype)
