"""Whether what is read of a checkpoint is what was saved.

In: arrays as they were saved, and as they were read. Out: checksums, and a DamagedError where they differ or where
nothing can be read: TensorStore does not notice a flipped bit in an array.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging as absl_logging
from jax import Array

from moe.config import ConfigError


class DamagedError(Exception):
    """A checkpoint that cannot be read, or is not what was saved; the message says what is wrong with it."""


@jax.jit
def _checksum(array: Array) -> Array:
    """Σ (2i+1)·word_i mod 2³² over the words of an array, [] uint32.

    Integers, so that the order of the sum, and with it the mesh, does not matter; odd factors, so that no change of
    one word leaves it as it was; different ones, so that words cannot change places.
    """
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    number, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        number += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    return jnp.sum(bits * (2 * number + 1), dtype=jnp.uint32)


def checksums(tree: Any) -> dict[str, int]:
    """Of every array of a tree (float32, int32 or uint32), by its place; the same on every mesh."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = [_checksum(leaf) for _, leaf in leaves]  # all started before one is read
    return {jax.tree_util.keystr(path): int(value) for (path, _), value in zip(leaves, sums, strict=True)}


def compare(saved: dict[str, int], tree: Any) -> None:
    """Raises DamagedError if an array of the tree is not the one that was saved."""
    differing = [name for name, value in checksums(tree).items() if saved.get(name, value) != value]
    if differing:
        raise DamagedError(f"{len(differing)} arrays are not those that were saved, the first is {differing[0]}")


@contextlib.contextmanager
def damage() -> Iterator[None]:
    """Whatever goes wrong in reading a file that says nonsense; but not what is wrong outside of the file."""
    try:
        yield
    except (ConfigError, DamagedError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        missing = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
        if isinstance(error, OSError) and not isinstance(error, missing):
            raise
        raise DamagedError(first_line(error)) from error


def first_line(error: BaseException) -> str:
    """Of what was wrong first; those above it speak of the work that failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error).strip() or "no more is known").splitlines()[0]
    return f"{type(error).__name__}: {line if len(line) <= 300 else f'{line[:100]} ... {line[-190:]}'}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences Orbax's warnings of what is meant: reading only, and parts that are not arrays."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)
