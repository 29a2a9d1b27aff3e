"""Stop signals of a run."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

from moe.exit_codes import START_AGAIN, after_signal


class Stopped(SystemExit):
    """A run stopped by a signal, without an error; ``code`` is one of :mod:`moe.exit_codes`."""

    def __init__(self, code: int, reason: str):
        super().__init__(code)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class StopSignals:
    """Handlers that defer SIGTERM and the first Ctrl-C to the end of a train step; a context manager.

    Outside the training loop a signal ends the run at once, because there is nothing to save. In a run of several
    processes, JAX's preemption service handles SIGTERM and chooses one step at which all processes stop; Ctrl-C keeps
    Python's default.
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
        if not self._waiting or self._received is not None:  # a second signal is not deferred
            raise Stopped(after_signal(number), f"stopped by {signal.Signals(number).name}")
        self._received = number

    @contextlib.contextmanager
    def at_steps(self) -> Iterator[None]:
        """Defer signals to :meth:`due` within this context."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def due(self, step: int) -> Stopped | None:
        """Return the exception to raise after saving this step, if any; call it after every step in every process."""
        if jax.process_count() > 1:
            if multihost_utils.reached_preemption_sync_point(step):
                return Stopped(START_AGAIN, "stopped by a preemption notice")
        elif self._received is not None:
            return Stopped(after_signal(self._received), f"stopped by {signal.Signals(self._received).name}")
        return None
