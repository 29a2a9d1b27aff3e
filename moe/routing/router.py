"""The router module: tokens to router logits, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe.config import ModelConfig
from moe.parallel.weights import matrix
from moe.routing.registry import GATES


class SelectionBias(nnx.Variable):
    """[E] float32, added to the scores for the choice alone. No gradient reaches it; the train step moves it."""


class Router(nnx.Module):
    """x·W_g in float32 whatever the compute dtype (Switch 2021, section 2.4, "selective precision"), unless
    ``moe.router_dtype`` says bfloat16: x, W_g and the logits are then rounded to it, for who wants to see what happens.

    The gate says what else it has (:attr:`moe.routing.registry.Gate.router`): W_noise, both zero at first (Shazeer 2017, section
    4 and appendix A); a selection bias, zero at first; or a column per slot. Deviation from Soft MoE (2023, section
    2.3): x and W_g are not L2-normalised, x being the output of an RMSNorm.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, e, kind = config.d_model, config.moe.num_experts, GATES[config.moe.gate].router
        self.dtype = config.moe.router_dtype
        self.bias = SelectionBias(jnp.zeros((e,), jnp.float32)) if kind == "biased" else None
        self.noise = nnx.Param(jnp.zeros((d, e), jnp.float32)) if kind == "noisy" else None
        if kind == "noisy":
            self.kernel = nnx.Param(jnp.zeros((d, e), jnp.float32))
        else:
            shape = (d, e, config.moe.slots_per_expert) if kind == "slots" else (d, e)
            self.kernel = matrix(rngs, shape, d, config.init_scale)

    def __call__(self, x: Array, *, jitter: float = 0.0, rng: Array | None = None) -> Array:
        """[G,S,D] → router_logits [G,S,E] float32, or [G,S,E,P] of slots.

        The jitter multiplies this copy of x and nothing else.
        """
        x = x.astype(jnp.float32)
        if rng is not None and jitter > 0.0:
            x = x * jax.random.uniform(rng, x.shape, minval=1.0 - jitter, maxval=1.0 + jitter)
        return _matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype)).astype(jnp.float32)

    def noise_logits(self, x: Array) -> Array | None:
        """[G,S,D] → x·W_noise [G,S,E] float32, or None."""
        return None if self.noise is None else _matmul(x.astype(jnp.float32), self.noise[...])


def _matmul(x: Array, kernel: Array) -> Array:
    # TPUs multiply float32 in bfloat16 passes unless told otherwise.
    return jnp.einsum("gsd,d...->gs...", x, kernel, precision=jax.lax.Precision.HIGHEST)
