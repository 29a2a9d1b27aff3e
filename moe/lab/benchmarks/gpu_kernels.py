"""Grouped matmuls on a real GPU: parity and times of kernels and of row blocks."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.dispatch.backends import gpu, row_blocks, tpu
from moe.dispatch.backends.packed import PackedWeights
from moe.dispatch.ffn import ExpertWeights
from moe.lab.benchmarks import timing
from moe.lab.benchmarks.gpu_sizes import Sizes


def grouped_matmuls(sizes: Sizes, calls: int) -> Iterator[str]:
    """The kernels chosen for few and for many groups of uneven size."""
    yield "| groups | rows, K, N | largest difference, of the largest value | ms | TFLOP/s |"
    yield "|---|---|---|---|---|"
    for groups in (sizes.experts, 16 * sizes.experts):
        yield _grouped_matmul(groups, 8 * sizes.tokens, sizes.d_model // 2, sizes.d_ff // 8, sizes.dtype, calls)


def large_groups(sizes: Sizes, calls: int) -> Iterator[str]:
    """Large groups of uneven size: an FFN and its gradients by plain matmuls in row blocks, and by the kernels."""
    num_rows = 8 * sizes.tokens
    d = sizes.d_model
    f = sizes.d_ff
    yield "| experts | rows | form | largest difference, of the largest value | ms | TFLOP/s |"
    yield "|---|---|---|---|---|---|"
    for experts in (1, sizes.experts // 2):
        rng = np.random.default_rng(experts)
        counts = jnp.asarray(rng.multinomial(num_rows * 4 // 5, rng.dirichlet(np.full(experts, 20.0))), jnp.int32)
        keys = jax.random.split(jax.random.key(experts), 5)
        shapes = ((num_rows, d), (num_rows, d), (experts, d, f), (experts, d, f), (experts, f, d))
        arrays = [jax.random.normal(key, shape, sizes.dtype) for key, shape in zip(keys, shapes, strict=True)]
        rows, gradient, up, gate, down = (array / math.sqrt(array.shape[-2]) for array in arrays)
        weights = gpu.pack(ExpertWeights(up, gate, down, activation="swiglu", keeps_hidden=False))
        chosen = gpu.large_blocks(rows.shape[0], weights) or row_blocks.RowBlocks((num_rows,))

        arguments = rows, weights, counts, gradient
        forms = {
            "row blocks": functools.partial(_in_blocks, chosen),
            "kernels": lambda rows, weights, counts: gpu.by_kernels(rows, counts, weights),
        }
        runs = {name: functools.partial(_with_gradients(form), *arguments) for name, form in forms.items()}
        pairs = zip(*(run() for run in runs.values()), strict=True)
        worst = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)
        if not worst < 0.03:
            raise AssertionError(f"with {experts} experts row blocks differ from the kernels by {worst:.1e}")
        for name, seconds in timing.in_turns(runs, calls).items():
            median = statistics.median(seconds.clock)
            rate = 3 * 6 * int(counts.sum()) * d * f / median / 1e12
            yield f"| {experts} | {int(counts.sum())} | {name} | {worst:.1e} | {1e3 * median:.2f} | {rate:.0f} |"


def _in_blocks(blocks: row_blocks.RowBlocks, rows: jax.Array, weights: PackedWeights, counts: jax.Array) -> jax.Array:
    return row_blocks.grouped_ffn(blocks, rows, counts, weights)


def _with_gradients(ffn: Callable[[jax.Array, PackedWeights, jax.Array], jax.Array]) -> Callable[..., list[jax.Array]]:
    """Outputs and gradients of an FFN of grouped rows, 0 for rows of no group."""

    def both(rows: jax.Array, weights: PackedWeights, counts: jax.Array, gradient: jax.Array) -> list[jax.Array]:
        y, pull = jax.vjp(lambda rows, weights: ffn(rows, weights, counts), rows, weights)
        inside = jnp.arange(len(rows))[:, None] < jnp.sum(counts)
        d_rows, d_weights = pull(jnp.where(inside, gradient, 0))
        return [jnp.where(inside, y, 0), jnp.where(inside, d_rows, 0), *jax.tree.leaves(d_weights)]

    return jax.jit(both)


def _grouped_matmul(groups: int, num_rows: int, terms: int, columns: int, dtype: str, calls: int) -> str:
    """A product and its two gradients: sampled rows and one matrix against plain matmuls in float32, and the rate."""
    rng = np.random.default_rng(groups)
    counts = rng.multinomial(num_rows, rng.dirichlet(np.full(groups, 2.0)))
    keys = jax.random.split(jax.random.key(groups), 3)
    shapes = ((num_rows, terms), (groups, terms, columns), (num_rows, columns))
    arrays = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]
    multiply = gpu.grouped_matmul if gpu.supports(*arrays[:2]) else tpu.grouped_matmul

    @jax.jit
    def all_three(rows: Any, matrices: Any, gradient: Any, counts: Any) -> Any:
        y, pull = jax.vjp(lambda rows, matrices: multiply(rows, matrices, counts), rows, matrices)
        return y, *pull(gradient)

    sizes = jnp.asarray(counts, jnp.int32)
    y, d_rows, d_matrices = all_three(*arrays, sizes)
    sample = rng.choice(num_rows, 64, replace=False)
    group, largest = np.repeat(np.arange(groups), counts)[sample], int(counts.argmax())
    end = int(counts[: largest + 1].sum())
    part = slice(end - int(counts[largest]), end)
    with jax.default_matmul_precision("highest"):
        rows, matrices, gradient = (array.astype(jnp.float32) for array in arrays)
        pairs = (
            (y[sample], jnp.einsum("rk,rkn->rn", rows[sample], matrices[group])),
            (d_rows[sample], jnp.einsum("rn,rkn->rk", gradient[sample], matrices[group])),
            (d_matrices[largest], rows[part].T @ gradient[part]),
        )
    worst = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)
    if not worst < 0.02:
        raise AssertionError(f"with {groups} groups a product differs from plain matmuls by {worst:.1e}")
    times = timing.in_turns({"all": lambda: all_three(*arrays, sizes)}, calls)["all"].clock
    seconds = statistics.median(times)
    rate = 6 * num_rows * terms * columns / seconds / 1e12
    return f"| {groups} | {num_rows}, {terms}, {columns} | {worst:.1e} | {1e3 * seconds:.3f} | {rate:.0f} |"
