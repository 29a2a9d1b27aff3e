"""Threads in which Orbax writes a checkpoint: what they print, and their end where one of them fails."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

from absl import logging as absl_logging


@contextlib.contextmanager
def writers_end_on_error() -> Iterator[None]:
    """Wait for the other writers of a checkpoint before an error of one of them leaves the block: they would write
    into folders that the next start, or this one, removes."""
    try:
        yield
    except Exception:
        for thread in threading.enumerate():
            if type(thread).__module__.startswith("orbax."):
                with contextlib.suppress(Exception):  # which Orbax's threads raise where they are joined
                    thread.join()
        raise


@contextlib.contextmanager
def no_background_tracebacks() -> Iterator[None]:
    """Hide tracebacks that Orbax's threads log for errors which are also raised, late ones of TensorStore, and Orbax's
    warnings that a thread waits for a slow disk, which :func:`moe.system.waiting.said_aloud` says."""

    def keep(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname or not (record.exc_info or "_SignalingThread" in str(record.msg))

    def late(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    hook, sys.unraisablehook = sys.unraisablehook, late
    absl_logging.get_absl_logger().addFilter(keep)
    try:
        yield
    finally:
        absl_logging.get_absl_logger().removeFilter(keep)
        sys.unraisablehook = hook
