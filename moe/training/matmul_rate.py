"""Arithmetic rate of the machine, the denominator of MFU."""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp


def measured_matmul_rate(dtype: str = "float32", size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of one large square matmul on one device, measured now: the median of ``repeats``."""
    matrix = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda a, b: a @ b)
    multiply(matrix, matrix).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(matrix, matrix).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)
