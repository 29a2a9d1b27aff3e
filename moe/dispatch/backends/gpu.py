"""Grouped FFN for NVIDIA GPUs, where XLA turns ``lax.ragged_dot`` into a dense matmul with E times the work.

Large groups are multiplied by plain matmuls, in row blocks. For others Pallas kernels compute only the tiles that
groups have: rows by JAX's own Mosaic kernel on Hopper, and by :mod:`moe.dispatch.backends.blackwell` on Blackwell where
there are enough groups; all else in Pallas' Triton dialect, which compiles for Ampere, Hopper and Blackwell. Float8
factors are multiplied by :mod:`moe.dispatch.backends.hopper` and Blackwell's kernel, whatever the groups.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from moe.config import ConfigError
from moe.dispatch import quantized
from moe.dispatch.backends import row_blocks, tpu, triton
from moe.dispatch.backends.packed import PackedWeights, pack, pack_shards
from moe.dispatch.backends.row_blocks import RowBlocks
from moe.dispatch.backends.tiles import tile_rows
from moe.dispatch.backends.tpu_tiles import TILE
from moe.dispatch.ffn import ExpertWeights, ffn
from moe.parallel import target

__all__ = ["SCALES_HIDDEN", "SORTS_WITH_CAPACITY", "TILE", "grouped_ffn", "pack", "pack_shards"]

#: As of :mod:`moe.dispatch.backends.cpu`.
SORTS_WITH_CAPACITY = False
SCALES_HIDDEN = True

#: Tiles of JAX's Hopper kernel: two operands of 128 x 64 bfloat16 are 32 KiB a step, four steps and the output tile fit
#: 227 KiB of shared memory.
_HOPPER_COLUMNS = 128
_HOPPER_CONTRACTED = 64
_HOPPER_STEPS = 4
_HOPPER_GRID = 8

#: Fewest groups that Blackwell's kernel is used for. In published timings of a B200 (moe/planner/grouped_matmuls.csv)
#: such a kernel is 1.1 to 19 times as fast as Triton's with 128 and 256 groups, and half as fast with 8; between
#: them, by the planner's fit, it is ahead from 16 on.
_BLACKWELL_GROUPS = 16

#: Both float8 kernels require matrix sides that are multiples of this, in the forward and the backward pass.
_FLOAT8_TILE = 128

#: Sizes of row blocks, in shares of a group's part of the buffer: four of the largest hold a mean load.
_BLOCKS = 1 / 40, 1 / 20, 1 / 10, 3 / 20, 1 / 5

#: Fewest FLOPs of an FFN's rows in a largest block. Each trip of a loop costs some 30 µs of launches and of waiting for
#: the host: a tenth of such a block's time on an H100.
_BLOCK_FLOPS = 2e11

#: Fewest rows of a largest block. Each adds float32 gradients of its expert's matrices to those of the blocks before
#: it, 10 bytes a number: a tenth of the block's time on an H100.
_BLOCK_ROWS = 4096


def grouped_ffn(
    rows: Float[Array, "R D"],
    group_sizes: Int[Array, " E"],
    weights: PackedWeights,
    scale: Float[Array, " R"] | None = None,
) -> Float[Array, "R D"]:
    """:func:`moe.dispatch.backends.grouped_ffn`, large groups by plain matmuls in row blocks, all others by
    kernels."""
    if weights.precision == "none" and (blocks := large_blocks(rows.shape[0], weights)):
        return row_blocks.grouped_ffn(blocks, rows, group_sizes, weights, scale)
    return by_kernels(rows, group_sizes, weights, scale)


def by_kernels(
    rows: Float[Array, "R D"],
    group_sizes: Int[Array, " E"],
    weights: PackedWeights,
    scale: Float[Array, " R"] | None = None,
) -> Float[Array, "R D"]:
    """:func:`grouped_ffn` as grouped matmuls, by ``lax.ragged_dot`` where these kernels do not take the shapes."""

    def matmul(rows: Array, matrices: Array, *, transposed: bool = False) -> Array:
        precision = weights.precision if weights.quantizes(matrices) else "none"
        if precision != "none" or supports(rows, matrices):
            return grouped_matmul(rows, matrices, group_sizes, False, transposed, precision)
        return tpu.multiply(rows, matrices, group_sizes, transposed=transposed)

    return ffn(rows, weights, matmul, scale)


def large_blocks(num_rows: int, weights: ExpertWeights) -> RowBlocks | None:
    """Blocks of rows for plain matmuls; None where the groups are too small for them, and where hidden activations are
    kept: loops would write those to a buffer once more, and XLA's scheduler does not know how long loops take, which
    matters most where few rows hide the exchanges."""
    num_groups = weights.up.shape[0]
    share = num_rows / num_groups
    sizes = {math.ceil(share * part / TILE) * TILE for part in _BLOCKS}
    matrices = [matrix for matrix in (weights.up, weights.gate, weights.down) if matrix is not None]
    flops = 2.0 * max(sizes) * sum(matrix.size for matrix in matrices) / num_groups
    if weights.keeps_hidden or flops < _BLOCK_FLOPS or max(sizes) < _BLOCK_ROWS:
        return None
    return RowBlocks(tuple(sorted({min(size, num_rows) for size in sizes})))


def supports(rows: Float[Array, "R K"], matrices: Float[Array, "E A B"]) -> bool:
    """Whether the kernels take these shapes: an NVIDIA GPU from Ampere on, R, K and N in multiples of 16."""
    sizes = (rows.shape[0], *matrices.shape[1:])
    return target.current().compute_capability >= 8 and all(size % 16 == 0 for size in sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def grouped_matmul(
    rows: Array,
    matrices: Array,
    sizes: Int[Array, " E"],
    interpret: bool = False,
    transposed: bool = False,
    precision: str = "none",
) -> Array:
    """:func:`moe.dispatch.backends.tpu.grouped_matmul` by these kernels.

    Args:
        rows, matrices, sizes, transposed: as there.
        interpret: run the Triton kernels on the CPU, for tests.
        precision: of the factors, as in :func:`moe.dispatch.backends.tpu.quantized_matmul`.
    """
    return _multiply(rows, matrices, sizes, transposed=transposed, interpret=interpret, precision=precision)


def _grouped_matmul_fwd(rows, matrices, sizes, interpret, transposed, precision):
    return grouped_matmul(rows, matrices, sizes, interpret, transposed, precision), (rows, matrices, sizes)


def _grouped_matmul_bwd(interpret, transposed, precision, residuals, gradient):
    rows, matrices, sizes = residuals
    options = {"transposed": not transposed, "interpret": interpret, "precision": precision}
    d_rows = _multiply(gradient, matrices, sizes, **options)
    left, right = (gradient, rows) if transposed else (rows, gradient)
    d_matrices = triton.outer_products(left, right, sizes, interpret=interpret).astype(matrices.dtype)
    return d_rows, d_matrices, None


grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)


def _multiply_quantized(rows: Array, matrices: Array, sizes: Array, precision: str, *, transposed: bool) -> Array:
    """:func:`_multiply` of float8 factors. Tensor cores need contiguous terms, so matrices are stored transposed."""
    quantized.check_target(precision)
    contracted = 2 if transposed else 1
    if wrong := [size for size in matrices.shape[1:] if size % _FLOAT8_TILE]:
        raise ConfigError(
            f"model.low_precision={precision}: sides of a device's expert matrices must be multiples of {_FLOAT8_TILE} "
            f"on GPUs, not {wrong[0]}"
        )
    # Imported where they are needed: Mosaic takes a quarter of a second.
    from moe.dispatch.backends import blackwell, hopper  # noqa: PLC0415

    device = target.current()
    values, of_rows = quantized.quantize(rows, 1, precision)
    factors, of_columns = quantized.quantize(matrices, contracted, precision)
    factors = factors if transposed else factors.swapaxes(1, 2)
    scales = of_rows[:, 0], jnp.squeeze(of_columns, contracted)
    if device.compute_capability == 9:
        return hopper.multiply(values, factors, sizes, scales, cores=device.num_cores).astype(rows.dtype)
    product = blackwell.multiply(values, factors, sizes, scales, transposed=True, cores=device.num_cores)
    return product.astype(rows.dtype)


def _multiply(
    rows: Array, matrices: Array, sizes: Array, *, transposed: bool, interpret: bool, precision: str = "none"
) -> Array:
    """Rows [R,K] of each group by its matrix, [E,K,N], or [E,N,K] if transposed → [R,N]."""
    if precision != "none":
        return _multiply_quantized(rows, matrices, sizes, precision, transposed=transposed)
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
