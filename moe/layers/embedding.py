"""Token embedding and output matrix."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe.config import ModelConfig
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.parallel.weights import matrix, use


class Embedding(nnx.Module):
    """Tokens to vectors, and, where tied, vectors back to logits."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.table = matrix(rngs, (config.vocab_size, config.d_model), config.d_model, config.init_scale)

    def __call__(self, tokens: Array, dtype: jnp.dtype) -> Array:
        """[B,T] int32 → [B,T,D]."""
        # Pinned here, the table's gradient is scatter-added where its tokens are and only then split over D; XLA, given
        # the final split alone, brings every token's gradient to every device.
        table = constrain(use("embedding.table", self.table[...], dtype), partition_specs.TABLE)
        return constrain(table[tokens], partition_specs.BATCH)

    def matrix(self, dtype: jnp.dtype) -> Array:
        """[V,D] in this dtype, for tied logits."""
        return use("embedding.table", self.table[...], dtype)


class Unembedding(nnx.Module):
    """Vectors to logits."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.kernel = matrix(rngs, (config.d_model, config.vocab_size), config.d_model, config.init_scale)

    def matrix(self, dtype: jnp.dtype) -> Array:
        """[D,V] in this dtype."""
        return use("unembedding.kernel", self.kernel[...], dtype)
