"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): a memory of fixed size in place of attention to all tokens.

A head has a memory S [H,V], a matrix from keys to values. Each token lets it decay by exp(g), and replaces the share
beta of what it holds for the token's key by the token's value (the gated delta rule, equation 10):

    S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T        o_t = S_t^T q_t

N heads of values share M heads of queries and keys, J = N / M each.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe.config import ModelConfig
from moe.config.mixers import GatedDelta
from moe.layers.mixers.recurrence import Recurrent, RecurrentState, unit, unit_lower_inverse
from moe.layers.norms import RMSNorm
from moe.layers.parameter import matrix, parameter
from moe.parallel import partition_specs
from moe.parallel.mesh import ROW_AXES, constrain
from moe.parallel.parameters import gather_for_matmul, project
from moe.parallel.partition_specs import HEADS_IN, HEADS_OUT, IN

#: Tokens whose updates are computed at once.
CHUNK = 64

#: Products in full float32, which accelerators would otherwise round to fewer bits.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@jax.checkpoint
def delta_rule(
    query: Float[Array, "B T M H"],
    key: Float[Array, "B T M H"],
    value: Float[Array, "B T M J V"],
    decay: Float[Array, "B T M J"],
    beta: Float[Array, "B T M J"],
    segment_ids: Int[Array, "B T"],
) -> tuple[Float[Array, "B T M J V"], Float[Array, "B M J H V"]]:
    """Outputs of all tokens and the memory after the last, in float32, by chunks (section 3.3 of the paper).

    The updates of a chunk are the solution of a triangular system, so all but the recurrence from chunk to chunk is
    matrix products over the whole row. The backward pass recomputes them.

    Args:
        query: normalised to unit length and divided by sqrt(H) here.
        key: normalised to unit length here.
        value: J heads for each head of keys.
        decay: g, at most 0.
        beta: in [0, 1].
        segment_ids: the document of each token; the memory is reset where one begins. Padding (0) leaves it unchanged.
    """
    length, size = query.shape[1], min(CHUNK, 1 << (query.shape[1] - 1).bit_length())
    query, key = unit(query) * query.shape[-1] ** -0.5, unit(key)
    real = (segment_ids > 0)[..., None, None]
    decay, beta = jnp.where(real, decay, 0.0), jnp.where(real, beta, 0.0)
    begins = (segment_ids[:, 1:] != segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    begins = jnp.pad(begins, ((0, 0), (1, 0))).astype(jnp.int32)

    def split(x: Array) -> Array:
        """[B,T,...] → [T/C,B,C,...], the row padded with zeros."""
        x = jnp.pad(x, ((0, 0), (0, -length % size), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    query, key, value, begins = (split(x) for x in (query, key, value.astype(jnp.float32), begins))
    decay, beta = (jnp.moveaxis(split(x), 2, -1) for x in (decay, beta))  # [T/C,B,M,J,C]
    document = jnp.cumsum(begins, axis=-1)  # 0: continues the chunk before
    later = np.tril(np.ones((size, size), np.float32))  # row i, column j: i >= j
    # g_{j+1} + ... + g_i, each summed by itself: a difference of cumulative sums would lose digits.
    between = _einsum("ik,nbmqkj->nbmqij", later, jnp.where(np.tril(later, -1) > 0, decay[..., None], 0.0))
    same = document[..., :, None] == document[..., None, :]
    decays = jnp.exp(between) * (same * later)[:, :, None, None]
    from_before = jnp.exp(_einsum("ik,nbmqk->nbmqi", later, decay)) * (document == 0)[:, :, None, None]

    products = _einsum("nbimh,nbjmh->nbmij", key, key)[:, :, :, None]
    solved = unit_lower_inverse(jnp.tril(products * decays * beta[..., None], -1))
    of_values = _einsum("nbmqij,nbjmqv->nbmqiv", solved * beta[..., None, :], value)
    of_memory = _einsum("nbmqij,nbjmh->nbmqih", solved * (beta * from_before)[..., None, :], key)
    scores = _einsum("nbimh,nbjmh->nbmij", query, key)[:, :, :, None] * decays

    def chunk(memory: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        query, key, scores, of_values, of_memory, from_before, to_end = inputs
        written = of_values - _einsum("bmqih,bmqhv->bmqiv", of_memory, memory)
        y = _einsum("bimh,bmqhv->bmqiv", query, memory) * from_before[..., None]
        y += _einsum("bmqij,bmqjv->bmqiv", scores, written)
        memory *= from_before[..., -1, None, None]
        return memory + _einsum("bjmh,bmqjv->bmqhv", key, written * to_end[..., None]), y

    first = jnp.zeros((*value.shape[1:2], *value.shape[3:5], key.shape[-1], value.shape[-1]), jnp.float32)
    inputs = query, key, scores, of_values, of_memory, from_before, decays[..., -1, :]
    memory, y = jax.lax.scan(chunk, first, inputs)
    # [T/C,B,M,J,C,V] → [B,T/C,C,M,J,V] → [B,T,M,J,V]
    y = jnp.moveaxis(y, (0, 4), (1, 2))
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :length], memory


def delta_step(
    query: Float[Array, "B M H"],
    key: Float[Array, "B M H"],
    value: Float[Array, "B M J V"],
    decay: Float[Array, "B M J"],
    beta: Float[Array, "B M J"],
    memory: Float[Array, "B M J H V"],
) -> tuple[Float[Array, "B M J V"], Float[Array, "B M J H V"]]:
    """:func:`delta_rule` for one more token, given the memory of those before it."""
    query, key = unit(query) * query.shape[-1] ** -0.5, unit(key)
    memory = memory * jnp.exp(decay)[..., None, None]
    written = (value.astype(jnp.float32) - _einsum("bmh,bmqhv->bmqv", key, memory)) * beta[..., None]
    memory += _einsum("bmh,bmqv->bmqhv", key, written)
    return _einsum("bmh,bmqhv->bmqv", query, memory), memory


#: Range of the decay's steps at initialisation, from which its bias is drawn (as in Mamba 2 and the paper's code).
_FIRST_STEPS = 1e-3, 1e-1


class GatedDeltaNet(Recurrent):
    """Short convolutions of queries, keys and values, the gated delta rule, and a gated norm of its outputs."""

    def __init__(self, config: ModelConfig, mixer: GatedDelta, *, rngs: nnx.Rngs):
        super().__init__(config, mixer, rngs=rngs)
        c, d = config, mixer
        keys, values = (d.key_heads, d.key_dim), (d.value_heads, d.value_dim)

        def project(shape: tuple[int, ...], spec: P) -> nnx.Param[Array]:
            return matrix(rngs, (c.d_model, *shape), spec, fan_in=c.d_model, scale=c.init_scale)

        def channels(shape: tuple[int, int]) -> nnx.Param[Array]:
            draw = jax.random.uniform(rngs.params(), (d.conv_width, *shape), jnp.float32, -1, 1)
            return parameter(draw * d.conv_width**-0.5, P(None, "tensor", None))

        self.query, self.query_conv = project(keys, HEADS_IN), channels(keys)
        self.key, self.key_conv = project(keys, HEADS_IN), channels(keys)
        self.value, self.value_conv = project(values, HEADS_IN), channels(values)
        self.gate = project(values, HEADS_IN)
        self.beta = project((d.value_heads,), IN)
        self.decay = project((d.value_heads,), IN)
        low, high = map(float, np.log(_FIRST_STEPS))
        steps = jnp.exp(jax.random.uniform(rngs.params(), (d.value_heads,), jnp.float32, low, high))
        self.decay_bias = parameter(steps + jnp.log(-jnp.expm1(-steps)), P("tensor"))  # softplus(decay_bias) = steps
        scales = jax.random.uniform(rngs.params(), (d.value_heads,), jnp.float32, 0.01, 16.0)
        self.log_decay_scale = parameter(jnp.log(scales), P("tensor"))
        self.norm = RMSNorm(d.value_dim, c.norm_eps)
        fan_in = d.value_heads * d.value_dim
        self.out = matrix(rngs, (*values, c.d_model), HEADS_OUT, fan_in=fan_in, scale=c.init_scale, inputs=2)

    @classmethod
    def empty_state(
        cls, config: ModelConfig, mixer: GatedDelta, leading: tuple[int, int], length: int, *, ahead: int = 0
    ) -> RecurrentState:
        """A state of fixed size, whatever the length."""
        del length, ahead
        m, dtype = mixer, jnp.dtype(config.dtype)
        keys, values = (m.key_heads, m.key_dim), (m.value_heads, m.value_dim)

        def zeros(heads: tuple[int, int]) -> Array:
            return constrain(jnp.zeros((*leading, m.conv_width - 1, *heads), dtype), partition_specs.CACHE)

        shape = (*leading, m.key_heads, m.value_heads // m.key_heads, m.key_dim, m.value_dim)
        memory = constrain(jnp.zeros(shape, jnp.float32), P(None, ROW_AXES, "tensor"))
        return RecurrentState((zeros(keys), zeros(keys), zeros(values)), memory)

    def rule(
        self, query: Array, key: Array, value: Array, decay: Array, beta: Array, segment_ids: Array
    ) -> tuple[Float[Array, "B T N V"], Array]:
        """:func:`delta_rule` with the values of each head of keys together."""
        y, memory = delta_rule(query, key, self._grouped(value), decay, beta, segment_ids)
        return self._joined(y), memory

    def rule_step(
        self, query: Array, key: Array, value: Array, decay: Array, beta: Array, memory: Array
    ) -> tuple[Float[Array, "B N V"], Array]:
        """:func:`delta_step` with the values of each head of keys together."""
        y, memory = delta_step(query, key, self._grouped(value), decay, beta, memory)
        return self._joined(y), memory

    def join(self, heads: Float[Array, "B T N V"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Output projection of all heads, normalised and gated by the layer's input."""
        gate = project(x, self.gate)
        heads = (self.norm(heads) * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)
        return project(heads, self.out)

    def rates(self, x: Array) -> tuple[Array, Array]:
        """Logarithm of the decay, and share that is replaced, [B,T,M,J] float32."""
        decay, beta = ((x @ gather_for_matmul(w, x.dtype)).astype(jnp.float32) for w in (self.decay, self.beta))
        scale, bias = (w[...].astype(jnp.float32) for w in (self.log_decay_scale, self.decay_bias))
        decay = -jnp.exp(scale) * jax.nn.softplus(decay + bias)
        shape = (*x.shape[:2], self.mixer.key_heads, -1)
        return decay.reshape(shape), jax.nn.sigmoid(beta).reshape(shape)

    def _grouped(self, value: Array) -> Array:
        """[...,N,V] → [...,M,J,V]."""
        heads = self.mixer.key_heads
        return value.reshape(*value.shape[:-2], heads, -1, value.shape[-1])

    def _joined(self, y: Array) -> Array:
        """[...,M,J,V] → [...,N,V]."""
        return y.reshape(*y.shape[:-3], -1, y.shape[-1])
