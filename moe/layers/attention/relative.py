"""Relative position biases (T5; Raffel et al. 2020, section 2.1)."""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moe.config import ModelConfig
from moe.parallel.parameters import matrix
from moe.parallel.partition_specs import REPLICATED


class RelativeBias(nnx.Module):
    """A number per head and bucket of distances, added to attention scores. One table serves all layers of a stack."""

    def __init__(self, config: ModelConfig, *, bidirectional: bool, rngs: nnx.Rngs):
        self.bidirectional, self.max_distance = bidirectional, config.relative_max_distance
        shape = config.relative_buckets, config.num_heads
        self.table = matrix(rngs, shape, REPLICATED, fan_in=config.d_model, scale=config.init_scale, inputs=0)

    def __call__(self, distance: Int[Array | np.ndarray, "*batch"]) -> Float[Array, "*batch N"]:
        """Biases of scores whose key lies so many tokens after the query."""
        num_buckets = self.table.shape[0]
        return self.table[...][relative_bucket(distance, num_buckets, self.max_distance, self.bidirectional)]

    def by_distance(self, length: int) -> Float[Array, "N D"]:
        """Biases of the distances 1 − T … T − 1, all that occur in rows of T tokens."""
        return self(np.arange(1 - length, length)).T


def relative_bucket(
    distance: Int[Array | np.ndarray, "*batch"], num_buckets: int, max_distance: int, bidirectional: bool
) -> Int[Array | np.ndarray, "*batch"]:
    """Bucket of a distance, key position less query position.

    Half of the buckets hold one distance each, the others logarithmic ranges up to max_distance, and the last one all
    beyond. Bidirectional: half of all buckets are for keys after the query; else these share bucket 0.
    """
    if bidirectional:
        num_buckets //= 2
    buckets = jnp.asarray(_buckets(num_buckets, max_distance))
    before, after = jnp.clip(-distance, 0, max_distance), jnp.clip(distance, 0, max_distance)
    if not bidirectional:
        return buckets[before]
    return jnp.where(jnp.asarray(distance) > 0, num_buckets + buckets[after], buckets[before])


@functools.lru_cache
def _buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """Buckets of the distances 0 … max_distance, in the float32 arithmetic of the published code."""
    exact = num_buckets // 2
    distance = np.arange(max_distance + 1, dtype=np.float32)
    octaves = np.log(np.maximum(distance, 1) / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    ranges = exact + (octaves * np.float32(num_buckets - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(ranges, num_buckets - 1)).astype(np.int32)


def bias_of_rows(by_distance: Float[Array, "N D"], queries: int) -> Float[Array, "N Q U"]:
    """Spread biases [N,Q+U−1] of distances into those of Q queries and U keys: [n,q,u] is by_distance[n,u−q+Q−1].

    By copying and reshaping, since the gradient of an indexed read is a slow scatter.
    """
    heads, count = by_distance.shape
    repeated = jnp.tile(jnp.pad(by_distance, ((0, 0), (0, 1))), (1, queries))
    # Rows one shorter than the period: each begins one element earlier in it. [N,Q·(Q+U)] → [N,Q,Q+U−1]
    return repeated[:, : queries * count].reshape(heads, queries, count)[:, :, queries - 1 :]
