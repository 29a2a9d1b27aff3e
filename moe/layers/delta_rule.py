"""The gated delta rule (Yang et al. 2024, arXiv 2412.06464) and the short convolution before it.

A head has a memory S [H,V], a matrix from keys to values. Each token lets it decay by exp(g), and replaces the share
beta of what it holds for the token's key by the token's value (equation 10):

    S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T        o_t = S_t^T q_t

Queries and keys have M heads; each of them serves J heads of values.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

#: Tokens whose updates are computed at once.
CHUNK = 64

#: Added to the squared length of queries and keys, as in the published code.
_LENGTH_EPS = 1e-6

#: Products of float32 numbers, which accelerators would round to fewer bits.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def short_convolution(
    x: Float[Array, "B T N H"], weight: Float[Array, "W N H"], segment_ids: Int[Array, "B T"]
) -> Float[Array, "B T N H"]:
    """Silu of a causal convolution of each channel over W tokens of its document."""
    width, length = weight.shape[0], x.shape[1]
    x32, y = x.astype(jnp.float32), jnp.zeros(x.shape, jnp.float32)
    for back in range(width):
        shifted = jnp.pad(x32, ((0, 0), (back, 0), (0, 0), (0, 0)))[:, :length]
        same = jnp.pad(segment_ids, ((0, 0), (back, 0)), constant_values=-1)[:, :length] == segment_ids
        y += jnp.where(same[..., None, None], shifted, 0) * weight[width - 1 - back].astype(jnp.float32)
    return jax.nn.silu(y).astype(x.dtype)


def _inverse(lower: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """Inverse of I + L, for L strictly lower triangular and C a power of two.

    Inverses of blocks on the diagonal are joined to those of twice the size: that of [[A,0],[B,C]] is
    [[A',0],[-C'BA',C']]. A power series of L would be shorter and cancel badly where keys repeat. The last line is a
    Newton step: it has the gradient of the inverse, so that the loop needs none, and corrects its rounding.
    """
    size, constant = lower.shape[-1], jax.lax.stop_gradient(lower)
    rows, columns = np.arange(size)[:, None], np.arange(size)
    identity = jnp.eye(size, dtype=lower.dtype)

    def below(power: Array | int) -> Array:
        """B of every block of 2^(power + 1)."""
        row, column = (jax.lax.shift_right_logical(index, power) for index in (rows, columns))
        return jnp.where((row == column + 1) & (row % 2 == 1), constant, 0)

    def join(power: Array, inverse: Array) -> Array:
        # Three bfloat16 passes are exact enough, as the Newton step squares their error: 9e-8 after it, 8e-8 with six.
        product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGH)
        return inverse - product(product(inverse, below(power)), inverse)

    # A loop of cheap products, since a product in six passes takes XLA for TPUs seconds to compile.
    inverse = jax.lax.fori_loop(1, size.bit_length() - 1, join, identity - below(0))
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return inverse + product(inverse, identity - product(identity + lower, inverse))


def _unit(x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
    """Vectors of length 1, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _LENGTH_EPS)


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

    The updates of a chunk are the solution of a triangular system, so all but the passage from chunk to chunk is
    matrix products over the whole row. The backward pass computes them again.

    Args:
        query: any length; divided by sqrt(H) here.
        key: made unit vectors here, as the queries.
        value: J heads for each head of keys.
        decay: g, at most 0.
        beta: in [0, 1].
        segment_ids: the document of each token; the memory is empty where one begins. Tokens of padding (0) leave it.
    """
    length, size = query.shape[1], min(CHUNK, 1 << (query.shape[1] - 1).bit_length())
    query, key = _unit(query) * query.shape[-1] ** -0.5, _unit(key)
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
    document = jnp.cumsum(begins, axis=-1)  # 0: that of the chunk before
    later = np.tril(np.ones((size, size), np.float32))  # row i, column j: i >= j
    # g_{j+1} + ... + g_i, each summed by itself: a difference of two sums from the start would cancel.
    between = _einsum("ik,nbmqkj->nbmqij", later, jnp.where(np.tril(later, -1) > 0, decay[..., None], 0.0))
    same = document[..., :, None] == document[..., None, :]
    decays = jnp.exp(between) * (same * later)[:, :, None, None]
    from_before = jnp.exp(_einsum("ik,nbmqk->nbmqi", later, decay)) * (document == 0)[:, :, None, None]

    products = _einsum("nbimh,nbjmh->nbmij", key, key)[:, :, :, None]
    solved = _inverse(jnp.tril(products * decays * beta[..., None], -1))
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
    """:func:`delta_rule` of one more token, to the memory of those before it."""
    query, key = _unit(query) * query.shape[-1] ** -0.5, _unit(key)
    memory = memory * jnp.exp(decay)[..., None, None]
    written = (value.astype(jnp.float32) - _einsum("bmh,bmqhv->bmqv", key, memory)) * beta[..., None]
    memory += _einsum("bmh,bmqv->bmqhv", key, written)
    return _einsum("bmh,bmqhv->bmqv", query, memory), memory
