"""Router of ZAYA1: an MLP over a vector that routers hand on from layer to layer (Zyphra 2026)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe.config import ModelConfig
from moe.layers.moe_layer import MoELayer
from moe.layers.norms import RMSNorm
from moe.layers.parameter import matrix, parameter, zeros
from moe.layers.router import Router, jittered, matmul
from moe.parallel.partition_specs import REPLICATED
from moe.routing.interface import RouterKind
from moe.routing.newer_gates import Zaya


class ZayaRouter(Router):
    """Logits of an MLP of r = W_down·x + b + scale * (r of the MoE layer below): norm, two layers with biases and the
    exact GELU, and ``kernel`` [H,E+1] (``ZayaRouter`` of transformers); r is handed on. All in float32."""

    def __init__(self, config: ModelConfig, *, kind: RouterKind = "linear", rngs: nnx.Rngs):
        super().__init__(config, kind=kind, rngs=rngs)
        d, h, scale = config.d_model, self.kernel_shape(config)[0], config.init_scale
        self.down = matrix(rngs, (d, h), REPLICATED, fan_in=d, scale=scale)
        self.down_bias = zeros((h,))
        self.carry_scale = parameter(jnp.ones((h,)), REPLICATED)
        self.norm = RMSNorm(h, config.norm_eps)
        self.first, self.second = (matrix(rngs, (h, h), REPLICATED, fan_in=h, scale=scale) for _ in range(2))
        self.first_bias, self.second_bias = zeros((h,)), zeros((h,))

    @staticmethod
    def kernel_shape(config: ModelConfig) -> tuple[int, ...]:
        """[H,E+1]."""
        gate = config.moe.gate
        assert isinstance(gate, Zaya)
        return gate.router_dim, config.moe.num_experts + config.moe.null_experts

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  # a router that hands a vector on returns both
        self, x: Float[Array, "G S D"], *, jitter: float = 0.0, rng: Array | None = None, carry: Any = None
    ) -> tuple[Float[Array, "G S E"], Float[Array, "G S H"]]:
        """Router logits, and the vector that is handed on."""
        vector = matmul(jittered(x, jitter, rng), self.down[...]) + self.down_bias[...]
        vector = vector + self.carry_scale[...] * carry
        hidden = self.norm(vector)
        for layer, bias in ((self.first, self.first_bias), (self.second, self.second_bias)):
            hidden = jax.nn.gelu(matmul(hidden, layer[...]) + bias[...], approximate=False)
        return super().__call__(hidden), vector


class ZayaMoE(MoELayer):
    """The layer of :class:`moe.routing.newer_gates.Zaya`."""

    router_class = ZayaRouter
