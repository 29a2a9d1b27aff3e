"""Layers with a memory that each token changes: short convolutions before it, and generation by its state.

:mod:`moe.layers.mixers.delta_net` and :mod:`moe.layers.mixers.kimi_delta` have their rules.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moe.layers.inputs import KEEP_ALL, Dropout, Rows
from moe.layers.mixers.interface import MixerLayer
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.parallel.parameters import project
from moe.parallel.partition_specs import ATTENTION

#: Added to the squared length of queries and keys, as in the published code.
_LENGTH_EPS = 1e-6


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


def unit_lower_inverse(lower: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """Inverse of I + L, for L strictly lower triangular and C a power of two.

    Inverses of diagonal blocks are joined into those of blocks of twice the size: that of [[A,0],[B,C]] is
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


def unit(x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
    """Vectors of length 1, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _LENGTH_EPS)


def last_inputs(raw: tuple[Array, ...], segment_ids: Int[Array, "B T"], count: int) -> tuple[Array, ...]:
    """The last tokens of each row's last document, zeros before its first."""
    columns = np.arange(segment_ids.shape[1])
    last = jnp.max(jnp.where(segment_ids > 0, columns, 0), axis=1, keepdims=True)
    at = last - np.arange(count - 1, -1, -1)  # [B,count]
    index = jnp.maximum(at, 0)
    documents = (jnp.take_along_axis(segment_ids, where, axis=1) for where in (index, last))
    kept = (at >= 0) & (next(documents) == next(documents))

    def take(heads: Array) -> Array:
        return jnp.where(kept[..., None, None], jnp.take_along_axis(heads, index[..., None, None], axis=1), 0)

    return tuple(map(take, raw))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentState:
    """State of one layer after a token.

    Attributes:
        inputs: queries, keys and values of the last W-1 tokens before the convolution, [B,W-1,heads,dim] each.
        memory: float32, an axis of keys and one of values at its end, [B,heads,...,H,V].
    """

    inputs: tuple[Array, ...]
    memory: Array


class Recurrent(MixerLayer):
    """Base of layers whose queries, keys and values pass short convolutions into a memory.

    A subclass has parameters query, key, value [D,heads,dim] and their kernels query_conv, key_conv, value_conv
    [W,heads,dim], and a rule: for whole rows, and for one more token.
    """

    query: nnx.Param[Array]
    key: nnx.Param[Array]
    value: nnx.Param[Array]
    query_conv: nnx.Param[Array]
    key_conv: nnx.Param[Array]
    value_conv: nnx.Param[Array]

    def rates(self, x: Float[Array, "B T D"]) -> tuple[Array, Array]:
        """Logarithm of the decay, and share that is replaced, [B,T,...] float32."""
        raise NotImplementedError

    def rule(
        self, query: Array, key: Array, value: Array, decay: Array, beta: Array, segment_ids: Array
    ) -> tuple[Float[Array, "B T N V"], Array]:
        """Heads of whole rows, and the memory after each."""
        raise NotImplementedError

    def rule_step(
        self, query: Array, key: Array, value: Array, decay: Array, beta: Array, memory: Array
    ) -> tuple[Float[Array, "B N V"], Array]:
        """Heads of one more token, and the memory after it."""
        raise NotImplementedError

    def prefill(
        self, x: Float[Array, "B T D"], rows: Rows, drop: Dropout = KEEP_ALL
    ) -> tuple[Float[Array, "B T N V"], RecurrentState]:
        """Run whole rows, each document separately; ``drop`` is not used, as there are no attention weights.

        Returns:
            The heads, and the state after the last token of each row that is not padding.
        """
        del drop
        rows.require_plain()
        segment_ids = rows.segment_ids
        raw = self._inputs(x)
        query, key, value = (
            checkpoint_name(short_convolution(heads, weight, segment_ids), ATTENTION)
            for heads, weight in zip(raw, self._kernels(), strict=True)
        )
        decay, beta = self.rates(x)
        y, memory = self.rule(query, key, value, decay, beta, segment_ids)
        heads = checkpoint_name(y.astype(x.dtype), ATTENTION)
        return heads, RecurrentState(last_inputs(raw, segment_ids, len(self.query_conv) - 1), memory)

    def step(
        self, x: Float[Array, "B 1 D"], rows: Rows, state: RecurrentState
    ) -> tuple[Float[Array, "B 1 N V"], RecurrentState]:
        """Run one more token of each row."""
        del rows
        raw = self._inputs(x)
        pairs = zip(state.inputs, raw, strict=True)
        inputs = [jnp.concatenate([old, new.astype(old.dtype)], axis=1) for old, new in pairs]
        ones = jnp.ones(inputs[0].shape[:2], jnp.int32)
        query, key, value = (
            short_convolution(heads, weight, ones)[:, -1] for heads, weight in zip(inputs, self._kernels(), strict=True)
        )
        decay, beta = (rate[:, 0] for rate in self.rates(x))
        y, memory = self.rule_step(query, key, value, decay, beta, state.memory)
        last = tuple(heads[:, 1:] for heads in inputs)
        return y.astype(x.dtype)[:, None], RecurrentState(last, memory)

    def _inputs(self, x: Array) -> tuple[Array, ...]:
        """Queries, keys and values before their convolutions."""
        weights = self.query, self.key, self.value
        return tuple(constrain(project(x, weight), partition_specs.HEADS) for weight in weights)

    def _kernels(self) -> tuple[Array, Array, Array]:
        return self.query_conv[...], self.key_conv[...], self.value_conv[...]
