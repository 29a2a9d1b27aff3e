"""Router of cosines (X-MoE: Chi et al. 2022): tokens and experts' centroids in a small dimension, at a learned
temperature."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe.config import ModelConfig
from moe.layers.moe_layer import MoELayer
from moe.layers.parameter import matrix, parameter
from moe.layers.router import Router, matmul
from moe.parallel import partition_specs
from moe.routing.interface import RouterKind
from moe.routing.newer_gates import Cosine

#: Largest ln(1/τ): τ is at least 0.01, as in Tutel.
MOST_LOG_SCALE = math.log(100.0)


class CosineRouter(Router):
    """cos(P·x, c_e) / τ (X-MoE 2022, equations 5 and 6): ``kernel`` [P,E] has the centroids c, ``project`` is [D,P]."""

    def __init__(self, config: ModelConfig, *, kind: RouterKind = "linear", rngs: nnx.Rngs):
        super().__init__(config, kind=kind, rngs=rngs)
        d, size = config.d_model, self.kernel_shape(config)[0]
        gate = config.moe.gate
        assert isinstance(gate, Cosine)
        self.project = matrix(rngs, (d, size), partition_specs.REPLICATED, fan_in=d, scale=config.init_scale)
        self.log_scale = parameter(jnp.full((1,), -math.log(gate.temperature)), partition_specs.REPLICATED)

    @staticmethod
    def kernel_shape(config: ModelConfig) -> tuple[int, ...]:
        """[P,E]."""
        gate = config.moe.gate
        assert isinstance(gate, Cosine)
        return gate.router_dim, config.moe.num_experts + config.moe.null_experts

    def features(self, x: Float[Array, "G S D"]) -> Float[Array, "G S P"]:
        """Projected tokens of length 1, over τ."""
        scale = jnp.exp(jnp.minimum(self.log_scale[...], MOST_LOG_SCALE))
        return _unit(matmul(x, self.project[...]), axis=-1) * scale

    def columns(self) -> Float[Array, "P E"]:
        """Centroids of length 1."""
        return _unit(self.kernel[...], axis=0)


def _unit(vectors: Array, axis: int) -> Array:
    """Vectors divided by their norms."""
    return vectors * jax.lax.rsqrt(jnp.sum(jnp.square(vectors), axis=axis, keepdims=True) + 1e-12)


class CosineMoE(MoELayer):
    """The layer of :class:`moe.routing.newer_gates.Cosine`."""

    router_class = CosineRouter
