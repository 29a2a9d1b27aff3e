"""Stop signals of a run, and the common end of its processes."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from moe.system.escaping import terminal
from moe.system.exit_codes import START_AGAIN, after_signal
from moe.system.fields import ConfigError
from moe.system.stop_watch import STOP_SIGNALS, STOP_WATCH


class Stopped(SystemExit):
    """A run stopped by a signal, without an error; ``code`` is one of :mod:`moe.system.exit_codes`."""

    def __init__(self, code: int, reason: str):
        super().__init__(code)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class StartAgain(Stopped):
    """A reason to start a run again with the same command, which perhaps only this process sees."""

    def __init__(self, reason: str):
        super().__init__(START_AGAIN, reason)


class StopSignals:
    """Handlers that defer SIGTERM and the first Ctrl-C to the end of a train step; a context manager.

    Outside :meth:`at_steps` a signal ends the run at once, because there is nothing to save. In a run of several
    processes, the program's own handlers do so; within it, JAX's preemption service handles SIGTERM and chooses one
    step at which all processes stop.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._waiting = False
        self._context = contextlib.ExitStack()

    def __enter__(self) -> StopSignals:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._context.callback(signal.signal, number, signal.signal(number, self._handle))
            self._context.enter_context(STOP_WATCH.unfinished(self._has_unsaved_step))
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self._waiting or self._received is not None:  # a second signal is not deferred
            raise Stopped(after_signal(number), f"stopped by {signal.Signals(number).name}")
        STOP_WATCH.acknowledge()
        self._received = number

    def _has_unsaved_step(self) -> bool:
        """Return True while a first signal waits for the end of a step."""
        return self._waiting and self._received is None and len(STOP_WATCH.unanswered()) < 2

    @contextlib.contextmanager
    def at_steps(self) -> Iterator[None]:
        """Defer signals to :meth:`due` within this context; all processes enter it at the same step."""
        self._waiting = True
        if jax.process_count() > 1 and distributed.global_state.preemption_sync_manager is None:
            distributed.global_state.initialize_preemption_sync_manager()  # from here on SIGTERM is the service's
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


#: Key, in the store that the processes of a run share, of the exit code and the reason of the first that ended early.
_ENDING = "moe/ending"


#: First words of errors of collectives, which the loss of another process causes too.
_BROKEN = re.compile("(UNKNOWN|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|FAILED_PRECONDITION): ")


@contextlib.contextmanager
def ended_together(timeout: int = 100) -> Iterator[None]:
    """End all processes of a run, with the same exit code, when an error ends one of them.

    Otherwise the others would wait for it in a collective until JAX aborts all of them, after five minutes and with
    another exit code. Stopped is left alone: after a preemption notice all processes raise it at the same step.

    An error of a collective waits until JAX has had the time to find a lost process and to abort this one, which
    :mod:`moe.system.supervisor` reports.

    Args:
        timeout: seconds after which JAX counts a silent process as lost.

    Raises:
        ConfigError: this is one of several processes that have not joined (:func:`moe.parallel.mesh.join_processes`).
    """
    if jax.process_count() == 1:
        yield
        return
    client = distributed.global_state.client
    if client is None:
        raise ConfigError(f"--distributed: must be given, since this is one of {jax.process_count()} processes")
    threading.Thread(target=_watch, args=(client,), daemon=True).start()
    try:
        with STOP_WATCH.farewell(lambda code: _stop_all(client, code)):
            yield
    except BaseException as error:
        if _is_broken_collective(error):
            time.sleep(1.25 * timeout + 5)
        if type(error) is not Stopped:
            _announce(client, error)
            atexit.register(_leave, _code(error))  # runs before JAX's own function, which was registered earlier
        else:
            atexit.register(_leave_with_others, _code(error))
        raise


def _is_broken_collective(error: BaseException | None) -> bool:
    """Whether an error, or the one that caused it, such as that of a checkpoint, is of a collective."""
    while error is not None:
        if isinstance(error, (RuntimeError, ValueError)) and _BROKEN.match(str(error)):
            return True
        error = error.__cause__
    return False


def _stop_all(client: Any, code: int) -> NoReturn:
    """End all processes for a stop signal of this one, whose main thread cannot raise an error."""
    _announce(client, Stopped(code, "stopped by a signal"))
    _leave(code)


def _code(error: BaseException) -> int:
    """Exit code of a program that an error ends."""
    return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1


def _announce(client: Any, error: BaseException) -> None:
    """Tell the other processes why this one ends."""
    reason = f"process {jax.process_index()}: {type(error).__name__}: {str(error)[:2000]}"
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
        client.key_value_set(_ENDING, f"{_code(error)} {reason}")


def _watch(client: Any) -> None:
    """End this process once another one has announced its end."""
    while True:
        time.sleep(0.5)
        try:
            code, _, reason = client.key_value_try_get(_ENDING).partition(" ")
        except jax.errors.JaxRuntimeError:  # none has
            continue
        if not reason.startswith(f"process {jax.process_index()}:"):
            print(f"ended with {terminal(reason)}", file=sys.stderr, flush=True)
            _leave(int(code))
        return


def _leave(code: int) -> NoReturn:
    """Exit without JAX's shutdown, which would wait for the other processes; process 0 last, since it has the store,
    without which JAX aborts the others.

    Its start again takes longer than the others wait for it: they would join the processes that are ending.
    """
    time.sleep(2 if jax.process_index() else 3.5)
    _exit(code)


def _leave_with_others(code: int) -> NoReturn:
    """Exit after JAX's shutdown, which waits for the other processes, but before the destructors of its threads, one of
    which may abort a process that has stopped (exit code 134, after which launchers do not start again)."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.distributed.shutdown()
    _exit(code)


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
