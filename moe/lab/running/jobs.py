"""Several processes of one command, each pinned to a CPU core of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from moe.config import ConfigError

#: Set in the environment of the processes that :func:`start` starts.
WORKER = "MOE_LAB_WORKER"


def start(count: int) -> None:
    """Run this program's command without --jobs in ``count`` processes, and wait for them.

    Raises:
        ConfigError: fewer cores than processes, or a process failed.
    """
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        raise ConfigError(f"--jobs={count}: at most the {len(cores)} cores that this process may use")
    arguments = [argument for argument in sys.orig_argv[1:] if not argument.lstrip("-").startswith("jobs")]
    jobs = []
    try:
        for core in cores[:count]:
            os.sched_setaffinity(0, {core})  # inherited by the process started next
            jobs.append(subprocess.Popen([sys.executable, *arguments], env=os.environ | {WORKER: "1"}))
    finally:
        os.sched_setaffinity(0, cores)
    if any([job.wait() for job in jobs]):
        raise ConfigError(f"--jobs={count}: a process failed; the same command goes on with what is missing")


def is_worker() -> bool:
    """True in a process that :func:`start` started: it trains and leaves the report to the first process."""
    return WORKER in os.environ
