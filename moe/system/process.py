"""Settings of a process: streams, stop signals, environment, memory allocator; most before JAX is imported."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from moe.system.escaping import terminal
from moe.system.exit_codes import after_signal
from moe.system.stop_watch import STOP_SIGNALS, STOP_WATCH, end

_TUNABLE = "glibc.malloc.hugetlb=1"
_JEMALLOC = "libjemalloc.so.2"
_JEMALLOC_CONF = "dirty_decay_ms:-1,muzzy_decay_ms:-1,thp:always"


_IMPORTED = time.monotonic()  # the start of the process where there is no /proc


#: Flags that print something and end the program.
_SHOWS = ("help", "helpshort", "helpfull", "h", "?", "version")


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether a command line asks only for its help, or the version."""
    return any(word.lstrip("-").partition("=")[0] in _SHOWS for word in argv[1:] if word.startswith("-"))


def prepare() -> None:
    """Set up this process; entry points call it before importing anything that imports JAX. May restart the program."""
    if asks_for_help(sys.argv):
        return
    _open_standard_streams()
    _exit_on_stop_signals()
    _check_environment()
    use_allocator()
    STOP_WATCH.start()


def _open_standard_streams() -> None:
    """Open closed standard streams on /dev/null, so that no file of a run gets the descriptor of stderr."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            setattr(sys, name, open(descriptor, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115


class _TolerantStream:
    """Stream whose write errors are ignored: a full disk or a closed pipe behind stderr must not end a run."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _PlainStream(_TolerantStream):
    """Stream that escapes control characters in text of documents and models."""

    def write(self, text: str) -> int:
        self._stream.write(terminal(text))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def harden_streams() -> None:
    """Escape controls, and characters that the terminal's encoding lacks; ignore write errors of stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = _PlainStream(sys.stdout)
    sys.stderr = _TolerantStream(sys.stderr)  # a progress bar's controls are its own


@contextlib.contextmanager
def closed_output_exits() -> Iterator[None]:
    """Exit silently where the reader of standard output is gone, as in ``| head``."""
    try:
        yield
    except BrokenPipeError:
        # What is still buffered would raise again when Python flushes it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)


def _exit_on_stop_signals() -> None:
    """End the program at once on SIGTERM (75) or SIGINT (130) while it starts, when there is nothing to clean up."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # blocked by the restart in use_allocator


def _exit(number: int, frame: FrameType | None) -> None:
    del frame
    end(number)


def raise_on_stop_signals() -> None:
    """From here on, SIGTERM and SIGINT raise SystemExit with the same codes, so that ``finally`` blocks run.

    Python discards an exception raised inside a destructor or a weak reference's callback, where a signal may arrive
    like anywhere else; the signal is then sent again.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is _exit:
            signal.signal(number, _raise)
            if getattr(sys.unraisablehook, "func", None) is not _send_again:  # not installed by an earlier call
                sys.unraisablehook = functools.partial(_send_again, sys.unraisablehook)


def _send_again(report: Callable[[sys.UnraisableHookArgs], object], discarded: sys.UnraisableHookArgs) -> None:
    """Repeat the signal behind a discarded SystemExit, once the destructor has returned; report other exceptions that
    say something."""
    error = discarded.exc_value
    for number in STOP_SIGNALS:
        if isinstance(error, SystemExit) and error.code == after_signal(number):
            timer = threading.Timer(0.1, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()
            return
    if str(error) != "Event loop is closed":  # of TensorStore, late, after an array could not be read
        report(discarded)


def _raise(number: int, frame: FrameType | None) -> None:
    del frame
    raise SystemExit(after_signal(number))  # unacknowledged: the watch bounds the time until the exit


def _check_environment() -> None:
    """Refuse 64-bit mode and a current directory that is gone, and write figures without a display."""
    try:
        os.getcwd()
    except FileNotFoundError:
        sys.exit("error: the current directory was deleted; change to another one")
    value = os.environ.get("JAX_ENABLE_X64", "0")
    if value.lower() not in ("0", "false", "f", "no", "n", "off"):
        sys.exit(f"error: JAX_ENABLE_X64={value!r}: must be unset or 0, because this program computes in 32 bits")
    os.environ["MPLBACKEND"] = "Agg"


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
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until the restarted program has its handlers
    try:
        os.execv(sys.executable, sys.orig_argv)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


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


def seconds_running() -> float:
    """Seconds since this process started, its restart by :func:`use_allocator` included."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.monotonic() - _IMPORTED
    # Field 22 is the start in clock ticks after boot; field 2, in parentheses, may hold spaces.
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def use_tpu_compiler() -> None:
    """Set up this process as :func:`prepare` does, but for the allocator, to compile for absent TPUs or GPUs on CPU.

    Otherwise libtpu queries the cloud for its TPU type, and takes a lock that prevents a second compilation.
    """
    _open_standard_streams()
    _exit_on_stop_signals()
    STOP_WATCH.start()
    _check_environment()
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5p-8",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
