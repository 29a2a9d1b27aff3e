"""Arithmetic rate of the machine, the denominator of MFU."""

from __future__ import annotations

import functools
import statistics
import time

import jax
import jax.numpy as jnp

from moe.parallel import target


def measured_matmul_rate(
    dtype: str = "float32", size: int | None = None, repeats: int = 5, chain: int | None = None
) -> float:
    """FLOP/s of large square matmuls on one device, measured now.

    Args:
        dtype: of the matrices.
        size: rows of a matrix; None: 2048 on CPU, 8192 on accelerators.
        repeats: measurements, of which the median counts.
        chain: matmuls of one program; None: 1 on CPU, 16 on accelerators, where a single one would measure the launch.
    """
    on_cpu = target.is_cpu()
    size = size or (2048 if on_cpu else 8192)
    chain = chain or (1 if on_cpu else 16)
    # Every row of the factor sums to 1, so that products stay finite however long the chain.
    factor = jnp.full((size, size), 1.0 / size, dtype)
    multiply = jax.jit(functools.partial(_multiply, chain=chain))
    multiply(factor, factor).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(factor, factor).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 * chain / statistics.median(times)


def _multiply(matrix: jax.Array, factor: jax.Array, chain: int) -> jax.Array:
    return jax.lax.fori_loop(0, chain, lambda _, product: product @ factor, matrix) if chain > 1 else matrix @ factor
