"""Grouped FFN by ``lax.ragged_dot`` and Pallas kernels, with tiles for TPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm as megablox_gmm
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Float, Int

from moe.dispatch import quantized
from moe.dispatch.backends import gated
from moe.dispatch.backends.tpu_kernel import Factors, grouped_products
from moe.dispatch.backends.tpu_tiles import TILE, Device, Kind, Tiles, fastest_tiles
from moe.dispatch.backends.tpu_weights import Interleaved, TpuWeights, pack, pack_shards
from moe.dispatch.ffn import ffn
from moe.parallel.parameters import gather_shard
from moe.parallel.partition_specs import HIDDEN

__all__ = ["SCALES_HIDDEN", "SORTS_WITH_CAPACITY", "TILE", "grouped_ffn", "pack", "pack_shards"]

#: As of :mod:`moe.dispatch.backends.cpu`.
SORTS_WITH_CAPACITY = False
SCALES_HIDDEN = True

_ROWS_CONTRACTED = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def grouped_ffn(
    rows: Float[Array, "R D"],
    group_sizes: Int[Array, " E"],
    weights: TpuWeights,
    scale: Float[Array, " R"] | None = None,
) -> Float[Array, "R D"]:
    """:func:`moe.dispatch.backends.grouped_ffn` as grouped matmuls, which include a gated FFN's nonlinearity."""
    if isinstance(weights, Interleaved):
        if kernels := _gated_kernels(rows, weights):
            biases = None if weights.biases is None else weights.biases[0]
            return _gated_ffn(kernels, rows, weights.up, biases, weights.down, scale, group_sizes)
        weights = weights.separated()

    def matmul(rows: Array, matrices: Array, *, transposed: bool = False) -> Array:
        if weights.quantizes(matrices):
            return quantized_matmul(rows, matrices, group_sizes, weights.precision, transposed, weights.fsdp_sharded)
        return multiply(rows, matrices, group_sizes, transposed=transposed)

    return ffn(rows, weights, matmul, scale)


def multiply(rows: Array, matrices: Array, sizes: Int[Array, " E"], *, transposed: bool = False) -> Array:
    """Multiply the rows of each group by its matrix, as :func:`grouped_matmul` does."""
    if matrices.shape[1] == 1 and not transposed:
        return multiply_columns(rows, matrices, sizes)
    return grouped_matmul(rows, matrices, sizes, transposed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(rows: Array, matrices: Array, sizes: Int[Array, " E"], transposed: bool = False) -> Array:
    """Multiply the first sizes[0] rows by matrix 0, the next sizes[1] by matrix 1, and so on; rows of the output
    beyond the groups are undefined.

    Args:
        rows: [R,D].
        matrices: [E,D,F].
        sizes: rows of each group.
        transposed: the matrices are [E,F,D], and each is multiplied transposed.

    Returns:
        [R,F].
    """
    return _multiply(rows, matrices, sizes, transposed=transposed)


def _multiply(rows: Array, matrices: Array, sizes: Array, *, transposed: bool) -> Array:
    num_groups, left, right = matrices.shape
    tiles = _tiles("rows", rows, (num_groups, right, left) if transposed else matrices.shape)
    with _tiling(tiles):
        # ragged_dot's kernel needs the matrices transposed in memory; megablox's reads them in either order.
        if transposed and tiles:
            return megablox_gmm(rows, matrices, sizes, rows.dtype, tiles, transpose_rhs=True)
        matrices = matrices.swapaxes(1, 2) if transposed else matrices
        return lax.ragged_dot(rows, matrices, sizes, preferred_element_type=rows.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def quantized_matmul(
    rows: Float[Array, "R D"],
    matrices: Array,
    sizes: Int[Array, " E"],
    precision: str,
    transposed: bool = False,
    fsdp_sharded: bool = False,
) -> Float[Array, "R F"]:
    """:func:`grouped_matmul` of quantised factors (:mod:`moe.dispatch.quantized`).

    Args:
        precision: of the factors, a value of ``model.low_precision`` other than ``none``.
        rows, matrices, sizes, transposed: as there.
        fsdp_sharded: ``matrices`` are one device's shards of the second dimension, within ``shard_map``, which are
            quantised and then gathered over ``fsdp``, which sends fewer bytes. Their gradient is scattered.
    """
    both = _factors(rows, matrices, precision, transposed=transposed, fsdp_sharded=fsdp_sharded)
    return _multiply_quantized(both, sizes, rows.dtype)


def _factors(
    rows: Array,
    matrices: Array,
    precision: str,
    *,
    transposed: bool,
    fsdp_sharded: bool,
    largest: Float[Array, " R"] | None = None,
) -> Factors:
    """Factors of a kernel, quantised unless the precision is ``none``; ``largest``: each row's absolute maximum."""
    if precision == "none":
        return Factors(rows, matrices, transposed)
    quantized.check_target(precision)
    largest = None if largest is None else largest[:, None]
    numbers, of_rows = quantized.quantize(rows, -1, precision, largest=largest)
    split_over = "fsdp" if fsdp_sharded and not transposed else None
    matrices, of_matrices = quantized.quantize(matrices, 2 if transposed else 1, precision, split_over=split_over)
    if fsdp_sharded:
        matrices = gather_shard(matrices, 1)
        of_matrices = gather_shard(of_matrices, 1) if transposed else of_matrices
    return Factors(numbers, matrices, transposed, (of_rows, of_matrices), quantized.TYPES[precision][1])


def _multiply_quantized(both: Factors, sizes: Array, dtype: Any) -> Array:
    if tiles := _tiles("rows", both.rows, both.shape):
        with _tiling(tiles, kernel_kind="rows"):
            return grouped_products(both, sizes, dtype, tiles)
    assert both.scales is not None
    numbers, (of_rows, of_matrices) = both.matrices, both.scales
    if both.transposed:
        numbers, of_matrices = numbers.swapaxes(1, 2), of_matrices.swapaxes(1, 2)
    sums = lax.ragged_dot(both.rows, numbers, sizes, preferred_element_type=both.sums_dtype)
    with jax.default_matmul_precision("highest"):
        of_groups = multiply_columns(jnp.ones_like(of_rows), of_matrices, sizes)
    return (sums * of_rows * of_groups).astype(dtype)


def multiply_columns(
    rows: Float[Array, "R 1"], matrices: Float[Array, "E 1 F"], sizes: Int[Array, " E"]
) -> Float[Array, "R F"]:
    """:func:`grouped_matmul` of matrices with one row, such as biases, as a matmul with the one-hot groups of all rows;
    rows of the output beyond the groups are zero. A kernel would pad that one row to a whole tile."""
    ends = jnp.cumsum(sizes)
    index = jnp.arange(rows.shape[0])[:, None]
    groups = (index >= ends - sizes) & (index < ends)  # [R,E]
    product = jnp.where(groups, rows, 0) @ matrices[:, 0]
    # Gradients of rows beyond the groups may be NaN, and NaN times 0 is NaN.
    return jnp.where(index < ends[-1], product, 0)


def _grouped_matmul_fwd(rows, matrices, sizes, transposed):
    return grouped_matmul(rows, matrices, sizes, transposed), (rows, matrices, sizes)


def _grouped_matmul_bwd(transposed, residuals, gradient):
    rows, matrices, sizes = residuals
    left, right = (gradient, rows) if transposed else (rows, gradient)
    d_matrices = _outer_products(left, right, sizes, matrices)
    d_rows = _multiply(gradient, matrices, sizes, transposed=not transposed)
    return d_rows, d_matrices, None


grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)


def _outer_products(
    rows: Array, gradient: Array, sizes: Array, matrices: Array, *, fsdp_sharded: bool = False
) -> Array:
    """Transposed rows [R,D] of each group by its gradient rows [R,F] → [E,D,F], the gradient of the matrices,
    scattered over ``fsdp`` if they are shards."""
    gather = functools.partial(gather_shard, dim=1) if fsdp_sharded else lambda matrices: matrices
    shape = jax.eval_shape(gather, matrices).shape
    with _tiling(_tiles("weights", rows, shape)):
        found = lax.ragged_dot_general(rows, gradient, sizes, _ROWS_CONTRACTED, preferred_element_type=matrices.dtype)
    (found,) = jax.linear_transpose(gather, matrices)(found)
    return found


def _quantized_matmul_fwd(rows, matrices, sizes, precision, transposed, fsdp_sharded):
    y = quantized_matmul(rows, matrices, sizes, precision, transposed, fsdp_sharded)
    return y, (rows, matrices, sizes)


def _quantized_matmul_bwd(precision, transposed, fsdp_sharded, residuals, gradient):
    rows, matrices, sizes = residuals
    d_rows = quantized_matmul(gradient, matrices, sizes, precision, not transposed, fsdp_sharded)
    left, right = (gradient, rows) if transposed else (rows, gradient)
    d_matrices = _outer_products(left, right, sizes, matrices, fsdp_sharded=fsdp_sharded)
    return d_rows, d_matrices, None


quantized_matmul.defvjp(_quantized_matmul_fwd, _quantized_matmul_bwd)


@dataclasses.dataclass(frozen=True)
class _GatedKernels:
    """Kernels of a gated FFN (:mod:`moe.dispatch.backends.gated`).

    Attributes:
        activation: a gated value of ``model.activation``.
        down_transposed: down is [E,D,F] instead of [E,F,D].
        forward, backward: tiles of the kernels with the nonlinearity and with its gradient.
        precision: of the factors, a value of ``model.low_precision``.
        fsdp_sharded: as of :func:`quantized_matmul`.
    """

    activation: str
    down_transposed: bool
    forward: Tiles
    backward: Tiles
    precision: str
    fsdp_sharded: bool

    def factors(
        self, rows: Array, matrices: Array, *, transposed: bool = False, largest: Array | None = None
    ) -> Factors:
        """Factors of a kernel; ``largest``: largest absolute value of each row, if it is known."""
        return _factors(
            rows, matrices, self.precision, transposed=transposed, fsdp_sharded=self.fsdp_sharded, largest=largest
        )

    def multiply(
        self, rows: Array, matrices: Array, sizes: Array, *, transposed: bool, largest: Array | None = None
    ) -> Array:
        """Rows times the matrices of their experts."""
        if self.precision == "none":
            return _multiply(rows, matrices, sizes, transposed=transposed)
        both = self.factors(rows, matrices, transposed=transposed, largest=largest)
        return _multiply_quantized(both, sizes, rows.dtype)


def _gated_kernels(rows: Array, weights: Interleaved) -> _GatedKernels | None:
    """Kernels for interleaved weights; None: no tiles fit."""
    (num_groups, _, columns), width = weights.up.shape, rows.shape[1]
    dtype = rows.dtype if weights.precision == "none" else quantized.TYPES[weights.precision][0]
    rows_type = jax.ShapeDtypeStruct(rows.shape, dtype)
    forward = _tiles("activated", rows_type, (num_groups, width, columns))
    backward = _tiles("gradients", rows_type, (num_groups, width, columns // 2))
    if forward is None or backward is None:
        return None
    return _GatedKernels(
        weights.activation, weights.down_transposed, forward, backward, weights.precision, weights.fsdp_sharded
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated_ffn(
    kernels: _GatedKernels,
    rows: Float[Array, "R D"],
    joined: Float[Array, "E D J"],
    biases: Float[Array, "E J"] | None,
    down: Array,
    scale: Float[Array, " R"] | None,
    sizes: Int[Array, " E"],
) -> Float[Array, "R D"]:
    """Both halves of a gated FFN, the nonlinearity in the matmuls.

    Args:
        joined: matrices of up and gate, interleaved; biases: likewise.
        scale: factors of the rows' outputs.
    """
    return _gated_ffn_fwd(kernels, rows, joined, biases, down, scale, sizes)[0]


def _gated_ffn_fwd(kernels, rows, joined, biases, down, scale, sizes):
    both = kernels.factors(rows, joined)
    with _tiling(kernels.forward, kernel_kind="activated"):
        products, hidden, largest = gated.activated(
            both, biases, scale, sizes, kernels.activation, rows.dtype, kernels.forward
        )
    products = checkpoint_name(products, HIDDEN)
    y = kernels.multiply(hidden, down, sizes, transposed=kernels.down_transposed, largest=largest)
    return y, (rows, joined, biases, down, scale, sizes, products)


def _gated_ffn_bwd(kernels, residuals, gradient):
    rows, joined, biases, down, scale, sizes, products = residuals
    both = kernels.factors(gradient, down, transposed=not kernels.down_transposed)
    with _tiling(kernels.backward, kernel_kind="gradients"):
        d_products, hidden, d_scale, largest = gated.activation_gradients(
            both, products, scale, sizes, kernels.activation, kernels.backward
        )
    left, right = (gradient, hidden) if kernels.down_transposed else (hidden, gradient)
    d_down = _outer_products(left, right, sizes, down, fsdp_sharded=kernels.fsdp_sharded)
    d_joined = _outer_products(rows, d_products, sizes, joined, fsdp_sharded=kernels.fsdp_sharded)
    d_rows = kernels.multiply(d_products, joined, sizes, transposed=True, largest=largest)
    d_biases = None
    if biases is not None:
        ones = jnp.ones_like(rows[:, :1])
        _, expand = jax.vjp(lambda biases: multiply_columns(ones, biases[:, None], sizes), biases)
        (d_biases,) = expand(d_products)
    return d_rows, d_joined, d_biases, d_down, d_scale, None


_gated_ffn.defvjp(_gated_ffn_fwd, _gated_ffn_bwd)


def _tiles(kind: Kind, rows: Array | jax.ShapeDtypeStruct, matrices: tuple[int, ...]) -> Tiles | None:
    """Tiles of a kernel; None: XLA's own choice, for factors wider than bfloat16, on v2 and v3, and for rows that do
    not fill whole tiles."""
    device, item = Device.current(), rows.dtype.itemsize
    if item > jnp.dtype(jnp.bfloat16).itemsize or rows.shape[0] % TILE or device is None:
        return None
    return fastest_tiles(kind, rows.shape[0], matrices, device, item)


def _tiling(tiles: Tiles | None, **more: str) -> contextlib.AbstractContextManager[Any]:
    """Set the tiles of the kernels traced in this context, and more, as metadata that :mod:`moe.planner.work` reads."""
    if tiles is None:
        return contextlib.nullcontext()
    return set_xla_metadata(ragged_dot_tiling=",".join(map(str, tiles)), **more)
