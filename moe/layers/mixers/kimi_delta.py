"""Kimi delta attention (Kimi Linear: Kimi Team 2025, arXiv 2510.26692): a memory whose channels decay each by itself.

A head has a memory S [H,H], a matrix from keys to values. Each token lets channel h of the keys decay by exp(g_h), and
replaces the share beta of what the memory holds for the token's key by the token's value (equation 1):

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t

with g_t = -exp(a) softplus(W2 W1 x_t + b), a of each head and b of each channel, and a gate of the normalised heads,
sigmoid(W4 W3 x_t), both by matrices of rank H (section 4).
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
from moe.config.mixers import KimiDelta
from moe.layers.mixers.recurrence import Recurrent, RecurrentState, unit, unit_lower_inverse
from moe.layers.norms import RMSNorm
from moe.layers.parameter import matrix, parameter
from moe.parallel import partition_specs
from moe.parallel.mesh import ROW_AXES, constrain
from moe.parallel.parameters import gather_for_matmul, project
from moe.parallel.partition_specs import HEADS_IN, HEADS_OUT, IN, STORED

#: Tokens whose updates are computed at once.
CHUNK = 64

#: Range of the decay's steps at initialisation, from which its bias is drawn, and of exp(a) (the published code).
_FIRST_STEPS = 1e-3, 1e-1
_FIRST_SCALES = 1.0, 16.0

#: Products in full float32, which accelerators would otherwise round to fewer bits.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _sums(decay: Float[Array, "*batch C H"], *, onwards: bool = False) -> Float[Array, "*batch C H"]:
    """g_1 + ... + g_i of each row i; onwards: g_{i+1} + ... + g_C. Each is at most 0, so that its exponential is at
    most 1."""
    ones = np.ones((decay.shape[-2],) * 2, np.float32)
    return _einsum("ij,...jh->...ih", np.triu(ones, 1) if onwards else np.tril(ones), decay)


def decayed_products(
    rows: Float[Array, "*batch C H"], columns: Float[Array, "*batch C H"], decay: Float[Array, "*batch C H"]
) -> Float[Array, "*batch C C"]:
    """Sum over h of rows_ih columns_jh exp(g_{j+1,h} + ... + g_ih) for i > j, else 0; C is a power of two.

    A block of rows from the middle on, and columns before it, is one product, as each factor decays from or to the
    middle: no exponent is positive, as in a product of exp(sum up to i) and exp(-sum up to j), and none needs [C,C,H].
    """
    *batch, size, dim = rows.shape
    products = jnp.zeros((*batch, size, 1, 1), rows.dtype)
    half = 1
    while half < size:

        def halves(x: Array, half: int = half) -> tuple[Array, Array]:
            x = x.reshape(*batch, size // (2 * half), 2, half, dim)
            return x[..., 0, :, :], x[..., 1, :, :]

        before, after = halves(decay)
        from_middle, to_middle = jnp.exp(_sums(after)), jnp.exp(_sums(before, onwards=True))
        block = _einsum("...ih,...jh->...ij", halves(rows)[1] * from_middle, halves(columns)[0] * to_middle)
        products = products.reshape(*block.shape[:-2], 2, half, half)
        upper = jnp.concatenate([products[..., 0, :, :], jnp.zeros_like(block)], axis=-1)
        lower = jnp.concatenate([block, products[..., 1, :, :]], axis=-1)
        products = jnp.concatenate([upper, lower], axis=-2)
        half *= 2
    return products.reshape(*batch, size, size)


@jax.checkpoint
def kimi_delta_rule(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N V"],
    decay: Float[Array, "B T N H"],
    beta: Float[Array, "B T N"],
    segment_ids: Int[Array, "B T"],
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
    """Outputs of all tokens and the memory after the last, in float32, by chunks (section 3.1 of the paper).

    As in :func:`moe.layers.mixers.delta_net.delta_rule`, the updates of a chunk are the solution of a triangular
    system. The backward pass recomputes them.

    Args:
        query: normalised to unit length and divided by sqrt(H) here.
        key: normalised to unit length here.
        value: of each head.
        decay: g, at most 0.
        beta: in [0, 1].
        segment_ids: the document of each token; the memory is reset where one begins. Padding (0) leaves it unchanged.
    """
    length, size = query.shape[1], min(CHUNK, 1 << (query.shape[1] - 1).bit_length())
    query, key = unit(query) * query.shape[-1] ** -0.5, unit(key)
    real = segment_ids > 0
    decay, beta = jnp.where(real[..., None, None], decay, 0.0), jnp.where(real[..., None], beta, 0.0)
    begins = jnp.pad((segment_ids[:, 1:] != segment_ids[:, :-1]) & real[:, 1:], ((0, 0), (1, 0)))

    def split(x: Array) -> Array:
        """[B,T,...] → [T/C,B,C,...], the row padded with zeros."""
        x = jnp.pad(x, ((0, 0), (0, -length % size), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    def split_heads(x: Array) -> Array:
        """[B,T,N,...] → [T/C,B,N,C,...]."""
        return split(x).swapaxes(2, 3)

    query, key, value, decay, beta = map(split_heads, (query, key, value.astype(jnp.float32), decay, beta))
    document = jnp.cumsum(split(begins.astype(jnp.int32)), axis=-1)  # 0: continues the chunk before
    same = (document[..., :, None] == document[..., None, :])[:, :, None]  # [T/C,B,1,C,C]
    from_before = jnp.exp(_sums(decay)) * (document == 0)[:, :, None, :, None]
    to_end = jnp.exp(_sums(decay, onwards=True)) * same[..., -1, :, None]

    solved = unit_lower_inverse(jnp.where(same, decayed_products(key, key, decay), 0.0) * beta[..., None])
    of_values = _einsum("...ij,...jv->...iv", solved, value * beta[..., None])
    of_memory = _einsum("...ij,...jh->...ih", solved, key * from_before * beta[..., None])
    own = jnp.sum(query * key, axis=-1, keepdims=True) * jnp.eye(size)
    scores = jnp.where(same, decayed_products(query, key, decay), 0.0) + own

    def chunk(memory: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        query, key, scores, of_values, of_memory, kept = inputs
        written = of_values - _einsum("bnih,bnhv->bniv", of_memory, memory)
        y = _einsum("bnih,bnhv->bniv", query, memory) + _einsum("bnij,bnjv->bniv", scores, written)
        return memory * kept[..., None] + _einsum("bnjh,bnjv->bnhv", key, written), y

    first = jnp.zeros((*key.shape[1:3], key.shape[-1], value.shape[-1]), jnp.float32)
    inputs = query * from_before, key * to_end, scores, of_values, of_memory, from_before[..., -1, :]
    memory, y = jax.lax.scan(chunk, first, inputs)
    y = jnp.moveaxis(y, (0, 3), (1, 2))  # [T/C,B,N,C,V] → [B,T/C,C,N,V]
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :length], memory


def kimi_delta_step(
    query: Float[Array, "B N H"],
    key: Float[Array, "B N H"],
    value: Float[Array, "B N V"],
    decay: Float[Array, "B N H"],
    beta: Float[Array, "B N"],
    memory: Float[Array, "B N H V"],
) -> tuple[Float[Array, "B N V"], Float[Array, "B N H V"]]:
    """:func:`kimi_delta_rule` for one more token, given the memory of those before it."""
    query, key = unit(query) * query.shape[-1] ** -0.5, unit(key)
    memory = memory * jnp.exp(decay)[..., None]
    written = (value.astype(jnp.float32) - _einsum("bnh,bnhv->bnv", key, memory)) * beta[..., None]
    memory += _einsum("bnh,bnv->bnhv", key, written)
    return _einsum("bnh,bnhv->bnv", query, memory), memory


class KimiDeltaAttention(Recurrent):
    """Short convolutions of queries, keys and values, the delta rule with a decay of each channel, and a norm of its
    outputs that is gated by a sigmoid."""

    def __init__(self, config: ModelConfig, mixer: KimiDelta, *, rngs: nnx.Rngs):
        super().__init__(config, mixer, rngs=rngs)
        d, scale, heads = config.d_model, config.init_scale, (mixer.heads, mixer.dim)

        def project(shape: tuple[int, ...], spec: P) -> nnx.Param[Array]:
            return matrix(rngs, shape, spec, fan_in=shape[0], scale=scale)

        def channels() -> nnx.Param[Array]:
            draw = jax.random.uniform(rngs.params(), (mixer.conv_width, *heads), jnp.float32, -1, 1)
            return parameter(draw * mixer.conv_width**-0.5, P(None, "tensor", None))

        def low_rank() -> tuple[nnx.Param[Array], nnx.Param[Array]]:
            return project((d, mixer.dim), P(STORED, None)), project((mixer.dim, *heads), P(None, "tensor", None))

        self.query, self.query_conv = project((d, *heads), HEADS_IN), channels()
        self.key, self.key_conv = project((d, *heads), HEADS_IN), channels()
        self.value, self.value_conv = project((d, *heads), HEADS_IN), channels()
        self.beta = project((d, mixer.heads), IN)
        self.decay_down, self.decay_up = low_rank()
        low, high = map(float, np.log(_FIRST_STEPS))
        steps = jnp.exp(jax.random.uniform(rngs.params(), heads, jnp.float32, low, high))
        bias = steps + jnp.log(-jnp.expm1(-steps))  # softplus(bias) = steps
        self.decay_bias = parameter(bias, P("tensor", None))
        scales = jax.random.uniform(rngs.params(), heads[:1], jnp.float32, *_FIRST_SCALES)
        self.log_decay_scale = parameter(jnp.log(scales), P("tensor"))
        self.gate_down, self.gate_up = low_rank()
        self.norm = RMSNorm(mixer.dim, config.norm_eps)
        fan_in = mixer.heads * mixer.dim
        self.out = matrix(rngs, (*heads, d), HEADS_OUT, fan_in=fan_in, scale=scale, inputs=2)

    @classmethod
    def empty_state(
        cls, config: ModelConfig, mixer: KimiDelta, leading: tuple[int, int], length: int, *, ahead: int = 0
    ) -> RecurrentState:
        """A state of fixed size, whatever the length."""
        del length, ahead
        shape = (*leading, mixer.conv_width - 1, mixer.heads, mixer.dim)
        inputs = constrain(jnp.zeros(shape, config.dtype), partition_specs.CACHE)
        memory = jnp.zeros((*leading, mixer.heads, mixer.dim, mixer.dim), jnp.float32)
        return RecurrentState((inputs,) * 3, constrain(memory, P(None, ROW_AXES, "tensor")))

    def rates(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """Logarithm of each channel's decay, and share that is replaced."""
        beta = (x @ gather_for_matmul(self.beta, x.dtype)).astype(jnp.float32)
        step = self._low_rank(x, self.decay_down, self.decay_up).astype(jnp.float32) + self.decay_bias[...]
        return -jnp.exp(self.log_decay_scale[...])[:, None] * jax.nn.softplus(step), jax.nn.sigmoid(beta)

    def rule(
        self, query: Array, key: Array, value: Array, decay: Array, beta: Array, segment_ids: Array
    ) -> tuple[Float[Array, "B T N V"], Array]:
        """:func:`kimi_delta_rule`."""
        return kimi_delta_rule(query, key, value, decay, beta, segment_ids)

    def rule_step(
        self, query: Array, key: Array, value: Array, decay: Array, beta: Array, memory: Array
    ) -> tuple[Float[Array, "B N V"], Array]:
        """:func:`kimi_delta_step`."""
        return kimi_delta_step(query, key, value, decay, beta, memory)

    def join(self, heads: Float[Array, "B T N V"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Output projection of all heads, normalised and gated by the layer's input (equation 10)."""
        gate = self._low_rank(x, self.gate_down, self.gate_up)
        heads = (self.norm(heads) * jax.nn.sigmoid(gate.astype(jnp.float32))).astype(x.dtype)
        return project(heads, self.out)

    def _low_rank(
        self, x: Float[Array, "B T D"], down: nnx.Param[Array], up: nnx.Param[Array]
    ) -> Float[Array, "B T N H"]:
        """x W1 W2."""
        return constrain(project(x @ gather_for_matmul(down, x.dtype), up), partition_specs.HEADS)
