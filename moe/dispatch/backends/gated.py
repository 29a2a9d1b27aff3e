"""Grouped matmuls of a gated FFN for TPUs in Pallas, with the nonlinearity in the kernels.

XLA reads both products, or writes both gradients, in separate passes over the rows: a fourteenth of a step of
Mixtral-8x7B on v5p. Here a tile of products is still in vector memory when the nonlinearity, or its gradient, is
applied; the compiler schedules that beside the matmul of the same tile.

Up and gate are one matrix whose lanes alternate (:class:`moe.dispatch.backends.tpu_weights.Interleaved`), so that
a tile has both numbers of each pair.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float, Int

from moe.dispatch.backends.tpu_kernel import (
    Factors,
    Products,
    of_each_row,
    of_groups,
    of_row_blocks,
    of_rows,
    run,
    store,
    store_of_rows,
    to_columns,
)
from moe.dispatch.backends.tpu_tiles import Tiles
from moe.dispatch.ffn import activate
from moe.parallel.target import LANES

#: Gated activations that the kernels compute: Pallas lacks the error function on TPUs.
ACTIVATIONS = ("swiglu", "swiglu_clamped", "geglu", "reglu")


def activated(
    both: Factors,
    biases: Float[Array, "E J"] | None,
    scale: Float[Array, " R"] | None,
    sizes: Int[Array, " E"],
    activation: str,
    dtype: Any,
    tiles: Tiles,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "R J"], Float[Array, "R F"], Float[Array, " R"] | None]:
    """Rows times the interleaved matrices of their experts, their hidden activations, and, for quantised
    factors, the largest absolute value of these in each row.

    Args:
        both: rows [R,D], and the matrices [E,D,J] of up and gate, J = 2F; results of rows beyond the sum of ``sizes``
            are undefined.
        biases: of up and gate likewise.
        scale: factors of the activations.
        sizes: rows of each expert.
        activation: a gated value of ``model.activation``.
        dtype: of the results.
        tiles: rows, K and N, of whole pairs of lanes; R is a multiple of the rows.
        interpret: run in Pallas' interpreter, on any device.
    """
    tile_rows, _, tile_columns = tiles
    num_rows, columns = both.rows.shape[0], both.shape[2]
    inputs = []
    if biases is not None:
        inputs.append(of_groups(biases, tile_columns))
    if scale is not None:
        inputs.append(of_each_row(scale, tile_rows))

    def finish(products: Products, mask: Array, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        bias = None if biases is None else inputs[0][...].astype(jnp.float32)
        factor = 1.0 if scale is None else to_columns(inputs[-1])
        joined_ref, hidden_ref = outputs[:2]
        largest = jnp.zeros((tile_rows, LANES), jnp.float32)
        inside = columns - pl.program_id(0) * tile_columns  # columns of this block that exist
        for pair, up, gate in _pairs(tile_columns):
            halves = [products(lanes) if bias is None else products(lanes) + bias[:, lanes] for lanes in (up, gate)]
            halves = [store(joined_ref, lanes, mask, half) for lanes, half in zip((up, gate), halves, strict=True)]
            hidden = store(hidden_ref, pair, mask, activate(activation, *halves) * factor)
            if both.scales is not None:
                largest = jnp.maximum(largest, jnp.where(up.start < inside, jnp.abs(hidden), 0.0))
        if both.scales is not None:
            store_of_rows(outputs[2], mask, largest, jnp.max)

    outputs = [
        of_rows(jax.ShapeDtypeStruct((num_rows, columns), dtype), tile_rows, tile_columns),
        of_rows(jax.ShapeDtypeStruct((num_rows, columns // 2), dtype), tile_rows, tile_columns // 2),
    ]
    if both.scales is not None:
        outputs.append(of_row_blocks(num_rows, tile_rows, math.ceil(columns / tile_columns)))
    transcendentals = num_rows * columns // 2
    products, hidden, *largest = run(
        both, sizes, tiles, inputs, outputs, finish, transcendentals=transcendentals, interpret=interpret
    )
    return products, hidden, _of_all_blocks(jnp.max, largest)


def activation_gradients(
    both: Factors,
    joined: Float[Array, "R J"],
    scale: Float[Array, " R"] | None,
    sizes: Int[Array, " E"],
    activation: str,
    tiles: Tiles,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "R J"], Float[Array, "R F"], Float[Array, " R"] | None, Float[Array, " R"] | None]:
    """Gradients of the interleaved products ``joined``, hidden activations, gradients of their factors, and, for
    quantised factors, the largest absolute gradient of a product in each row.

    Args:
        both: gradients of the experts' outputs [R,D], and down as [E,D,F].
        tiles: rows, K (of D) and N (of F).
        joined, scale, sizes, activation, interpret: as :func:`activated`.
    """
    tile_rows, _, tile_columns = tiles
    num_rows, columns = joined.shape
    blocks = math.ceil(columns // 2 / tile_columns)
    of_joined = functools.partial(of_rows, rows=tile_rows, columns=2 * tile_columns)
    outputs = [
        of_joined(jax.ShapeDtypeStruct(joined.shape, joined.dtype)),
        of_rows(jax.ShapeDtypeStruct((num_rows, columns // 2), joined.dtype), tile_rows, tile_columns),
    ]
    inputs = [of_joined(joined)]
    if scale is not None:
        inputs.append(of_each_row(scale, tile_rows))
        outputs.append(of_row_blocks(num_rows, tile_rows, blocks))
    if both.scales is not None:
        outputs.append(of_row_blocks(num_rows, tile_rows, blocks))

    def finish(products: Products, mask: Array, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        joined_ref, d_joined_ref, hidden_ref = inputs[0], *outputs[:2]
        factor = 1.0 if scale is None else to_columns(inputs[1])
        d_factor = largest = jnp.zeros((tile_rows, LANES), jnp.float32)
        inside = columns // 2 - pl.program_id(0) * tile_columns  # columns of this block that exist
        for pair, up, gate in _pairs(2 * tile_columns):
            halves = [joined_ref[:, lanes].astype(jnp.float32) for lanes in (up, gate)]
            hidden, backward = jax.vjp(functools.partial(activate, activation), *halves)
            of_pair = products(pair)
            for lanes, half in zip((up, gate), backward(of_pair * factor), strict=True):
                stored = store(d_joined_ref, lanes, mask, half)
                if both.scales is not None:
                    largest = jnp.maximum(largest, jnp.where(pair.start < inside, jnp.abs(stored), 0.0))
            store(hidden_ref, pair, mask, hidden * factor)
            d_factor += jnp.where(pair.start < inside, of_pair * hidden, 0.0)
        if scale is not None:
            store_of_rows(outputs[2], mask, d_factor, jnp.sum)
        if both.scales is not None:
            store_of_rows(outputs[-1], mask, largest, jnp.max)

    transcendentals = num_rows * columns // 2
    d_joined, hidden, *of_blocks = run(
        both, sizes, tiles, inputs, outputs, finish, transcendentals=transcendentals, interpret=interpret
    )
    d_scale = _of_all_blocks(jnp.sum, of_blocks[:1] if scale is not None else [])
    largest = _of_all_blocks(jnp.max, of_blocks[-1:] if both.scales is not None else [])
    return d_joined, hidden, d_scale, largest


def _of_all_blocks(reduce: Callable[..., Array], of_blocks: Sequence[Array]) -> Float[Array, " R"] | None:
    """Reduce the numbers of each row's blocks of columns, [blocks,1,R], to one per row; None if there are none."""
    return reduce(of_blocks[0], axis=(0, 1)) if of_blocks else None


def _pairs(width: int) -> list[tuple[slice, slice, slice]]:
    """Lanes of each pair in a result, and in interleaved columns of this width those of up and of gate."""
    starts = range(0, width, 2 * LANES)
    return [
        (slice(at // 2, at // 2 + LANES), slice(at, at + LANES), slice(at + LANES, at + 2 * LANES)) for at in starts
    ]
