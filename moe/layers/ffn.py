"""The dense FFN and its activations."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from moe.config import ModelConfig
from moe.layers.dropout import KEEP_ALL, Dropout
from moe.parallel.remat import HIDDEN
from moe.parallel.weights import gather_for_matmul, matrix

#: Slope of the sigmoid, and bound of both inputs, in gpt-oss.
SWIGLU_SLOPE, SWIGLU_LIMIT = 1.702, 7.0


def _clamped_swiglu(gate: Array, up: Array) -> Array:
    gate, up = jnp.minimum(gate, SWIGLU_LIMIT), jnp.clip(up, -SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate * jax.nn.sigmoid(SWIGLU_SLOPE * gate) * (up + 1)


#: (gate, up) → hidden activation. geglu uses the tanh approximation, as T5 does; geglu_exact the error function.
GATED_ACTIVATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "swiglu": lambda gate, up: jax.nn.silu(gate) * up,
    "swiglu_clamped": _clamped_swiglu,
    "geglu": lambda gate, up: jax.nn.gelu(gate) * up,
    "geglu_exact": lambda gate, up: jax.nn.gelu(gate, approximate=False) * up,
    "reglu": lambda gate, up: jax.nn.relu(gate) * up,
}


PLAIN_ACTIVATIONS = {"gelu": jax.nn.gelu, "relu": jax.nn.relu}


def activate(
    activation: str, up: Float[Array, "*batch F"], gate: Float[Array, "*batch F"] | None
) -> Float[Array, "*batch F"]:
    """Hidden activation of an FFN: act(gate)·up where gated (Shazeer 2020), act(up) otherwise."""
    if gate is not None:
        return GATED_ACTIVATIONS[activation](gate, up)
    return PLAIN_ACTIVATIONS[activation](up)


class DenseFFN(nnx.Module):
    """down(act(gate(x))·up(x)), or down(act(up(x))) for a plain activation. No biases."""

    def __init__(self, config: ModelConfig, d_ff: int, *, rngs: nnx.Rngs):
        d, f = config.d_model, d_ff
        self.activation = config.activation
        self.up = matrix(rngs, (d, f), d, config.init_scale)
        self.down = matrix(rngs, (f, d), f, config.init_scale)
        self.gate = matrix(rngs, (d, f), d, config.init_scale) if self.activation in GATED_ACTIVATIONS else None

    def __call__(self, x: Float[Array, "*batch D"], drop: Dropout = KEEP_ALL) -> Float[Array, "*batch D"]:
        """Apply the FFN to every token; hidden activations are dropped."""
        up = checkpoint_name(x @ gather_for_matmul("dense.up", self.up[...], x.dtype), HIDDEN)
        gate = None
        if self.gate is not None:
            gate = checkpoint_name(x @ gather_for_matmul("dense.gate", self.gate[...], x.dtype), HIDDEN)
        hidden = drop(activate(self.activation, up, gate), place=2)
        return hidden @ gather_for_matmul("dense.down", self.down[...], x.dtype)
