"""Waiting for storage that may not answer: said on standard error, and bounded where nothing was heard of it yet."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from moe.escaping import terminal

#: Seconds between two lines, and until a first answer is given up: gcsfs itself tries again for about 70.
EVERY, LIMIT = 10.0, 90.0


@contextlib.contextmanager
def said_aloud(what: str) -> Iterator[None]:
    """Print every 10 s that this is being waited for, while the block lasts."""
    done, start = threading.Event(), time.monotonic()

    def speak() -> None:
        while not done.wait(EVERY):
            with contextlib.suppress(OSError, ValueError):
                print(f"waiting for {terminal(what)}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        done.set()
        speaker.join()


def first_answer[T](what: str, ask: Callable[[], T]) -> T:
    """What a call returns or raises, within 90 s.

    Args:
        what: it asks, for the lines of :func:`said_aloud`.
        ask: run in a thread of its own, which is left behind if it does not return.

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
