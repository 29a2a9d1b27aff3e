"""The dense FFN."""

from __future__ import annotations

from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from moe.config import ModelConfig
from moe.dispatch.ffn import GATED_ACTIVATIONS, activate
from moe.layers.dropout import KEEP_ALL, Dropout
from moe.parallel.parameters import gather_for_matmul, matrix
from moe.parallel.partition_specs import IN, OUT
from moe.parallel.remat import HIDDEN


class DenseFFN(nnx.Module):
    """down(act(gate(x))·up(x)), or down(act(up(x))) for a plain activation. No biases."""

    def __init__(self, config: ModelConfig, d_ff: int, *, rngs: nnx.Rngs):
        d, f = config.d_model, d_ff
        self.activation = config.activation
        gated = self.activation in GATED_ACTIVATIONS
        self.up = matrix(rngs, (d, f), IN, fan_in=d, scale=config.init_scale)
        self.down = matrix(rngs, (f, d), OUT, fan_in=f, scale=config.init_scale)
        self.gate = matrix(rngs, (d, f), IN, fan_in=d, scale=config.init_scale) if gated else None

    def __call__(self, x: Float[Array, "*batch D"], drop: Dropout = KEEP_ALL) -> Float[Array, "*batch D"]:
        """Apply the FFN to every token; hidden activations are dropped."""
        up = checkpoint_name(x @ gather_for_matmul(self.up, x.dtype), HIDDEN)
        gate = None
        if self.gate is not None:
            gate = checkpoint_name(x @ gather_for_matmul(self.gate, x.dtype), HIDDEN)
        hidden = drop(activate(self.activation, up, gate))
        return hidden @ gather_for_matmul(self.down, x.dtype)
