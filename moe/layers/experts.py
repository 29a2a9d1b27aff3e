"""Stacked expert FFNs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from moe.config import ModelConfig
from moe.dispatch.grouped_matmul.grouped_ffn import grouped_ffn
from moe.dispatch.grouped_matmul.row_blocks import RowBlocks
from moe.layers.dropout import Dropout
from moe.layers.ffn import GATED_ACTIVATIONS, activate
from moe.parallel.remat import HIDDEN
from moe.parallel.weights import gather_for_matmul, matrix, zeros

Drop = Callable[[Array], Array]


class Experts(nnx.Module):
    """E FFNs of one shape, as three stacked matrices."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        e, d, f = config.moe.num_experts, config.d_model, config.moe.d_ff
        self.activation = config.activation
        self.up = matrix(rngs, (e, d, f), d, config.init_scale)
        self.down = matrix(rngs, (e, f, d), f, config.init_scale)
        gated, biased = self.activation in GATED_ACTIVATIONS, config.moe.bias == "all"
        self.gate = matrix(rngs, (e, d, f), d, config.init_scale) if gated else None
        self.up_bias = zeros((e, f)) if biased else None
        self.gate_bias = zeros((e, f)) if biased and gated else None
        self.down_bias = zeros((e, d)) if biased else None  # the layer adds it: what a device computes is a partial sum

    def matrices(
        self, dtype: Any, *, stored: bool = False
    ) -> tuple[tuple[tuple[Array, ...], tuple[Array, ...]], Array]:
        """(((up, and gate if any) [E,D,F], their biases if any [E,1,F]), down [E,F,D]) in that dtype: ready for
        matmuls, or split as stored."""
        ready = (lambda _, parameter, dtype: parameter.astype(dtype)) if stored else gather_for_matmul
        into = (ready("experts.up", self.up[...], dtype),)
        if self.gate is not None:
            into += (ready("experts.gate", self.gate[...], dtype),)
        biases = (bias for bias in (self.up_bias, self.gate_bias) if bias is not None)
        into = into, tuple(bias[...].astype(dtype)[:, None] for bias in biases)
        return into, ready("experts.down", self.down[...], dtype)

    def batched(self, rows: Array, drop: Drop | None = None) -> Array:
        """[E,R,D] → [E,R,D]: expert e over its R rows.

        Args:
            rows: [E,R,D].
            drop: applied to the hidden activations.
        """
        into, out_of = self.matrices(rows.dtype)
        return _batched_matmul(_hidden(self.activation, drop, _first(rows, into, _batched_matmul)), out_of)

    def grouped(
        self,
        matrices: Any,
        rows: Float[Array, "R D"],
        sizes: Int[Array, " E"],
        row_blocks: RowBlocks,
        drop: Drop | None = None,
    ) -> Float[Array, "R D"]:
        """Applies expert 0 to the first sizes[0] rows, expert 1 to the next sizes[1], and so on.

        Args:
            matrices: from :meth:`matrices`, of all or one device's experts.
            rows: sorted by expert.
            sizes: rows of each expert, padded for ``row_blocks``.
            row_blocks: static.
            drop: applied to the hidden activations.
        """
        into, out_of = matrices
        starts = jnp.cumsum(sizes) - sizes
        if drop is None:
            second = functools.partial(_second, self.activation)
            return grouped_ffn(_first, second, rows, into, out_of, starts, sizes, row_blocks)
        hidden = _hidden(self.activation, drop, grouped_ffn(_first, None, rows, into, (), starts, sizes, row_blocks))
        (rows,) = grouped_ffn(_first, None, hidden, ((out_of,), ()), (), starts, sizes, row_blocks)
        return rows


def _first(
    rows: Array, into: tuple[tuple[Array, ...], tuple[Array, ...]], matmul: Callable[[Array, Array], Array]
) -> tuple[Array, ...]:
    matrices, biases = into
    hidden = tuple(checkpoint_name(matmul(rows, matrix), HIDDEN) for matrix in matrices)
    # A bias is a matrix whose input is 1, so that each row gets its own expert's in every form of dispatch.
    ones = jnp.ones_like(rows[..., :1])
    return tuple(x + matmul(ones, bias) for x, bias in zip(hidden, biases, strict=True)) if biases else hidden


def _hidden(activation: str, drop: Drop | None, inputs: tuple[Array, ...]) -> Array:
    hidden = activate(activation, inputs[0], inputs[1] if len(inputs) > 1 else None)
    return hidden if drop is None else drop(hidden)


def _second(
    activation: str, inputs: tuple[Array, ...], out_of: Array, matmul: Callable[[Array, Array], Array]
) -> Array:
    return matmul(_hidden(activation, None, inputs), out_of)


def _batched_matmul(rows: Array, matrices: Array) -> Array:
    return jnp.einsum("eri,eij->erj", rows, matrices)


@dataclasses.dataclass(frozen=True)
class ExpertDropout:
    """Experts whose hidden activations are dropped at a rate (Switch 2021, section 4.2, "expert dropout")."""

    experts: Experts
    rate: float
    rng: Array

    def matrices(self, dtype: Any, *, stored: bool = False) -> Any:
        """Return :meth:`Experts.matrices`."""
        return self.experts.matrices(dtype, stored=stored)

    def batched(self, rows: Array) -> Array:
        """Apply :meth:`Experts.batched` with dropout."""
        return self.experts.batched(rows, self._drop)

    def grouped(self, matrices: Any, rows: Array, sizes: Array, row_blocks: RowBlocks) -> Array:
        """Apply :meth:`Experts.grouped` with dropout."""
        return self.experts.grouped(matrices, rows, sizes, row_blocks, self._drop)

    def _drop(self, hidden: Array) -> Array:
        # Under shard_map each device has rows of its own: it draws its own.
        manual = tuple(jax.sharding.get_abstract_mesh().manual_axes)
        rng = jax.random.fold_in(self.rng, jax.lax.axis_index(manual)) if manual else self.rng
        return Dropout(self.rate, rng)(hidden)
