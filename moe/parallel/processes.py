"""Runs of several processes."""

from __future__ import annotations

import os

import jax

from moe.config import ConfigError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join_processes() -> None:
    """Connect this process to the others of its run, as described by the environment.

    On TPU pods, under SLURM and under Open MPI, JAX finds the other processes. Elsewhere JAX_COORDINATOR_ADDRESS
    (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set.

    Raises:
        ConfigError: the environment describes no cluster.
    """
    address, count, index = (os.environ.get(name) for name in _VARIABLES)
    try:
        if address is None:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(address, int(count or ""), int(index or ""))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--distributed: no cluster found ({str(error).splitlines()[0]}); this works on TPU pods, under SLURM or "
            f"Open MPI, or with {', '.join(_VARIABLES)} set"
        ) from error
