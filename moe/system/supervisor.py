"""Parent of one process of a distributed run, which ends it with one sentence and exit code 75 if a host is lost.

JAX's coordination service notices a process that is gone, or that stands still, by missed heartbeats. It then aborts
all others (SIGABRT) with a C++ stack, and a frozen process cannot end itself. So ``main.py --distributed`` runs the
training in a child process; this module passes signals to it, shows what it writes, and turns its end into an exit
code.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from types import FrameType

from moe.system.exit_codes import START_AGAIN
from moe.system.stop_watch import STOP_SIGNALS, STOP_WATCH

#: Environment variable with the descriptor to which a supervised process writes a sign of life every second.
_VARIABLE = "MOE_SIGNS_OF_LIFE"
_SECOND = 1.0
_PR_SET_PDEATHSIG = 1

#: First lines of what JAX writes when the coordination service reports a lost process.
_LOST = re.compile(rb"coordination_service\w*\.cc:\d+\]|preemption_sync_manager\.cc:\d+\]|client\.h:\d+\] Terminating")
_NUMBERS = re.compile(rb"stopped sending heartbeats\):\s*\n((?:[\d, ]+\n)+)")
_AGAIN = "run the same command again: it continues from the newest checkpoint"


def supervise(timeout: float) -> None:
    """Run this program in a child process and exit as it does; return only in that child.

    Args:
        timeout: seconds without a sign of life after which the child counts as frozen, and is killed.
    """
    descriptor = os.environ.pop(_VARIABLE, None)
    if descriptor is not None:
        threading.Thread(target=_show_life, args=(int(descriptor),), name="signs of life", daemon=True).start()
        return
    reader, writer = os.pipe()
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=os.environ | {_VARIABLE: str(writer)},
        pass_fds=(writer,),
        stderr=subprocess.PIPE,
        start_new_session=True,  # a terminal's Ctrl-C reaches this process only, which passes it on once
    )
    os.close(writer)
    _pass_signals_to(child)
    sys.exit(_Supervisor(child, reader, timeout).follow())


def _show_life(descriptor: int) -> None:
    """Write to the supervisor every second; end with it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    while True:
        try:
            os.write(descriptor, b".")
        except OSError:  # the supervisor is gone
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(_SECOND)


def _pass_signals_to(child: subprocess.Popen[bytes]) -> None:
    """Send each stop signal of this process to the child, which decides what it means."""

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        STOP_WATCH.acknowledge()
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)

    for number in STOP_SIGNALS:
        signal.signal(number, handle)


class _Supervisor:
    """A child process, what it writes, and when it last showed a sign of life.

    Args:
        child: the process; its standard error is a pipe.
        signs: descriptor of the pipe of its signs of life.
        timeout: seconds without one after which it counts as frozen.
    """

    def __init__(self, child: subprocess.Popen[bytes], signs: int, timeout: float) -> None:
        assert child.stderr is not None
        self._child = child
        self._signs = signs
        self._errors = child.stderr.fileno()
        self._timeout = timeout
        self._last_sign: float | None = None  # none until the child has imported what it needs
        self._line = b""
        self._held: list[bytes] = []  # lines from the first that reports a lost process

    def follow(self) -> int:
        """Show what the child writes until it ends; return the exit code for this process."""
        with selectors.DefaultSelector() as selector:
            for descriptor in (self._signs, self._errors):
                os.set_blocking(descriptor, False)
                selector.register(descriptor, selectors.EVENT_READ)
            while self._child.poll() is None:
                for key, _ in selector.select(_SECOND):
                    if self._read(key.fd) == b"":
                        selector.unregister(key.fd)
                if self._is_frozen():
                    self._child.kill()
                    self._child.wait()
                    self._show(self._line)
                    return _say(f"this process stood still for {self._timeout:g} s (train.host_timeout) and was ended")
        while self._read(self._errors):
            pass
        return self._outcome(self._child.returncode)

    def _read(self, descriptor: int) -> bytes | None:
        """Read what a pipe holds: None for nothing yet, b"" at its end."""
        try:
            data = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return None
        if descriptor == self._signs:
            self._last_sign = time.monotonic()
        else:
            *lines, self._line = re.split(rb"(?<=[\r\n])", self._line + data)
            for line in lines:
                self._show(line)
        return data

    def _show(self, line: bytes) -> None:
        """Show a line of the child's errors, unless a lost process has been reported."""
        if self._held or _LOST.search(line):
            self._held.append(line)
            return
        sys.stderr.flush()
        with contextlib.suppress(OSError):
            os.write(2, line)

    def _is_frozen(self) -> bool:
        return self._last_sign is not None and time.monotonic() - self._last_sign > self._timeout

    def _outcome(self, code: int) -> int:
        """Exit code for the child's; says which process was lost."""
        self._show(self._line)
        report = b"".join(self._held)
        if code == -signal.SIGABRT and report:
            numbers = _NUMBERS.search(report)
            lost = " ".join(numbers[1].decode().split()) if numbers else ""
            name = f"process {lost}" if lost else "process 0, which coordinates the others,"
            return _say(f"{name} of this run was lost")
        with contextlib.suppress(OSError):
            os.write(2, report)
        return code if code >= 0 else 128 - code


def _say(reason: str) -> int:
    """Say why the run ends, and that it can go on; return the exit code."""
    sys.stderr.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"error: {reason}; {_AGAIN}\n".encode())
    return START_AGAIN
