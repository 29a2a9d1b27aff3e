"""Grouped FFN: rows sorted by expert, each through its expert's matrices, with static shapes and any group sizes.

In: rows [R,D] in which expert e's are the ``sizes[e]`` from ``starts[e]`` on; rows of no expert cost nothing. Out: rows
of the same layout. Nothing here knows of tokens or gates. There is one switch, :func:`moe.parallel.target.is_cpu`: ``lax.ragged_dot``
where the hardware has it, and on CPU, where XLA makes of it a dense matmul with E times the work, a loop over chunks.

Letters: R rows, E experts, D model dim, F hidden dim.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jax import Array

from moe.dispatch.grouped_matmul.accelerator import grouped_matmul
from moe.dispatch.grouped_matmul.cpu import Chunks, First, Second, grouped_ffn_in_blocks
from moe.parallel import target


def chunks(num_rows: int, num_groups: int) -> Chunks:
    """For R rows in E groups."""
    if not target.is_cpu():
        return Chunks(())
    mean = num_rows / num_groups
    # Of the mean load: 1/8 apart up to its half, then 1/16, and in the middle, where most groups are, 1/32.
    shares = [*np.arange(0, 1 / 2, 1 / 8), *np.arange(1 / 2, 25 / 16, 1 / 16), *np.arange(7 / 8, 9 / 8, 1 / 32)]
    step = 5 if mean >= 64 else 15  # XLA's matmul takes five rows at a time; where rows are few, code costs more
    return Chunks(tuple(sorted({max(15, math.ceil(mean * share / step) * step) for share in shares})))


def grouped_ffn(
    first: First,
    second: Second | None,
    rows: Array,
    into: Any,
    out_of: Any,
    starts: Array,
    sizes: Array,
    pieces: Chunks,
) -> Any:
    """second(first(rows)), every group with its expert's matrices.

    Args:
        first: static; rows → hidden activations before the nonlinearity.
        second: static; those → rows. None: stop before it.
        rows: [R,D]; zero where :meth:`Chunks.padded_sizes` made room.
        into: matrices of first, [E,·,·] each.
        out_of: matrices of second, [E,·,·] each.
        starts: [E] int32, ascending; without :func:`moe.parallel.target.is_cpu` the groups must touch.
        sizes: [E] int32, as :meth:`Chunks.padded_sizes` returned them.
        pieces: static, those that padded them.
    """
    if pieces.sizes:
        return grouped_ffn_in_blocks(first, second, pieces, rows, into, out_of, starts, sizes)
    matmul = grouped_matmul(sizes)
    hidden = first(rows, into, matmul)
    return hidden if second is None else second(hidden, out_of, matmul)
