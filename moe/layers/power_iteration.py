"""Router tied to its experts by power iteration (MPI: Wu et al. 2026)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe.layers.moe_layer import MoELayer
from moe.layers.tokens import Keys, Tokens
from moe.routing.newer_gates import PowerIteration


def power_step(columns: Float[Array, "D E"], matrices: Float[Array, "E D F"]) -> Float[Array, "D E"]:
    """W_e·W_eᵀ·c_e of each column c_e and its expert's matrix (MPI 2026, equation 4)."""
    precision = jax.lax.Precision.HIGHEST  # as that of the logits
    responses = jnp.einsum("de,edf->ef", columns, matrices, precision=precision)
    return jnp.einsum("ef,edf->de", responses, matrices, precision=precision)


def retracted(columns: Float[Array, "D E"], length: float) -> Float[Array, "D E"]:
    """Columns scaled to the norm ``length`` / √E (MPI 2026, equations 5 and 7); a column of zeros stays."""
    # Made 1 at most first: squares of numbers below 1e-19 are 0 in float32.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(columns), axis=0))
    columns = columns / jnp.where(largest > 0, largest, 1.0)
    squares = jnp.sum(jnp.square(columns), axis=0)
    return columns * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1.0)) * (length / columns.shape[1] ** 0.5)


class PowerIterationMoE(MoELayer):
    """The layer of :class:`moe.routing.newer_gates.PowerIteration`.

    W_g is a parameter as elsewhere. The logits are those of the tied columns, computed in every call; their gradient
    reaches W_g and the experts' gate matrices, or the up matrices of a plain activation.
    """

    def _logits(self, tokens: Tokens, keys: Keys) -> tuple[Float[Array, "G S E"], Tokens]:
        gate = self.config.gate
        assert isinstance(gate, PowerIteration)
        assert self.router is not None
        matrices = self.experts.matrices("up" if self.experts.gate is None else "gate")
        assert matrices is not None
        columns = self.router.kernel[...]
        if self.latent is None:
            columns = power_step(columns, matrices)
        else:  # an expert's matrix is the product of the projection and its own
            down = self.latent.down[...]
            columns = down @ power_step(down.T @ columns, matrices)
        tied = nnx.clone(self.router)
        tied.kernel[...] = retracted(columns, gate.length)
        return tied(tokens.x, jitter=self.config.jitter, rng=keys.jitter), tokens
