"""Multi-head latent attention (DeepSeek-V2 2024, section 2.1): keys and values are expanded from one small vector."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from moe.config import ModelConfig
from moe.layers.attention.attend import attend
from moe.layers.attention.positions import rotate, yarn_mscale
from moe.layers.attention.scoring import Scoring
from moe.layers.basic import KEEP_ALL, Dropout, RMSNorm, matrix
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.parallel.parameters import gather_for_matmul
from moe.parallel.partition_specs import HEADS_IN, HEADS_OUT, STORED

#: Epsilon of the norms of the compressed vectors, in the published code independent of ``model.norm_eps``.
LATENT_NORM_EPS = 1e-6


class LatentAttention(nnx.Module):
    """Causal attention whose keys and values are up-projections of a latent of ``kv_lora_rank`` dimensions.

    A head of queries and keys has ``head_dim`` dimensions, of which the last ``rope_dim`` are rotated; the rotated part
    of the key is one vector for all heads. Documents packed into one row never attend to each other.
    """

    def __init__(self, config: ModelConfig, *, window: int, rngs: nnx.Rngs):
        c = config
        self.config = config
        self.window = window
        self.unrotated_dim = c.head_dim - c.rope_dim
        heads, scale = (c.num_heads, c.head_dim), c.init_scale

        def from_model(rank: int) -> nnx.Param[Array]:
            return matrix(rngs, (c.d_model, rank), P(STORED, None), fan_in=c.d_model, scale=scale)

        if c.q_lora_rank:
            self.query_down = from_model(c.q_lora_rank)
            self.query_latent_norm = RMSNorm(c.q_lora_rank, LATENT_NORM_EPS)
            self.query_up = matrix(rngs, (c.q_lora_rank, *heads), HEADS_IN, fan_in=c.q_lora_rank, scale=scale)
        else:
            self.query = matrix(rngs, (c.d_model, *heads), HEADS_IN, fan_in=c.d_model, scale=scale)
        self.kv_down = from_model(c.kv_lora_rank + c.rope_dim)
        self.kv_latent_norm = RMSNorm(c.kv_lora_rank, LATENT_NORM_EPS)
        up_shape = (c.kv_lora_rank, c.num_heads, self.unrotated_dim + c.value_dim)
        self.kv_up = matrix(rngs, up_shape, HEADS_IN, fan_in=c.kv_lora_rank, scale=scale)
        out_shape = (c.num_heads, c.value_dim, c.d_model)
        self.out = matrix(rngs, out_shape, HEADS_OUT, fan_in=c.num_heads * c.value_dim, scale=scale, inputs=2)

    @staticmethod
    def cache_shapes(config: ModelConfig) -> tuple[tuple[int, int], None]:
        """[heads, dim] of what is cached for a position: the latent and the rotated key, no values."""
        return (1, config.kv_lora_rank + config.rope_dim), None

    def prefill(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        *,
        drop: Dropout = KEEP_ALL,
    ) -> tuple[Float[Array, "B T N V"], Float[Array, "B T 1 R"], None]:
        """Attend over expanded keys and values; return the heads and what is cached."""
        c = self.config
        query, latent = self._query(x, positions), self._latent(x, positions)
        compressed, rotated = jnp.split(latent, [c.kv_lora_rank], axis=-1)
        expanded = jnp.einsum("buor,rnh->bunh", compressed, gather_for_matmul(self.kv_up, x.dtype))
        key, value = jnp.split(expanded, [self.unrotated_dim], axis=-1)
        rotated = jnp.broadcast_to(rotated, (*key.shape[:-1], c.rope_dim))
        key = jnp.concatenate([key, rotated], axis=-1)
        query, key, value = (constrain(heads, partition_specs.HEADS) for heads in (query, key, value))
        scoring = Scoring(window=self.window, drop=drop, scale=self._score_scale())
        return attend(query, key, value, segment_ids, kind=c.attention, scoring=scoring), latent, None

    def project_cached(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N R"], Float[Array, "B T 1 R"], None]:
        """Queries that attend to latents directly, with the up-projection of the keys absorbed, and the latents."""
        query, rotated = jnp.split(self._query(x, positions), [self.unrotated_dim], axis=-1)
        key_up = gather_for_matmul(self.kv_up, x.dtype)[..., : self.unrotated_dim]
        query = jnp.concatenate([jnp.einsum("btnh,rnh->btnr", query, key_up), rotated], axis=-1)
        return query * self._score_scale(), self._latent(x, positions), None

    def attend_cached(
        self, query: Float[Array, "B T N R"], key: Float[Array, "B W 1 R"], value: None, mask: Bool[Array, "B 1 T W"]
    ) -> Float[Array, "B T N V"]:
        """Attend to cached latents; the up-projection of the values comes last."""
        del value
        heads = jax.nn.dot_product_attention(query, key, key, mask=mask, scale=1.0)
        value_up = gather_for_matmul(self.kv_up, query.dtype)[..., self.unrotated_dim :]
        return jnp.einsum("btnr,rnh->btnh", heads[..., : self.config.kv_lora_rank], value_up)

    def join(self, heads: Float[Array, "B T N V"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Project the heads back to the model dimension; the layer's input is not used."""
        del x
        return jnp.einsum("btnh,nhd->btd", heads, gather_for_matmul(self.out, heads.dtype))

    def _query(self, x: Array, positions: Array) -> Array:
        """[B,T,D] → rotated queries [B,T,N,H]."""
        if self.config.q_lora_rank:
            latent = self.query_latent_norm(x @ gather_for_matmul(self.query_down, x.dtype))
            query = jnp.einsum("btr,rnh->btnh", latent, gather_for_matmul(self.query_up, x.dtype))
        else:
            query = jnp.einsum("btd,dnh->btnh", x, gather_for_matmul(self.query, x.dtype))
        return constrain(rotate(query, positions, self.config, from_end=True), partition_specs.HEADS)

    def _latent(self, x: Array, positions: Array) -> Array:
        """[B,T,D] → [B,T,1,kv_lora_rank + rope_dim]: the normalised latent and the rotated key."""
        latent = x @ gather_for_matmul(self.kv_down, x.dtype)
        compressed, key = jnp.split(latent, [self.config.kv_lora_rank], axis=-1)
        key = rotate(key[:, :, None], positions, self.config)
        return jnp.concatenate([self.kv_latent_norm(compressed)[:, :, None], key], axis=-1)

    def _score_scale(self) -> float:
        """Factor of query·key: 1/sqrt(H), and under YaRN the square of its temperature (DeepSeek-V2, section 3.1.4)."""
        scaling, scale = self.config.rope_scaling, self.config.head_dim**-0.5
        if scaling.kind == "none" or not scaling.mscale_all_dim:
            return scale
        return scale * yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
