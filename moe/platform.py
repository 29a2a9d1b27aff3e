"""What must be settled before JAX starts: memory pages, and the paths of the repository.

Called first by every entry point, before anything imports JAX.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb=1"


def use_huge_pages() -> None:
    """Restarts this program once with glibc's allocator asking for huge pages, where Linux offers them on demand.

    XLA on CPU allocates large buffers afresh; with ordinary pages they fault in 4 KiB at a time, which costs a train
    step a fifth and a wide MoE layer half of its time. glibc reads the setting only when a program starts. Does
    nothing elsewhere, or if GLIBC_TUNABLES already says something of huge pages (0 keeps them off).
    """
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" in tunables or not modes.exists() or "[madvise]" not in modes.read_text():
        return
    os.environ["GLIBC_TUNABLES"] = f"{tunables}:{_TUNABLE}" if tunables else _TUNABLE
    os.execv(sys.executable, sys.orig_argv)


def huge_pages() -> bool:
    """Whether this program runs with them."""
    return _TUNABLE in os.environ.get("GLIBC_TUNABLES", "")


def use_tpu_compiler() -> None:
    """Lets this process compile for TPUs that are not here, and run nothing on those that may be.

    libtpu otherwise asks the cloud which TPU it is on, and holds a lock that keeps a second compilation out.
    """
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5p-8",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


#: KiB of a core's vector memory that one fusion may use, by the first words of the device kind, the first that fits.
_SCOPED_VMEM_KIB = {"TPU v5 lite": 65536, "TPU v5": 32768, "TPU v6": 98304, "TPU7": 49152}


def compiler_options(device_kind: str) -> dict[str, str]:
    """What XLA is told beside the program for a kind of device, as JAX names it; nothing for what is no TPU.

    With the vector memory that it takes by default, XLA cuts a large matmul into windows so small that its operands
    stream in again and again, with what is fused into them computed again. And all-to-alls that other work can be done
    beside are started and awaited apart. docs/performance.md has the estimates.
    """
    if not device_kind.startswith("TPU"):
        return {}
    options = {"xla_tpu_enable_async_all_to_all": "true"}
    for name, kibibytes in _SCOPED_VMEM_KIB.items():
        if device_kind.startswith(name):
            return options | {"xla_tpu_scoped_vmem_limit_kib": str(kibibytes)}
    return options


def join_processes() -> None:
    """Makes this process one of a run of several, as the environment describes it.

    On TPU pods, under SLURM and under Open MPI, JAX finds the others by itself. Elsewhere JAX_COORDINATOR_ADDRESS
    (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say who they are.

    Raises:
        ConfigError: nothing in the environment says so.
    """
    import jax

    from moe.config import ConfigError

    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, index = (os.environ.get(name) for name in names)
    try:
        if address is None:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(address, int(count or ""), int(index or ""))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--distributed: no cluster found ({str(error).splitlines()[0]}); this works on TPU pods, under SLURM or "
            f"Open MPI, or with {', '.join(names)} set"
        ) from error
