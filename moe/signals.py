"""Stop signals, and the exit codes that answer them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

#: Exit code of a run that wants to be started again with the same command: sysexits.h's "try again later".
START_AGAIN = os.EX_TEMPFAIL  # 75


#: Exit code after Ctrl-C, as shells have it: nobody should start the run again by himself.
INTERRUPTED = 128 + signal.SIGINT  # 130


class Stopped(SystemExit):
    """The run ends before its last step and nothing is wrong: ``code`` is START_AGAIN or INTERRUPTED."""

    def __init__(self, code: int, reason: str):
        super().__init__(code)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class StopSignals:
    """Turns SIGTERM and the first Ctrl-C into a question that the loop asks at the end of each step.

    As a context manager it puts the handlers in place, and the old ones back. Outside of the loop there is nothing to
    save: the signal ends the run at once. In a run of several processes JAX's preemption service has SIGTERM, tells
    the other processes, and names one step at which all of them stop; Ctrl-C stays what it is.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._waiting = False
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self._waiting or self._received is not None:  # a second one does not wait either
            raise Stopped(self._code(number), f"stopped by {signal.Signals(number).name}")
        self._received = number

    @contextlib.contextmanager
    def at_steps(self) -> Iterator[None]:
        """From here on signals wait for :meth:`due`."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def due(self, step: int) -> Stopped | None:
        """At the end of every step, in every process: what to raise once a checkpoint of this step is on disk."""
        if jax.process_count() > 1:
            if multihost_utils.reached_preemption_sync_point(step):
                return Stopped(START_AGAIN, "stopped by a preemption notice")
        elif self._received is not None:
            return Stopped(self._code(self._received), f"stopped by {signal.Signals(self._received).name}")
        return None

    @staticmethod
    def _code(number: int) -> int:
        return INTERRUPTED if number == signal.SIGINT else START_AGAIN
