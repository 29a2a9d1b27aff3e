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
    """Raise ConfigError if the training state and one layer's activations exceed its devices' memory; allocate nothing.

    The devices of a CPU share the machine's memory.
    """
    devices, config = program.mesh.local_devices, program.config

    def size(leaf: jax.ShapeDtypeStruct) -> int:
        return int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=object)) * leaf.dtype.itemsize

    # Activations [B,T,D] of a microbatch and their gradient.
    activations = 2 * size(program.batch["tokens"]) * config.model.d_model // config.train.accumulation_steps
    needed = sum(map(size, jax.tree.leaves(program.state))) + activations
    if devices[0].platform == "cpu":
        needed *= len(devices)
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        available = (devices[0].memory_stats() or {}).get("bytes_limit", needed)
    if needed > available:
        raise ConfigError(
            f"model: training state and activations need {needed / 2**30:,.1f} GiB where there are "
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
