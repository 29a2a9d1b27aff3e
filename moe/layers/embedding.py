"""Token embedding and output matrix."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moe.config import ModelConfig
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.parallel.weights import gather_for_matmul, matrix


class Embedding(nnx.Module):
    """Table of token vectors; where embeddings are tied, also the output matrix."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        fan_in = 1 if config.scale_logits else config.d_model
        self.table = matrix(rngs, (config.vocab_size, config.d_model), fan_in, config.init_scale)

    def __call__(self, token_ids: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        """Look up vectors, in this dtype."""
        # With this constraint the table's gradient is scatter-added where the tokens are and then split over D. Given
        # only the final sharding, XLA would send every token's gradient to every device.
        table = constrain(gather_for_matmul("embedding.table", self.table[...], dtype), partition_specs.TABLE)
        return constrain(table[token_ids], partition_specs.BATCH)

    def matrix(self, dtype: jnp.dtype) -> Float[Array, "V D"]:
        """The table in this dtype, for tied logits."""
        return gather_for_matmul("embedding.table", self.table[...], dtype)


class Unembedding(nnx.Module):
    """Output matrix: hidden states to logits."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.kernel = matrix(rngs, (config.d_model, config.vocab_size), config.d_model, config.init_scale)

    def matrix(self, dtype: jnp.dtype) -> Float[Array, "D V"]:
        """The matrix in this dtype."""
        return gather_for_matmul("unembedding.kernel", self.kernel[...], dtype)
