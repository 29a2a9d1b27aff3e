"""Feed-forward networks: dense, stacked experts, and the shared expert."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from moe.config import ModelConfig
from moe.dispatch import quantized
from moe.dispatch.fake_quantized import rounding
from moe.dispatch.ffn import GATED_ACTIVATIONS, ExpertWeights, activate
from moe.layers.call import Call, Report
from moe.layers.inputs import KEEP_ALL, Dropout, Site
from moe.layers.parameter import matrix, zeros
from moe.parallel.parameters import gather_for_matmul, matmul
from moe.parallel.partition_specs import (
    EXPERT_BIASES,
    EXPERTS_IN,
    EXPERTS_OUT,
    HIDDEN,
    IN,
    KEEP_HIDDEN,
    KEEP_OUTPUTS,
    OUT,
    REPLICATED,
)
from moe.routing.routing import Routing


class DenseFFN(nnx.Module):
    """down(act(gate(x))·up(x)), or down(act(up(x))) for a plain activation. No biases."""

    def __init__(self, config: ModelConfig, d_ff: int, *, rngs: nnx.Rngs):
        d, f = config.d_model, d_ff
        self.activation, self.precision = config.activation, config.low_precision
        gated = self.activation in GATED_ACTIVATIONS
        self.up = matrix(rngs, (d, f), IN, fan_in=d, scale=config.init_scale)
        self.down = matrix(rngs, (f, d), OUT, fan_in=f, scale=config.init_scale)
        self.gate = matrix(rngs, (d, f), IN, fan_in=d, scale=config.init_scale) if gated else None

    def __call__(self, x: Float[Array, "*batch D"], drop: Dropout = KEEP_ALL) -> Float[Array, "*batch D"]:
        """Apply the FFN to every token; hidden activations are dropped."""
        up = checkpoint_name(self._matmul(x, self.up), HIDDEN)
        gate = None if self.gate is None else checkpoint_name(self._matmul(x, self.gate), HIDDEN)
        hidden = drop(activate(self.activation, up, gate))
        return self._matmul(hidden, self.down)

    def run(self, x: Float[Array, "B T D"], call: Call) -> tuple[Float[Array, "B T D"], Report]:
        """The FFN as a part of a block."""
        return self(x, call.drop.at(Site.FFN_HIDDEN)), Report()

    def _matmul(self, x: Array, weight: nnx.Param[Array]) -> Array:
        return quantized.matmul_in(self.precision, matmul)(x, gather_for_matmul(weight, x.dtype))


class Experts(nnx.Module):
    """E FFNs of one shape, as three stacked matrices."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        e = config.moe.num_experts
        d = config.expert_dim
        f = config.moe.d_ff
        self.take_settings(config)
        self.up = matrix(rngs, (e, d, f), EXPERTS_IN, fan_in=d, scale=config.init_scale)
        self.down = matrix(rngs, (e, f, d), EXPERTS_OUT, fan_in=f, scale=config.init_scale)
        gated, biased = self.activation in GATED_ACTIVATIONS, config.moe.bias == "all"
        self.gate = matrix(rngs, (e, d, f), EXPERTS_IN, fan_in=d, scale=config.init_scale) if gated else None
        self.up_bias = zeros((e, f), EXPERT_BIASES) if biased else None
        self.gate_bias = zeros((e, f), EXPERT_BIASES) if biased and gated else None
        # The layer adds it: what a device computes is a partial sum.
        self.down_bias = zeros((e, d), P(None, "fsdp")) if biased else None

    def take_settings(self, config: ModelConfig) -> None:
        """Keep the settings that decide how the weights are applied."""
        self.activation = config.activation
        self.precision = config.low_precision
        self.remat = config.remat
        self.sent_precision, self.rounding = config.sent_precision, rounding(config.fake_quantize)

    def matrices(self, name: str) -> Array | None:
        """[E, inputs, outputs] of ``up``, ``gate`` or ``down``; None for an absent gate."""
        stored = getattr(self, name)
        return None if stored is None else stored[...]

    @property
    def weights(self) -> ExpertWeights:
        """The parameters but ``down_bias``, as they are stored, or rounded to ``model.fake_quantize``."""
        up, gate, down = (
            array if array is None or self.rounding is None else self.rounding(array)
            for array in map(self.matrices, ("up", "gate", "down"))
        )
        assert up is not None
        assert down is not None
        gate_bias = None if self.gate_bias is None else self.gate_bias[...]
        biases = None if self.up_bias is None else (self.up_bias[...], gate_bias)
        return ExpertWeights(
            up,
            gate,
            down,
            biases,
            activation=self.activation,
            precision=self.precision,
            sent_precision=self.sent_precision,
            keeps_hidden=self.remat in KEEP_HIDDEN,
            keeps_outputs=self.remat in KEEP_OUTPUTS,
        )

    def with_output_biases(
        self, y: Float[Array, "G S D"], routing: Routing, kept: Bool[Array, "G S K"], dtype: Any
    ) -> Float[Array, "G S D"]:
        """Add the weighted sum of the output biases of each token's experts, cast to this dtype, in float32."""
        biases = self.down_bias
        if biases is None:
            return y
        choices = jax.nn.one_hot(routing.expert_index, biases.shape[0], dtype=jnp.float32)  # [G,S,K,E]
        weights = jnp.einsum("gsk,gske->gse", jnp.where(kept, routing.combine_weights, 0), choices)
        # Cast while gathering: XLA would gather an array that is not cast where the scan slices it, outside its scope.
        return y + weights @ gather_for_matmul(biases, dtype)


class SharedExpert(nnx.Module):
    """FFN applied to every token beside its K experts (DeepSeekMoE 2024, equation 9), optionally weighted by
    sigmoid(x·w) (Qwen2-MoE), which is float32 as the weights of the others."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.dense = DenseFFN(config, config.moe.shared_d_ff, rngs=rngs)
        d, scale = config.d_model, config.init_scale
        self.gate = matrix(rngs, (d, 1), REPLICATED, fan_in=d, scale=scale) if config.moe.shared_gate else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the FFN and its weight."""
        y = self.dense(x)
        return y if self.gate is None else (y * jax.nn.sigmoid(x @ self.gate[...])).astype(x.dtype)
