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
            jax.distributed.initialize(local_device_ids=_gpus_of_only_process())
        else:
            jax.distributed.initialize(address, int(count or ""), int(index or ""))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--distributed: no cluster found ({str(error).splitlines()[0]}); this works on TPU pods, under SLURM or "
            f"Open MPI, or with {', '.join(_VARIABLES)} set"
        ) from error


def _gpus_of_only_process() -> list[int] | None:
    """Ids of the node's GPUs if SLURM or Open MPI started one process on it; None where JAX's own choice is right.

    JAX takes one GPU per process under these launchers, the one with the process's number on its node.
    """
    environment = os.environ
    slurm = environment.get("SLURM_NTASKS"), environment.get("SLURM_STEP_NUM_NODES")
    alone = (None not in slurm and slurm[0] == slurm[1]) or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    if not alone or "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    count = len(visible.split(",")) if visible else int(environment.get("SLURM_GPUS_ON_NODE", "0"))
    return list(range(count)) or None
