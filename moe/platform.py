"""Process settings that must be made before JAX is imported: the memory allocator and TPU compilation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb=1"
_JEMALLOC = "libjemalloc.so.2"
_JEMALLOC_CONF = "dirty_decay_ms:-1,muzzy_decay_ms:-1,thp:always"


def use_allocator() -> None:
    """Restart this program once with an allocator that keeps freed memory: jemalloc if installed, else glibc with huge
    pages. Linux only.

    XLA on CPU allocates every large buffer anew. glibc returns freed buffers to the system, so every step faults its
    pages in again, 4 KiB at a time without huge pages: a fifth of a train step, half of a wide MoE layer. jemalloc is
    configured to return nothing. The allocator is fixed when a program starts, hence the restart.

    The user's choice has priority: a set LD_PRELOAD, even empty, excludes jemalloc; GLIBC_TUNABLES with hugetlb
    excludes both; MALLOC_CONF overrides the options set here.
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
    """True if Python starts with these variables without a message of the loader: the library can be loaded."""
    probe = subprocess.run(
        [sys.executable, "-ISc", ""], env=os.environ | variables, capture_output=True, stdin=subprocess.DEVNULL
    )
    return probe.returncode == 0 and not probe.stderr


def _huge_page_mode() -> str:
    """Linux's setting for transparent huge pages: always, madvise (on request) or never."""
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return modes.read_text().partition("[")[2].partition("]")[0] if modes.exists() else "never"


def allocator() -> str:
    """Description of the allocator in use, for benchmark output, such as "jemalloc, huge pages on"."""
    jemalloc = "jemalloc" in os.environ.get("LD_PRELOAD", "")
    requested = (
        "thp:always" in os.environ.get("MALLOC_CONF", "")
        if jemalloc
        else _TUNABLE in os.environ.get("GLIBC_TUNABLES", "")
    )
    on = {"always": True, "madvise": requested}.get(_huge_page_mode(), False)
    return f"{'jemalloc' if jemalloc else 'the system allocator'}, huge pages {'on' if on else 'off'}"


def use_tpu_compiler() -> None:
    """Set up this process to compile for absent TPUs and to run on CPU.

    Otherwise libtpu queries the cloud for its TPU type, and takes a lock that prevents a second compilation.
    """
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5p-8",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
