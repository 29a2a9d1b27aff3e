"""Router module: router logits in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from moe.config import ModelConfig
from moe.parallel.parameters import matrix, parameter, zeros
from moe.parallel.partition_specs import REPLICATED
from moe.routing.gates import SoftMoE
from moe.routing.interface import RouterKind


class SelectionBias(nnx.Variable):
    """[E] float32 without a gradient, which the train step updates: a bias that the scores get for selection only, or
    another state that ``Gate.state`` names."""


#: First value of the strength of ReMoE's penalty (2024, section 3.3).
FIRST_PENALTY = 1e-8


class Router(nnx.Module):
    """Linear router, x·W_g in float32 whatever the compute dtype ("selective precision", Switch 2021, section 2.4).

    With ``moe.router_dtype="bfloat16"``, x, W_g and the logits are rounded to bfloat16, for ablations. The gate says
    which further parameters there are (``kind``): W_noise (W_g and W_noise start at zero,
    Shazeer 2017, section 4 and appendix A), a selection bias (zero at first), or one column per slot. Deviation from
    Soft MoE (2023, section 2.3): x and W_g are not L2-normalised, because x is the output of an RMSNorm.
    """

    def __init__(self, config: ModelConfig, *, kind: RouterKind = "linear", rngs: nnx.Rngs):
        gate = config.moe.gate
        d = config.d_model
        e = config.moe.num_experts + config.moe.null_experts
        update = "none" if gate is None else gate.state.update
        self.dtype = config.moe.router_dtype
        first = FIRST_PENALTY if update == "penalty" else 0.0
        state = jnp.full((e,), first, jnp.float32)
        self.bias = None if update == "none" else parameter(state, REPLICATED, kind=SelectionBias)
        self.logit_bias = zeros((e,)) if config.moe.bias != "none" else None
        self.noise = zeros((d, e)) if kind == "noisy" else None
        if kind == "noisy":
            self.kernel = zeros((d, e), inputs=1)
        else:
            shape = (d, e, gate.slots) if isinstance(gate, SoftMoE) else (d, e)
            self.kernel = matrix(rngs, shape, REPLICATED, fan_in=d, scale=config.init_scale)

    def __call__(
        self, x: Float[Array, "G S D"], *, jitter: float = 0.0, rng: Array | None = None
    ) -> Float[Array, "G S E"] | Float[Array, "G S E P"]:
        """Router logits in float32, per slot (P) for a gate with slots.

        Args:
            x: activations; jitter multiplies a copy that only the router sees.
            jitter: the factors are uniform in [1 − jitter, 1 + jitter].
            rng: key of the jitter; None: no jitter.
        """
        x = x.astype(jnp.float32)
        if rng is not None and jitter > 0.0:
            x = x * jax.random.uniform(rng, x.shape, minval=1.0 - jitter, maxval=1.0 + jitter)
        logits = _matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype)).astype(jnp.float32)
        return logits if self.logit_bias is None else logits + self.logit_bias[...]

    def noise_logits(self, x: Float[Array, "G S D"]) -> Float[Array, "G S E"] | None:
        """x·W_noise in float32; None for a gate without noise."""
        return None if self.noise is None else _matmul(x.astype(jnp.float32), self.noise[...])


def _matmul(x: Array, kernel: Array) -> Array:
    # By default TPUs multiply float32 matrices in bfloat16 passes.
    return jnp.einsum("gsd,d...->gs...", x, kernel, precision=jax.lax.Precision.HIGHEST)
