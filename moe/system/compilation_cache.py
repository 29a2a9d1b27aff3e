"""JAX's persistent compilation cache: compiled programs kept on disk between starts."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

import jax

from moe.system.atomic_files import in_bucket

#: Folder of runs of one process under ``train.compilation_cache=auto``.
DEFAULT = "~/.cache/moe-data/jax"

#: JAX's settings, each used unless its environment variable is set: the shortest compile time of a program that is
#: kept, in seconds, and the size in bytes above which the least recently used programs are deleted.
_SETTINGS = {"jax_persistent_cache_min_compile_time_secs": 0.3, "jax_compilation_cache_max_size": 8 * 2**30}


def use(folder: str, workdir: str) -> None:
    """Keep compiled programs in a folder from now on; if it cannot be used, print one line on stderr.

    Args:
        folder: ``train.compilation_cache``: a folder, "" for none, or "auto". In a run of several processes process 0
            writes and all must find the same programs, so "auto" is then a folder of the workdir, which all see.
        workdir: of the run.
    """
    if not folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or not jax.config.jax_enable_compilation_cache:
        return  # the user chose, perhaps by JAX's own settings
    # Programs of several CPU devices are not kept: read back, their all-reduces may wait for each other until XLA
    # aborts (jaxlib 0.12.0.1, 8 fake devices, tests/lab/test_lab_running.py with JAX_COMPILATION_CACHE_DIR set).
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        return
    if folder == "auto":
        folder = DEFAULT if jax.process_count() == 1 else os.path.join(workdir, "programs")
    path = os.path.join(os.path.expanduser(folder), f"{jax.default_backend()}-{_machine()}")
    try:
        if not in_bucket(path):
            Path(path).mkdir(parents=True, exist_ok=True)
            if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError("no permission to read and write it")
    except OSError as error:
        print(f"no compilation cache in {path}: {error.strerror or error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", path)
    for name, value in _SETTINGS.items():
        # Deleting old programs needs a lock, which a bucket does not have.
        if name.upper() not in os.environ and not (name.endswith("max_size") and in_bucket(path)):
            jax.config.update(name, value)


def _machine() -> str:
    """Name of this kind of machine: CPU programs depend on its instruction set, which JAX's keys do not include."""
    if jax.default_backend() != "cpu":
        return platform.machine()
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else [platform.processor()]
    features = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0] if lines else "")
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
