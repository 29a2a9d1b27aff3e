"""The product of activations and a weight matrix, with a gradient that XLA's CPU computes fast."""

from __future__ import annotations

import jax
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Float

from moe.parallel import target


def matmul(x: Float[Array, "*batch D"], matrix: Float[Array, "D F"]) -> Float[Array, "*batch F"]:
    """``x @ matrix``; both have one dtype."""
    return _cpu_matmul(x, matrix) if target.is_cpu() else x @ matrix


@jax.custom_vjp
def _cpu_matmul(x: Array, matrix: Array) -> Array:
    return x @ matrix


def _gradients(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """Gradients of x and of the matrix.

    XLA's CPU folds a transposition into the matmul, whose kernel for a transposed left operand takes a tenth longer; in
    bfloat16 it has none and uses float32 at half the speed. A requested layout is not folded: [...,D] → [D,...] is
    written out. Without the barrier the computation of x is fused into that and runs column by column.
    """
    x, matrix = residuals
    rows = x.ndim - 1
    left = lax.optimization_barrier(x).transpose(rows, *range(rows))
    left = with_layout_constraint(left, Layout(major_to_minor=tuple(range(x.ndim))))
    d_x = lax.dot_general(gradient, matrix, (((rows,), (1,)), ((), ())))
    return d_x, lax.dot_general(left, gradient, ((tuple(range(1, x.ndim)), tuple(range(rows))), ((), ())))


_cpu_matmul.defvjp(lambda x, matrix: (x @ matrix, (x, matrix)), _gradients)
