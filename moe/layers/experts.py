"""Expert parameters: E stacked FFNs, and the shared expert."""

from __future__ import annotations

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from moe.config import ModelConfig
from moe.dispatch.ffn import GATED_ACTIVATIONS, ExpertWeights
from moe.layers.ffn import DenseFFN
from moe.parallel.parameters import matrix, zeros
from moe.parallel.partition_specs import EXPERT_BIASES, EXPERTS_IN, EXPERTS_OUT, REPLICATED


class Experts(nnx.Module):
    """E FFNs of one shape, as three stacked matrices."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        e, d, f = config.moe.num_experts, config.d_model, config.moe.d_ff
        self.activation = config.activation
        self.up = matrix(rngs, (e, d, f), EXPERTS_IN, fan_in=d, scale=config.init_scale)
        self.down = matrix(rngs, (e, f, d), EXPERTS_OUT, fan_in=f, scale=config.init_scale)
        gated, biased = self.activation in GATED_ACTIVATIONS, config.moe.bias == "all"
        self.gate = matrix(rngs, (e, d, f), EXPERTS_IN, fan_in=d, scale=config.init_scale) if gated else None
        self.up_bias = zeros((e, f), EXPERT_BIASES) if biased else None
        self.gate_bias = zeros((e, f), EXPERT_BIASES) if biased and gated else None
        # The layer adds it: what a device computes is a partial sum.
        self.down_bias = zeros((e, d), P(None, "fsdp")) if biased else None

    @property
    def weights(self) -> ExpertWeights:
        """The parameters but ``down_bias``, as they are stored."""
        gate = None if self.gate is None else self.gate[...]
        if self.up_bias is None:
            return ExpertWeights(self.up[...], gate, self.down[...])
        gate_bias = None if self.gate_bias is None else self.gate_bias[...]
        return ExpertWeights(self.up[...], gate, self.down[...], (self.up_bias[...], gate_bias))


class SharedExpert(nnx.Module):
    """FFN applied to every token beside its K experts (DeepSeekMoE 2024, equation 9), optionally weighted by
    sigmoid(x·w) (Qwen2-MoE)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.dense = DenseFFN(config, config.moe.shared_d_ff, rngs=rngs)
        d, scale = config.d_model, config.init_scale
        self.gate = matrix(rngs, (d, 1), REPLICATED, fan_in=d, scale=scale) if config.moe.shared_gate else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the FFN and its weight."""
        y = self.dense(x)
        return y if self.gate is None else y * jax.nn.sigmoid(x @ self.gate[...].astype(x.dtype))
