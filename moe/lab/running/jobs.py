"""Several processes of one command, each pinned to a CPU core of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import filelock

from moe.config import ConfigError
from moe.system.exit_codes import START_AGAIN, after_signal
from moe.system.stop_watch import STOP_WATCH

#: Set in the environment of the processes that :func:`start` starts.
WORKER = "MOE_LAB_WORKER"


def start(count: int, arguments: Sequence[str]) -> None:
    """Run Python with these arguments in ``count`` processes, and wait for them.

    Cores that another command's processes are pinned to are taken last.

    Raises:
        ConfigError: fewer cores than processes, or a process failed.
        SystemExit: processes were stopped by SIGTERM or Ctrl-C, once all have ended; with their exit code.
    """
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        raise ConfigError(f"--jobs={count}: at most the {len(cores)} cores that this process may use")
    jobs: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        STOP_WATCH.acknowledge()
        # The first Ctrl-C reaches the whole process group by itself, and a second signal would keep a run from saving.
        if number == signal.SIGTERM or received:
            _terminate(jobs)
        received.append(number)

    numbers = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, stop) for number in numbers}
    taken = contextlib.ExitStack()
    try:
        for core in _free_first(cores, count, taken):
            if received:
                break
            os.sched_setaffinity(0, {core})  # inherited by the process started next
            jobs.append(subprocess.Popen([sys.executable, *arguments], env=os.environ | {WORKER: "1"}))
        if received:  # perhaps before the newest process was in the list
            _terminate(jobs)
        codes = {job.wait() for job in jobs} - {0}
    except BaseException:  # a process could not be started
        _terminate(jobs)
        for job in jobs:
            job.wait()
        raise
    finally:
        taken.close()
        os.sched_setaffinity(0, cores)
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received or codes == {START_AGAIN}:
        raise SystemExit(after_signal(received[0]) if received else START_AGAIN)
    if codes:
        raise ConfigError(f"--jobs={count}: a process failed; the same command goes on with what is missing")


def _terminate(jobs: Sequence[subprocess.Popen[bytes]]) -> None:
    for job in jobs:
        job.terminate()


def _free_first(cores: Sequence[int], count: int, taken: contextlib.ExitStack) -> list[int]:
    """``count`` cores, those first that no command of this user's has taken; they are taken until ``taken`` closes."""
    free: list[int] = []
    for core in cores:
        name = f"moe_lab_{os.getuid()}_core_{core}.lock"
        with contextlib.suppress(filelock.Timeout):
            if len(free) < count:
                taken.enter_context(filelock.FileLock(Path(tempfile.gettempdir()) / name, blocking=False))
                free.append(core)
    return [*free, *(core for core in cores if core not in free)][:count]


def is_worker() -> bool:
    """True in a process that :func:`start` started: it trains and leaves the report to the first process."""
    return WORKER in os.environ
