"""Grouped matmuls of a gated FFN for TPUs in Pallas, with the nonlinearity in the kernels.

XLA reads both products, or writes both gradients, in passes of their own over the rows: a fourteenth of a step of
Mixtral-8x7B on v5p. Here a tile of products is still in vector memory when the nonlinearity, or its gradient, is
applied; the compiler schedules that beside the matmul of the same tile.

Up and gate are one matrix whose lanes alternate (:meth:`moe.dispatch.ffn.ExpertWeights.joined`), so that a tile has
both numbers of each pair.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata
from jaxtyping import Float, Int

from moe.dispatch.backends.tpu_tiles import Tiles
from moe.dispatch.ffn import activate
from moe.parallel.target import LANES

_Index = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class _Operand:
    """An array, or the type of one, of which a kernel has a block at a time.

    Attributes:
        block: its shape.
        at: (block of rows, group, block of columns) → index of the block.
    """

    array: Any
    block: tuple[int | None, ...]
    at: Callable[[Any, Any, Any], _Index]


def _of_rows(array: Any, rows: int, columns: int) -> _Operand:
    return _Operand(array, (rows, columns), lambda row, group, column: (row, column))


def _factors(scale: Float[Array, " R"], rows: int) -> _Operand:
    """One number a row, along the lanes: an array [R,1] would be padded to as many columns as there are lanes."""
    return _Operand(scale[None], (1, rows), lambda row, group, column: (0, row))


def _to_columns(factors: Any) -> Float[Array, "rows lanes"]:
    """A block of :func:`_factors`, each row's in all of its lanes."""
    block = factors[...]
    return jnp.broadcast_to(block, (LANES, block.shape[1])).T


def activated(
    rows: Float[Array, "R D"],
    matrices: Float[Array, "E D J"],
    biases: Float[Array, "E J"] | None,
    scale: Float[Array, " R"] | None,
    sizes: Int[Array, " E"],
    activation: str,
    tiles: Tiles,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "R J"], Float[Array, "R F"]]:
    """Rows times the interleaved matrices of their experts, and the hidden activations of these products.

    Args:
        rows: sorted by expert; of further ones than ``sizes`` the results are undefined.
        matrices: of up and gate, J = 2F.
        biases: likewise.
        scale: factors of the activations.
        sizes: rows of each expert.
        activation: a gated value of ``model.activation``.
        tiles: rows, K and N, of whole pairs of lanes; R is a multiple of the rows.
        interpret: by Pallas' interpreter, on any device.
    """
    tile_rows, _, tile_columns = tiles
    num_rows, columns = rows.shape[0], matrices.shape[2]
    inputs = []
    if biases is not None:
        inputs.append(_Operand(biases[:, None], (None, 1, tile_columns), lambda row, group, column: (group, 0, column)))
    if scale is not None:
        inputs.append(_factors(scale, tile_rows))

    def finish(sums: Array, mask: Array, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        bias = None if biases is None else inputs[0][...].astype(jnp.float32)
        factor = 1.0 if scale is None else _to_columns(inputs[-1])
        joined_ref, hidden_ref = outputs
        for pair, up, gate in _pairs(sums.shape[1]):
            both = [sums[:, lanes] if bias is None else sums[:, lanes] + bias[:, lanes] for lanes in (up, gate)]
            both = [_store(joined_ref, lanes, mask, half) for lanes, half in zip((up, gate), both, strict=True)]
            _store(hidden_ref, pair, mask, activate(activation, *both) * factor)

    outputs = [
        _of_rows(jax.ShapeDtypeStruct((num_rows, columns), rows.dtype), tile_rows, tile_columns),
        _of_rows(jax.ShapeDtypeStruct((num_rows, columns // 2), rows.dtype), tile_rows, tile_columns // 2),
    ]
    products, hidden = _run(
        rows, matrices, sizes, tiles, inputs, outputs, finish, transposed=False, interpret=interpret
    )
    return products, hidden


def activation_gradients(
    gradient: Float[Array, "R D"],
    down: Array,
    joined: Float[Array, "R J"],
    scale: Float[Array, " R"] | None,
    sizes: Int[Array, " E"],
    activation: str,
    tiles: Tiles,
    *,
    is_turned: bool,
    interpret: bool = False,
) -> tuple[Float[Array, "R J"], Float[Array, "R F"], Float[Array, " R"] | None]:
    """Gradients of the interleaved products ``joined``, hidden activations, and gradients of their factors.

    Args:
        gradient: of the experts' outputs.
        down: [E,D,F] if ``is_turned``, else [E,F,D].
        tiles: rows, K (of D) and N (of F).
        joined, scale, sizes, activation, interpret: as :func:`activated`.
    """
    tile_rows, _, tile_columns = tiles
    num_rows, columns = joined.shape
    blocks = math.ceil(columns // 2 / tile_columns)
    of_joined = functools.partial(_of_rows, rows=tile_rows, columns=2 * tile_columns)
    outputs = [
        of_joined(jax.ShapeDtypeStruct(joined.shape, joined.dtype)),
        _of_rows(jax.ShapeDtypeStruct((num_rows, columns // 2), joined.dtype), tile_rows, tile_columns),
    ]
    inputs = [of_joined(joined)]
    if scale is not None:
        inputs.append(_factors(scale, tile_rows))
        of_scale = jax.ShapeDtypeStruct((blocks, 1, num_rows), jnp.float32)
        outputs.append(_Operand(of_scale, (None, 1, tile_rows), lambda row, group, column: (column, 0, row)))

    def finish(sums: Array, mask: Array, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        joined_ref, d_joined_ref, hidden_ref = inputs[0], *outputs[:2]
        factor = 1.0 if scale is None else _to_columns(inputs[1])
        d_factor = jnp.zeros((tile_rows, LANES), jnp.float32)
        inside = columns // 2 - pl.program_id(0) * tile_columns  # columns of this block that exist
        for pair, up, gate in _pairs(2 * sums.shape[1]):
            both = [joined_ref[:, lanes].astype(jnp.float32) for lanes in (up, gate)]
            hidden, backward = jax.vjp(functools.partial(activate, activation), *both)
            of_pair = sums[:, pair]
            for lanes, half in zip((up, gate), backward(of_pair * factor), strict=True):
                _store(d_joined_ref, lanes, mask, half)
            _store(hidden_ref, pair, mask, hidden * factor)
            d_factor += jnp.where(pair.start < inside, of_pair * hidden, 0.0)
        if scale is not None:
            of_group = mask.astype(jnp.float32).T[:1] > 0
            outputs[2][...] = jnp.where(of_group, jnp.sum(d_factor.T, axis=0, keepdims=True), outputs[2][...])

    d_joined, hidden, *d_scale = _run(
        gradient, down, sizes, tiles, inputs, outputs, finish, transposed=not is_turned, interpret=interpret
    )
    return d_joined, hidden, jnp.sum(d_scale[0], axis=(0, 1)) if d_scale else None


def _pairs(width: int) -> list[tuple[slice, slice, slice]]:
    """Lanes of each pair in a result, and in interleaved columns of this width those of up and of gate."""
    starts = range(0, width, 2 * LANES)
    return [
        (slice(at // 2, at // 2 + LANES), slice(at, at + LANES), slice(at + LANES, at + 2 * LANES)) for at in starts
    ]


def _store(ref: Any, lanes: slice, mask: Array, values: Array) -> Array:
    """Write the group's rows of some lanes; returns the numbers written, in float32."""
    rounded = values.astype(ref.dtype).astype(jnp.float32)
    ref[:, lanes] = jnp.where(mask, rounded, ref[:, lanes].astype(jnp.float32)).astype(ref.dtype)
    return rounded


def _run(
    left: Float[Array, "R K"],
    matrices: Array,
    sizes: Int[Array, " E"],
    tiles: Tiles,
    inputs: Sequence[_Operand],
    outputs: Sequence[_Operand],
    finish: Callable[[Array, Array, Sequence[Any], Sequence[Any]], None],
    *,
    transposed: bool,
    interpret: bool,
) -> tuple[Array, ...]:
    """Multiply the rows of each group by its matrix, and ``finish`` every tile.

    A tile of rows that several groups share is visited once for each, one after another.

    Args:
        left: rows.
        matrices: [E,K,N], or [E,N,K] if ``transposed``.
        tiles: with all of K.
        finish: (float32 products, rows of the group in the tile [rows,LANES], blocks of the inputs, blocks of the
            outputs) → writes the outputs.
    """
    (num_rows, contracted), (tile_rows, _, tile_n) = left.shape, tiles
    metadata, steps = make_group_metadata(
        group_sizes=sizes,
        m=num_rows,
        tm=tile_rows,
        start_group=jnp.int32(0),
        num_nonzero_groups=sizes.shape[0],
        visit_empty_groups=False,
    )

    def kernel(starts: Any, groups: Any, blocks: Any, left: Any, right: Any, *operands: Any) -> None:
        step = pl.program_id(1)
        contracting = (1,), (int(transposed),)
        products = lax.dot_general(left[...], right[...], (contracting, ((), ())), preferred_element_type=jnp.float32)
        row = lax.broadcasted_iota(jnp.int32, (tile_rows, LANES), 0) + blocks[step] * tile_rows
        mask = (row >= starts[groups[step]]) & (row < starts[groups[step] + 1])
        finish(products, mask, operands[: len(inputs)], operands[len(inputs) :])

    def spec(operand: _Operand) -> pl.BlockSpec:
        def index(column: Any, step: Any, starts: Any, groups: Any, blocks: Any) -> _Index:
            return operand.at(blocks[step], groups[step], column)

        return pl.BlockSpec(operand.block, index)

    rows = _Operand(left, (tile_rows, contracted), lambda row, group, column: (row, 0))
    columns = matrices.shape[1 if transposed else 2]
    if transposed:
        right = _Operand(matrices, (None, tile_n, contracted), lambda row, group, column: (group, column, 0))
    else:
        right = _Operand(matrices, (None, contracted, tile_n), lambda row, group, column: (group, 0, column))
    operands = rows, right, *inputs
    run = pl.pallas_call(
        kernel,
        out_shape=[operand.array for operand in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(metadata),
            in_specs=[spec(operand) for operand in operands],
            out_specs=[spec(operand) for operand in outputs],
            grid=(math.ceil(columns / tile_n), steps),
        ),
        # XLA schedules exchanges beside the kernel by it, and the planner counts its FLOPs.
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * contracted * columns,
            transcendentals=num_rows * outputs[1].array.shape[1],
            bytes_accessed=sum(operand.array.size * operand.array.dtype.itemsize for operand in (*operands, *outputs)),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )
    return run(*metadata, *(operand.array for operand in operands))
