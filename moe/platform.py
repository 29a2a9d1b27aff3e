"""What must be settled before JAX starts: the allocator, and how processes find each other.

Called first by every entry point, before anything imports JAX.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb=1"
_JEMALLOC = "libjemalloc.so.2"
_JEMALLOC_CONF = "dirty_decay_ms:-1,muzzy_decay_ms:-1,thp:always"


def use_allocator() -> None:
    """Restarts this program once with memory that stays: jemalloc where Linux has it, else glibc with huge pages.

    XLA on CPU allocates every large buffer afresh. glibc returns them to the system, so that each step faults all
    its pages in again, and without huge pages 4 KiB at a time: a fifth of a train step, half of a wide MoE layer.
    jemalloc is told to return nothing. An allocator is chosen when a program starts, hence the restart.

    Does nothing where there is nothing to gain (another system; neither jemalloc nor huge pages on demand), and leaves
    what the user chose: LD_PRELOAD, even empty, keeps jemalloc out, a word of huge pages in GLIBC_TUNABLES both;
    MALLOC_CONF goes after what is asked here, and so above it.
    """
    tunables, preload = os.environ.get("GLIBC_TUNABLES", ""), os.environ.get("LD_PRELOAD")
    if sys.platform != "linux" or "glibc.malloc.hugetlb" in tunables or "jemalloc" in (preload or ""):
        return
    options = ",".join(filter(None, (_JEMALLOC_CONF, os.environ.get("MALLOC_CONF"))))
    jemalloc = {"LD_PRELOAD": _JEMALLOC, "MALLOC_CONF": options}
    if preload is None and _starts(jemalloc):
        os.environ.update(jemalloc)
    elif _huge_page_mode() == "madvise":
        os.environ["GLIBC_TUNABLES"] = f"{tunables}:{_TUNABLE}" if tunables else _TUNABLE
    else:
        return
    os.execv(sys.executable, sys.orig_argv)


def _starts(variables: dict[str, str]) -> bool:
    """Whether Python starts under these variables, and the loader has nothing to say: the library is here and fits."""
    probe = subprocess.run(
        [sys.executable, "-ISc", ""], env=os.environ | variables, capture_output=True, stdin=subprocess.DEVNULL
    )
    return probe.returncode == 0 and not probe.stderr


def _huge_page_mode() -> str:
    """always, madvise (on demand) or never."""
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return modes.read_text().partition("[")[2].partition("]")[0] if modes.exists() else "never"


def allocator() -> str:
    """Whose memory this program runs with, for what benchmarks print: "jemalloc, huge pages on"."""
    jemalloc = "jemalloc" in os.environ.get("LD_PRELOAD", "")
    asked = (
        "thp:always" in os.environ.get("MALLOC_CONF", "")
        if jemalloc
        else _TUNABLE in os.environ.get("GLIBC_TUNABLES", "")
    )
    on = {"always": True, "madvise": asked}.get(_huge_page_mode(), False)
    return f"{'jemalloc' if jemalloc else 'the system allocator'}, huge pages {'on' if on else 'off'}"


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
