"""Grouped FFN for NVIDIA GPUs, by Pallas kernels that compute only the tiles that groups have.

XLA turns ``lax.ragged_dot`` into a dense matmul with E times the work there. Rows are multiplied by JAX's own Mosaic
kernel on Hopper, and by :mod:`moe.dispatch.backends.blackwell` on Blackwell where there are enough groups. All else is
in Pallas' Triton dialect, which compiles for Ampere, Hopper and Blackwell.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from moe.dispatch import quantized
from moe.dispatch.backends import tpu, triton
from moe.dispatch.backends.tiles import tile_rows
from moe.dispatch.ffn import ExpertWeights, ffn
from moe.parallel import target

#: Tiles of JAX's Hopper kernel: two operands of 128 x 64 bfloat16 are 32 KiB a step, four steps and the output tile fit
#: 227 KiB of shared memory.
_HOPPER_COLUMNS, _HOPPER_CONTRACTED, _HOPPER_STEPS, _HOPPER_GRID = 128, 64, 4, 8

#: Fewest groups that Blackwell's kernel is used for. In published timings of a B200 (moe/planner/grouped_matmuls.csv)
#: such a kernel is 1.1 to 19 times as fast as Triton's with 128 and 256 groups, and half as fast with 8; between
#: them, by the planner's fit, it is ahead from 16 on.
_BLACKWELL_GROUPS = 16


def grouped_ffn(
    rows: Float[Array, "R D"],
    group_sizes: Int[Array, " E"],
    weights: ExpertWeights,
    scale: Float[Array, " R"] | None = None,
) -> Float[Array, "R D"]:
    """:func:`moe.dispatch.backends.grouped_ffn` as grouped matmuls, by ``lax.ragged_dot`` where these kernels do not
    take the shapes."""

    if weights.precision != "none":
        quantized.check_target(weights.precision)

    def matmul(rows: Array, matrices: Array, *, transposed: bool = False) -> Array:
        if supports(rows, matrices):
            return grouped_matmul(rows, matrices, group_sizes, False, transposed)
        return tpu.multiply(rows, matrices, group_sizes, transposed=transposed)

    return ffn(rows, weights.joined(), matmul, scale)


def supports(rows: Float[Array, "R K"], matrices: Float[Array, "E A B"]) -> bool:
    """Whether the kernels take these shapes: an NVIDIA GPU from Ampere on, R, K and N in multiples of 16."""
    sizes = (rows.shape[0], *matrices.shape[1:])
    return target.current().compute_capability >= 8 and all(size % 16 == 0 for size in sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul(
    rows: Array, matrices: Array, sizes: Int[Array, " E"], interpret: bool = False, transposed: bool = False
) -> Array:
    """:func:`moe.dispatch.backends.tpu.grouped_matmul` by these kernels.

    Args:
        rows, matrices, sizes, transposed: as there.
        interpret: run the Triton kernels on the CPU, for tests.
    """
    return _multiply(rows, matrices, sizes, transposed=transposed, interpret=interpret)


def _grouped_matmul_fwd(rows, matrices, sizes, interpret, transposed):
    return grouped_matmul(rows, matrices, sizes, interpret, transposed), (rows, matrices, sizes)


def _grouped_matmul_bwd(interpret, transposed, residuals, gradient):
    rows, matrices, sizes = residuals
    d_rows = _multiply(gradient, matrices, sizes, transposed=not transposed, interpret=interpret)
    left, right = (gradient, rows) if transposed else (rows, gradient)
    d_matrices = triton.outer_products(left, right, sizes, interpret=interpret).astype(matrices.dtype)
    return d_rows, d_matrices, np.zeros(sizes.shape, jax.dtypes.float0)


grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)


def _multiply(rows: Array, matrices: Array, sizes: Array, *, transposed: bool, interpret: bool) -> Array:
    """Rows [R,K] of each group by its matrix, [E,K,N], or [E,N,K] if transposed → [R,N]."""
    device = target.current()
    capability = 0 if interpret else device.compute_capability
    if capability == 9 and _fits_hopper(rows, matrices, transposed=transposed):
        # Optional: not in every supported release of JAX, and it imports JAX's test utilities.
        from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu  # noqa: PLC0415

        return ragged_dot_mgpu.ragged_dot(
            rows,
            matrices,
            group_sizes=sizes,
            block_m=max(64, tile_rows(rows.shape[0], matrices.shape[0])),
            block_n=_HOPPER_COLUMNS,
            block_k=_HOPPER_CONTRACTED,
            max_concurrent_steps=_HOPPER_STEPS,
            grid_block_n=_HOPPER_GRID,
            transpose_rhs=transposed,
        )
    if capability == 10 and matrices.shape[0] >= _BLACKWELL_GROUPS:
        # Imported where it is needed: Mosaic takes a quarter of a second.
        from moe.dispatch.backends import blackwell  # noqa: PLC0415

        if device.num_cores and blackwell.supports(rows, matrices.shape[1 if transposed else 2]):
            return blackwell.multiply(rows, matrices, sizes, transposed=transposed, cores=device.num_cores)
    return triton.multiply(rows, matrices, sizes, transposed=transposed, interpret=interpret)


def _fits_hopper(rows: Array, matrices: Array, *, transposed: bool) -> bool:
    """Whether JAX's Hopper kernel takes these factors."""
    (num_rows, contracted), columns = rows.shape, matrices.shape[1 if transposed else 2]
    whole = contracted % _HOPPER_CONTRACTED == columns % _HOPPER_COLUMNS == num_rows % 64 == 0
    return whole and rows.dtype in (jnp.bfloat16, jnp.float16)
