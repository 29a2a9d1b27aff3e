"""Token embedding and output matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moe.config import ModelConfig
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.parallel.parameters import gather_for_matmul, matrix


class Embedding(nnx.Module):
    """Table of token vectors; where embeddings are tied, also the output matrix."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        fan_in = 1 if config.scale_logits else config.d_model
        shape = config.vocab_size, config.d_model
        self.table = matrix(rngs, shape, partition_specs.OUT, fan_in=fan_in, scale=config.init_scale, inputs=0)

    def __call__(self, token_ids: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        """Look up vectors, in this dtype."""
        # With this constraint the table's gradient is scatter-added where the tokens are and then split over D. Given
        # only the final sharding, XLA would send every token's gradient to every device.
        table = constrain(self.matrix(dtype), partition_specs.TABLE)
        return constrain(table[token_ids], partition_specs.BATCH)

    def matrix(self, dtype: jnp.dtype) -> Float[Array, "V D"]:
        """The table in this dtype, for tied logits."""
        with jax.named_scope("embedding"):
            return gather_for_matmul(self.table, dtype)


class Unembedding(nnx.Module):
    """Output matrix: hidden states to logits."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, scale = config.d_model, config.init_scale
        self.kernel = matrix(rngs, (d, config.vocab_size), partition_specs.IN, fan_in=d, scale=scale)

    def matrix(self, dtype: jnp.dtype) -> Float[Array, "D V"]:
        """The matrix in this dtype."""
        with jax.named_scope("embedding"):
            return gather_for_matmul(self.kernel, dtype)
