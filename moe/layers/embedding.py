"""Token embedding and output matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moe.config import ModelConfig
from moe.layers.parameter import matrix, zeros
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.parallel.parameters import gather_for_matmul, read_as


class Embedding(nnx.Module):
    """Table of token vectors; where embeddings are tied, also the output matrix."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape, fan_in = (config.vocab_size, config.d_model), 1 if config.scale_logits else config.d_model
        self.table = matrix(rngs, shape, partition_specs.OUT, fan_in=fan_in, scale=config.init_scale, inputs=0)

    def __call__(self, token_ids: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        """Look up vectors, in this dtype."""
        # With this constraint the table's gradient is scatter-added where the tokens are and then split over D. Given
        # only the final sharding, XLA would send every token's gradient to every device.
        table = constrain(self.matrix(dtype), partition_specs.TABLE)
        # In bfloat16 a sum of equal gradients stops at 256 of them, and frequent tokens occur thousands of times.
        return constrain(read_as(table.astype(jnp.float32)[token_ids], table[token_ids]), partition_specs.BATCH)

    def matrix(self, dtype: jnp.dtype) -> Float[Array, "V D"]:
        """The table in this dtype, for tied logits."""
        with jax.named_scope("embedding"):
            return gather_for_matmul(self.table, dtype)


class Unembedding(nnx.Module):
    """Output matrix: hidden states to logits. A bias of the logits is its last row; :func:`with_one` adds its 1."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, scale = config.d_model, config.init_scale
        self.kernel = matrix(rngs, (d, config.vocab_size), partition_specs.IN, fan_in=d, scale=scale)
        self.bias = zeros((config.vocab_size,)) if config.logit_bias else None

    def matrix(self, dtype: jnp.dtype) -> Float[Array, "rows V"]:
        """The matrix in this dtype: [D,V], or [D+1,V] with a bias."""
        with jax.named_scope("embedding"):
            kernel = gather_for_matmul(self.kernel, dtype)
            return kernel if self.bias is None else jnp.concatenate([kernel, self.bias[...].astype(dtype)[None]])


def with_one(x: Float[Array, "*batch D"]) -> Float[Array, "*batch inputs"]:
    """Append a 1 to hidden states, for the bias in the last row of the output matrix."""
    return jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
