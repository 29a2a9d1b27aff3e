"""Exit codes of a program that a signal stopped."""

from __future__ import annotations

import signal

#: Exit code of a run that should be restarted with the same command: EX_TEMPFAIL of sysexits.h.
START_AGAIN = 75

#: Exit code after Ctrl-C, as in shells, 130; launchers must not restart the run.
INTERRUPTED = 128 + signal.SIGINT


def after_signal(number: int) -> int:
    """Exit code after SIGTERM or SIGINT."""
    return INTERRUPTED if number == signal.SIGINT else START_AGAIN
