"""Checksums of saved arrays, and the error for checkpoints that cannot be read or differ from what was saved.

TensorStore's own checksums cover its index, not the numbers: a flipped bit in an array is read as another number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jax import Array

from moe.config import ConfigError
from moe.system.atomic_files import first_line

#: Empty mesh for programs over arrays of a checkpoint, which run on the devices that hold the arrays, often one of this
#: process. With the mesh of a run in context, JAX would require the devices of that mesh.
NO_MESH = jax.sharding.Mesh(np.empty((), object), ())


#: Stands for an array of a checkpoint that is not read.
UNREAD = ocp.PLACEHOLDER


class DamagedError(Exception):
    """A checkpoint cannot be read, or its content differs from what was saved."""


@jax.jit
def _checksum(array: Array) -> Array:
    """Σ (2i+1)·word_i mod 2³² over the words of an array, [] uint32.

    Integer arithmetic makes it independent of summation order, and so of the mesh; odd factors detect any change of
    a single word; distinct factors detect swapped words.
    """
    array = array.astype(jnp.uint8) if array.dtype == jnp.bool_ else array
    array = jax.device_put(array, jax.memory.Space.Device)  # an optimizer's array may be in host memory
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    number, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        number += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    return jnp.sum(bits * (2 * number + 1), dtype=jnp.uint32)


def checksums(tree: Any) -> dict[str, int]:
    """Key path → checksum of every array of a tree, with elements of 8 to 32 bits; the same on every mesh."""
    leaves = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if leaf is not UNREAD]
    with jax.set_mesh(NO_MESH):
        sums = [_checksum(leaf) for _, leaf in leaves]  # all are dispatched before one is waited for
    return {jax.tree_util.keystr(path): int(value) for (path, _), value in zip(leaves, sums, strict=True)}


def compare(saved: dict[str, int], tree: Any) -> None:
    """Raise DamagedError if an array of the tree differs from its saved checksum."""
    differing = [name for name, value in checksums(tree).items() if saved.get(name, value) != value]
    if differing:
        raise DamagedError(f"{len(differing)} arrays differ from what was saved, the first is {differing[0]}")


@contextlib.contextmanager
def unreadable_as_damaged() -> Iterator[None]:
    """Turn errors caused by the content of a file into DamagedError; I/O and memory errors pass unchanged."""
    try:
        yield
    except (ConfigError, DamagedError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        missing = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
        if isinstance(error, OSError) and not isinstance(error, missing):
            raise
        raise DamagedError(first_line(error)) from error


@jax.jit
def _is_finite(arrays: list[Array]) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(array)) for array in arrays]))


def is_finite(tree: Any) -> bool:
    """True if no number of a tree of arrays is infinite or NaN."""
    return bool(_is_finite(jax.tree.leaves(tree)))


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silence Orbax's warnings about read-only managers and items that are not arrays, both intended."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)
