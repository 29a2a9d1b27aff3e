"""Waiting for storage that may not answer: messages on standard error, and a limit on the first answer."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from moe.system.escaping import terminal

#: Seconds between two lines, and the time limit of a first answer; gcsfs itself retries for about 70.
EVERY, LIMIT = 10.0, 90.0


@contextlib.contextmanager
def repeatedly(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Call a function every ``seconds`` seconds in a thread of its own, while the block lasts."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(seconds):
            act()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def said_aloud(what: str) -> Iterator[None]:
    """Print every 10 s what the program is waiting for, while the block lasts."""
    start = time.monotonic()

    def speak() -> None:
        with contextlib.suppress(OSError, ValueError):
            print(f"waiting for {terminal(what)}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    with repeatedly(EVERY, speak):
        yield


def first_answer[T](what: str, ask: Callable[[], T]) -> T:
    """Call a function and return or raise what it does, with a limit of 90 s.

    Args:
        what: the storage that is asked, for the lines of :func:`said_aloud`.
        ask: the function; its thread is abandoned if it does not return.

    Raises:
        TimeoutError: it did not return in time.
    """
    answers: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(ask())
        except Exception as error:
            errors.append(error)

    asking = threading.Thread(target=run, daemon=True)
    with said_aloud(what):
        asking.start()
        asking.join(LIMIT)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer within {LIMIT:.0f} s")
    return answers[0]
