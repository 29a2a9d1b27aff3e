"""Multi-head latent attention (DeepSeek-V2 2024, section 2.1): keys and values are up-projections of a latent."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from moe.config import ModelConfig
from moe.config.mixers import MultiHeadLatent
from moe.dispatch import quantized
from moe.layers.attention.attend import attend
from moe.layers.attention.cache import LayerCache, slots
from moe.layers.attention.largest import largest_scores
from moe.layers.attention.scoring import Rotation, Scoring, grow, yarn_mscale
from moe.layers.inputs import KEEP_ALL, Dropout, Rows
from moe.layers.mixers.attention import project_in
from moe.layers.mixers.interface import MixerLayer
from moe.layers.norms import RMSNorm
from moe.layers.parameter import matrix
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.parallel.parameters import gather_for_matmul
from moe.parallel.partition_specs import HEADS_IN, HEADS_OUT, STORED

#: Epsilon of the norms of the compressed vectors, in the published code independent of ``model.norm_eps``.
LATENT_NORM_EPS = 1e-6


class LatentAttention(MixerLayer):
    """Causal attention whose keys and values are up-projections of one latent per token.

    The rotated part of the key is one vector for all heads. Documents packed into one row never attend to each other.
    """

    signals = ("largest_scores",)

    def __init__(self, config: ModelConfig, mixer: MultiHeadLatent, *, rngs: nnx.Rngs):
        super().__init__(config, mixer, rngs=rngs)
        c, m = config, mixer
        self.unrotated_dim = m.head_dim - m.rope_dim
        self.rotation = Rotation.of(c)
        heads, scale = (m.heads, m.head_dim), c.init_scale

        def from_model(rank: int) -> nnx.Param[Array]:
            return matrix(rngs, (c.d_model, rank), P(STORED, None), fan_in=c.d_model, scale=scale)

        if m.query_rank:
            self.query_down = from_model(m.query_rank)
            self.query_latent_norm = RMSNorm(m.query_rank, LATENT_NORM_EPS)
            self.query_up = matrix(rngs, (m.query_rank, *heads), HEADS_IN, fan_in=m.query_rank, scale=scale)
        else:
            self.query = matrix(rngs, (c.d_model, *heads), HEADS_IN, fan_in=c.d_model, scale=scale)
        self.kv_down = from_model(m.rank + m.rope_dim)
        self.kv_latent_norm = RMSNorm(m.rank, LATENT_NORM_EPS)
        up_shape = (m.rank, m.heads, self.unrotated_dim + m.value_dim)
        self.kv_up = matrix(rngs, up_shape, HEADS_IN, fan_in=m.rank, scale=scale)
        out_shape = (m.heads, m.value_dim, c.d_model)
        self.out = matrix(rngs, out_shape, HEADS_OUT, fan_in=m.heads * m.value_dim, scale=scale, inputs=2)

    @classmethod
    def empty_state(
        cls, config: ModelConfig, mixer: MultiHeadLatent, leading: tuple[int, int], length: int, *, ahead: int = 0
    ) -> LayerCache:
        """Slots of the latent and the rotated key; no values."""
        latent = 1, mixer.rank + mixer.rope_dim
        return LayerCache.empty(leading, slots(mixer.window, length, ahead), latent, None, config.dtype)

    def prefill(
        self, x: Float[Array, "B T D"], rows: Rows, drop: Dropout = KEEP_ALL
    ) -> tuple[Float[Array, "B T N V"], Float[Array, "B T 1 R"]]:
        """Attend over expanded keys and values; return the heads and what is cached."""
        rows.require_plain()
        query, key, value, latent = self._expanded(x, rows.positions)
        scoring = dataclasses.replace(self._scoring(), drop=drop)
        return attend(query, key, value, rows.segment_ids, kind=self.config.attention, scoring=scoring), latent

    def largest_scores(self, x: Float[Array, "B T D"], rows: Rows) -> Float[Array, " N"]:
        """Largest score of each head."""
        query, key, *_ = self._expanded(x, rows.positions)
        return largest_scores(query, key, rows.segment_ids, rows.as_keys, self._scoring())

    @classmethod
    def score_factors(cls, mixer: MultiHeadLatent, factors: Float[Array, "*layers N"]) -> dict[str, Float[Array, ...]]:
        """The root for what is not rotated of queries and keys; the factor itself for rotated queries, because all
        heads share the rotated key."""
        root, unrotated = jnp.sqrt(factors), mixer.head_dim - mixer.rope_dim

        def matrix_of(first: Array, second: Array, count: int) -> Array:
            columns = [jnp.repeat(first[..., None], unrotated, -1), jnp.repeat(second[..., None], count, -1)]
            return jnp.concatenate(columns, axis=-1)[..., None, :, :]  # [...,1,N,H]

        query = matrix_of(root, factors, mixer.rope_dim)
        return {"query": query, "query_up": query, "kv_up": matrix_of(root, jnp.ones_like(root), mixer.value_dim)}

    def _expanded(self, x: Array, positions: Array) -> tuple[Array, Array, Array, Array]:
        """[B,T,D] → queries and keys [B,T,N,H], values [B,T,N,V], latents [B,T,1,rank + rope_dim]."""
        m = self.mixer
        query, latent = self._query(x, positions), self._latent(x, positions)
        key_up, value_up = jnp.split(gather_for_matmul(self.kv_up, x.dtype), [self.unrotated_dim], axis=-1)
        # Keys are one product with the whole latent, in which an identity matrix copies the rotated part to every head:
        # a separate broadcast and concatenation would each be a pass over all keys.
        copies = jnp.broadcast_to(jnp.eye(m.rope_dim, dtype=x.dtype)[:, None], (m.rope_dim, m.heads, m.rope_dim))
        key_up = jnp.pad(key_up, ((0, 0), (0, 0), (0, m.rope_dim)))
        key_up = jnp.concatenate([key_up, jnp.pad(copies, ((0, 0), (0, 0), (self.unrotated_dim, 0)))])
        key = jnp.einsum("buor,rnh->bunh", latent, key_up)
        value = jnp.einsum("buor,rnh->bunh", latent[..., : m.rank], value_up)
        query, key, value = (constrain(heads, partition_specs.HEADS) for heads in (query, key, value))
        return query, key, value, latent

    def _scoring(self) -> Scoring:
        return Scoring(window=self.mixer.window, scale=self._score_scale())

    def fill(self, state: LayerCache, found: Array, lengths: Int[Array, " B"]) -> LayerCache:
        """Cache the latents of prompts."""
        return state.fill(found, None, lengths)

    def step(
        self, x: Float[Array, "B T D"], rows: Rows, state: LayerCache
    ) -> tuple[Float[Array, "B T N V"], LayerCache]:
        """Cache the latents of further tokens, then attend to the cache."""
        query, latent = self.project_cached(x, rows.positions)
        cache = state.extend(latent, None, rows.positions)
        return self.attend_cached(query, cache.key, cache.seen(rows.positions, self.mixer.window)), cache

    def project_cached(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N R"], Float[Array, "B T 1 R"]]:
        """Queries that attend to latents directly, with the up-projection of the keys absorbed, and the latents."""
        query, rotated = jnp.split(self._query(x, positions), [self.unrotated_dim], axis=-1)
        key_up = gather_for_matmul(self.kv_up, x.dtype)[..., : self.unrotated_dim]
        query = jnp.concatenate([jnp.einsum("btnh,rnh->btnr", query, key_up), rotated], axis=-1)
        return query, self._latent(x, positions)

    def attend_cached(
        self, query: Float[Array, "B T N R"], key: Float[Array, "B W 1 R"], mask: Bool[Array, "B 1 T W"]
    ) -> Float[Array, "B T N V"]:
        """Attend to cached latents; the up-projection of the values comes last."""
        heads = jax.nn.dot_product_attention(query, key, key, mask=mask, scale=self._score_scale())
        value_up = gather_for_matmul(self.kv_up, query.dtype)[..., self.unrotated_dim :]
        return jnp.einsum("btnr,rnh->btnh", heads[..., : self.mixer.rank], value_up)

    def join(self, heads: Float[Array, "B T N V"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Project the heads back to the model dimension; the layer's input is not used."""
        del x
        return project_in(heads, self.out, self.precision)

    def _query(self, x: Array, positions: Array) -> Array:
        """[B,T,D] → rotated queries [B,T,N,H]."""
        if self.mixer.query_rank:
            x, up = self.query_latent_norm(self._down(x, self.query_down)), self.query_up
        else:
            up = self.query
        # The matrix is split rather than its product, whose parts would each be copied.
        ups = jnp.split(gather_for_matmul(up, x.dtype), [self.unrotated_dim], axis=-1)
        query, rotated = (self._up(x, part) for part in (ups[0], self._in_halves(ups[1])))
        query = jnp.concatenate([query, self.rotation(rotated, positions)], axis=-1)
        if self.config.rope_scaling.query_growth:
            query = grow(query, positions, self.config.rope_scaling)
        return constrain(query, partition_specs.HEADS)

    def _down(self, x: Array, weights: nnx.Param[Array]) -> Array:
        """[B,T,D] → [B,T,rank]."""
        by = quantized.matmul_in(self.precision, jnp.matmul)
        return by(x, gather_for_matmul(weights, x.dtype))

    def _up(self, x: Array, matrix: Array) -> Array:
        """Queries or a part of them by a gathered matrix [rank,N,H]: [B,T,rank] → [B,T,N,H]."""
        precision = self.precision
        if precision == "none":
            return jnp.tensordot(x, matrix, 1)
        joined = quantized.matmul(x, matrix.reshape(matrix.shape[0], -1), precision)
        return joined.reshape(*x.shape[:-1], *matrix.shape[1:])

    def _in_halves(self, rotated: Array) -> Array:
        """Reorder dimensions to be rotated from pairs (2i, 2i + 1), if the checkpoint has these, to (i, i + H/2), which
        keeps the products of queries and keys. Matrices are reordered instead of their products, which are larger."""
        if not self.config.rope_interleaved:
            return rotated
        return jnp.concatenate([rotated[..., ::2], rotated[..., 1::2]], axis=-1)

    def _latent(self, x: Array, positions: Array) -> Array:
        """[B,T,D] → [B,T,1,rank + rope_dim]: the normalised latent and the rotated key."""
        latent = self._down(x, self.kv_down)
        compressed, key = jnp.split(latent, [self.mixer.rank], axis=-1)
        key = self.rotation(self._in_halves(key)[:, :, None], positions)
        return jnp.concatenate([self.kv_latent_norm(compressed)[:, :, None], key], axis=-1)

    def _score_scale(self) -> float:
        """Factor of query·key: 1/sqrt(H), under YaRN times its squared temperature (DeepSeek-V2, section 3.1.4)."""
        scaling, scale = self.config.rope_scaling, self.mixer.head_dim**-0.5
        if scaling.kind == "none" or not scaling.mscale_all_dim:
            return scale
        return scale * yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
