"""Checksums of saved arrays, and the error for checkpoints that cannot be read or differ from what was saved.

TensorStore's own checksums cover its index, not the numbers: a flipped bit in an array is read as another number.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from jax import Array

from moe.config import ConfigError
from moe.system.atomic_files import first_line, from_checked_json

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


#: Words that :func:`partial_checksum` computes with at once.
_BLOCK = 1 << 22


def partial_checksum(part: np.ndarray, start: int) -> int:
    """Summand of the checksum of an array that one part of it gives.

    Args:
        part: elements that lie one after another in the array, in C order.
        start: index of the first of them among all elements.
    """
    words = np.ascontiguousarray(part).reshape(-1).view(f"uint{8 * part.dtype.itemsize}")
    total = 0
    for first in range(0, words.size, _BLOCK):
        block = words[first : first + _BLOCK].astype(np.uint32)
        factors = np.uint32(2 * (start + first) % 2**32 + 1) + np.arange(0, 2 * block.size, 2, dtype=np.uint32)
        total += int(np.sum(block * factors, dtype=np.uint32))
    return total % 2**32


def _is_on_host(array: Array | np.ndarray) -> bool:
    """Whether NumPy reads an array where it is: its own ones, and those of CPUs of this process."""
    if not isinstance(array, jax.Array):
        return True
    return array.is_fully_addressable and {device.platform for device in array.devices()} == {"cpu"}


def checksums(tree: Any) -> dict[str, int]:
    """Key path → checksum of every array of a tree, with elements of 8 to 32 bits; the same on every mesh.

    Without a program where NumPy reads the arrays: one for each shape would be compiled.
    """
    leaves = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if leaf is not UNREAD]
    with jax.set_mesh(NO_MESH):  # all programs are dispatched before one is waited for
        sums = [partial_checksum(np.asarray(leaf), 0) if _is_on_host(leaf) else _checksum(leaf) for _, leaf in leaves]
    return {jax.tree_util.keystr(path): int(value) for (path, _), value in zip(leaves, sums, strict=True)}


#: File of a checkpoint with its checksums and the loop's JSON, as Orbax's handler of JSON writes it.
MEMORY = "memory/metadata"


def saved_checksums(workdir: epath.Path, step: int) -> dict[str, int] | None:
    """Checksums of a checkpoint; None for one without, as earlier versions wrote for imports and averages.

    Raises:
        DamagedError: they cannot be read.
    """
    path = workdir / "checkpoints" / str(step) / MEMORY
    with unreadable_as_damaged():
        return from_checked_json(json.loads(path.read_text())["sealed"])["checksums"] if path.exists() else None


def compare(saved: dict[str, int], tree: Any) -> None:
    """Raise DamagedError if an array of the tree differs from its saved checksum, or has none."""
    differing = [name for name, value in checksums(tree).items() if saved.get(name) != value]
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
