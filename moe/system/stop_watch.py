"""End of a program by SIGTERM or SIGINT while its main thread is inside of a library, as while XLA compiles.

Python runs the handler of a signal in the main thread, between two of its own instructions, so a compiler that runs for
minutes delays it by minutes. The system's handler also writes the signal's number to a socket at once
(``signal.set_wakeup_fd``), which a handler that defers the signal empties (:meth:`StopWatch.acknowledge`). A thread
looks at the socket: a signal that stays there for :data:`PATIENCE` seconds ends the process, or does so as soon as no
work is unfinished (:meth:`StopWatch.unfinished`). A handler that raises leaves the signal there, which so bounds what
follows: ``finally`` blocks, other threads, and the functions of libraries at the interpreter's exit.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from moe.system.exit_codes import after_signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

#: Seconds in which the main thread should react to a signal.
PATIENCE = 4.0
_INTERVAL = 0.2


class StopWatch:
    """Unanswered stop signals of this process, and the work that must be finished before one ends it."""

    def __init__(self) -> None:
        self._reader: socket.socket | None = None  # opened by start, after the standard streams have their descriptors
        self._unfinished: list[Callable[[], bool]] = []
        self._farewells: list[Callable[[int], object]] = []
        # Held while the process ends, so that no handler lets the main thread begin new work then. Reentrant, since a
        # second signal may arrive while the first one's handler holds it.
        self._ending = threading.RLock()

    def start(self) -> None:
        """Watch from now on; called once, in the main thread, where handlers call :meth:`acknowledge`."""
        self._reader, writer = socket.socketpair()
        for side in (self._reader, writer):
            side.setblocking(False)
        signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are its own
        atexit.register(self._skip_shutdown)  # before the libraries' own functions, and so called after them
        threading.Thread(target=self._watch, args=(self._reader,), name="stop signals", daemon=True).start()

    def acknowledge(self) -> None:
        """Forget the signals so far: a handler has taken note of them, to end the program later."""
        if self._reader is None:
            return
        with self._ending, contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)

    def unanswered(self) -> list[int]:
        """Numbers of the stop signals that no handler has acknowledged, oldest first."""
        if self._reader is None:
            return []
        try:
            numbers = self._reader.recv(4096, socket.MSG_PEEK)
        except BlockingIOError:
            return []
        found: list[int] = [number for number in numbers if number in STOP_SIGNALS]
        if not found:  # other signals with a handler, which nobody acknowledges
            self._reader.recv(len(numbers))
        return found

    @contextlib.contextmanager
    def unfinished(self, check: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Work that no signal may cut short within this context, such as the writing of a file.

        Args:
            check: returns whether some of it is left.
        """
        self._unfinished.append(check)
        try:
            yield
        finally:
            self._unfinished.remove(check)

    @contextlib.contextmanager
    def farewell(self, say: Callable[[int], object]) -> Iterator[None]:
        """Call ``say(exit code)`` before an unanswered signal ends the process within this context."""
        self._farewells.append(say)
        try:
            yield
        finally:
            self._farewells.remove(say)

    def _watch(self, reader: socket.socket) -> NoReturn:
        waited = 0.0
        while True:
            select.select([reader], [], [])
            time.sleep(_INTERVAL)
            waited = waited + _INTERVAL if self.unanswered() else 0.0
            if waited >= PATIENCE:
                self._end_unless_unfinished()

    def _end_unless_unfinished(self) -> None:
        with self._ending:
            numbers = self.unanswered()
            if not numbers or any(check() for check in tuple(self._unfinished)):
                return
            for say in tuple(self._farewells):
                say(after_signal(numbers[-1]))
            end(numbers[-1])

    def _skip_shutdown(self) -> None:
        """End a process that a signal stops before the interpreter destroys the objects of libraries, which may wait
        for their own threads while this one's no longer runs."""
        if numbers := self.unanswered():
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(after_signal(numbers[-1]))


def end(number: int) -> NoReturn:
    """End the process at once with the exit code of a stop signal."""
    with contextlib.suppress(OSError):
        if select.select([], [2], [], 0)[1]:  # else nobody reads the pipe behind standard error
            os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
    os._exit(after_signal(number))


#: The watch of this process.
STOP_WATCH = StopWatch()
