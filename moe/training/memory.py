"""Refusal of runs that do not fit in memory, in one sentence instead of a crash."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import jax
import numpy as np

from moe.config import ConfigError
from moe.training.step import Program

_REMEDY = "a smaller model or train.batch_size, more devices, or model.remat=full need less"


def refuse_too_large(program: Program) -> None:
    """Raise ConfigError if the training state alone is larger than the memory of its devices; allocates nothing.

    The devices of a CPU share the machine's memory.
    """
    devices = program.mesh.local_devices
    needed = sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=object)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(program.state)
    )
    if devices[0].platform == "cpu":
        needed *= len(devices)
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        available = (devices[0].memory_stats() or {}).get("bytes_limit", needed)
    if needed > available:
        raise ConfigError(
            f"model: parameters and optimizer state need {needed / 2**30:,.1f} GiB where there are "
            f"{available / 2**30:,.1f} GiB; {_REMEDY}"
        )


@contextlib.contextmanager
def out_of_memory_as_config_error() -> Iterator[None]:
    """Turn the devices' out-of-memory errors into ConfigError."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ConfigError(f"model: does not fit in memory; {_REMEDY}") from error
