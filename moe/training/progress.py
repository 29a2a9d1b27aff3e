"""Progress of a run on standard error: a bar on a terminal, else one line per logged or evaluated step.

Errors of the streams are ignored: a run goes on without its terminal.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import tqdm

from moe.system import process
from moe.system.escaping import terminal
from moe.training.metrics import TERMS, shown_terms

#: Values shown, most important first: a narrow terminal has room only for the first ones.
_ORDER = ("loss", *(name for name, _ in TERMS.values()), "heldout", "tokens/s", "dropped", "lr", "epoch", "MFU")
#: A line of tqdm: the bar fills what the text leaves of the terminal's width.
_LINE = "{percentage:3.0f} % {n_fmt}/{total_fmt}, {remaining} left{postfix} {bar}"


def say(text: str) -> None:
    """Print a line on standard output; after a closed pipe or a full disk, output is discarded."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):  # or the interpreter's last flush would set the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def stage(text: str) -> None:
    """Print the current stage of the start on standard error, with the seconds since the program started."""
    with contextlib.suppress(OSError, ValueError):
        print(f"[{process.seconds_running():6.1f} s] {terminal(text)}", file=sys.stderr, flush=True)


class Console:
    """Messages of a run: of process 0, or none."""

    def __init__(self, quiet: bool):
        self.shows = jax.process_index() == 0 and not quiet

    def say(self, text: str) -> None:
        """See :func:`say`."""
        if self.shows:
            say(text)

    def stage(self, text: str) -> None:
        """See :func:`stage`."""
        if self.shows:
            stage(text)


class Progress:
    """Shows losses and speed while a run trains."""

    def __init__(
        self,
        start: int,
        num_steps: int,
        quiet: bool,
        epochs_per_step: Mapping[str, float] | None = None,
        batches_until: Callable[[int], float] = float,
    ):
        """
        Args:
            start: steps done.
            num_steps: steps of the whole run.
            quiet: show nothing.
            epochs_per_step: domain → share of its training text that a step reads; None: not shown.
            batches_until: number of steps → number of whole batches that they read.
        """
        self._active = not quiet and jax.process_index() == 0
        self._start = start
        self._num_steps = num_steps
        self._epochs = epochs_per_step or {}
        self._batches_until = batches_until
        self._steps = start
        self._since = 0.0
        self._shown: dict[str, str] = {}
        self._bar = None

    def advance(self) -> None:
        """Count one step. Times are measured from the end of the first one, which compiles."""
        self._steps += 1
        if self._steps == self._start + 1:
            self._since = time.monotonic()
            if self._active and _is_terminal():
                self._bar = tqdm.tqdm(
                    total=self._num_steps, initial=self._steps, bar_format=_LINE, dynamic_ncols=True, smoothing=0.1
                )
        elif self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.update()

    def logged(self, row: dict[str, Any], timing: dict[str, float] | None) -> None:
        """Take the values of a logged row, shown by the next :meth:`show`; without a timing, its speed is unknown."""
        self._shown |= {"loss": f"{row['cross_entropy']:.3f}", "lr": f"{row['learning_rate']:.2g}"}
        self._shown |= shown_terms(row)
        if "fraction_tokens_dropped" in row:
            self._shown["dropped"] = f"{100 * np.mean(row['fraction_tokens_dropped']):.1f} %"
        if timing is not None:
            self._shown["tokens/s"] = f"{timing['tokens_per_second']:,.0f}"
            rate = timing["mfu"]
            self._shown["MFU"] = f"{100 * timing.get('mfu_datasheet', rate):.0f} %"
            if "mfu_datasheet" in timing:
                self._shown["MFU"] += f" ({100 * rate:.0f} % of the measured matmul rate)"

    def evaluated(self, results: Mapping[str, Any]) -> None:
        """Take the held-out loss over all domains, shown by the next :meth:`show`."""
        error = f" ± {results['standard_error']:.3f}" if "standard_error" in results else ""
        average = f", {results['ema']:.3f} of the averaged weights" if "ema" in results else ""
        self._shown["heldout"] = f"{results['loss']:.3f}{error} ({results['targets']:,} tokens{average})"

    def show(self, step: int) -> None:
        """Show what was logged or measured at this step, if anything."""
        if not self._shown:
            return
        if "lr" in self._shown and self._epochs:
            shares = [self._batches_until(step) * share for share in self._epochs.values()]
            low, high = (f"{number:.2f}" for number in (min(shares), max(shares)))
            self._shown["epoch"] = low if low == high else f"{low} to {high}"
        values = [f"{name} {self._shown[name]}" for name in _ORDER if name in self._shown]
        if self._bar is None:
            share = f"{100 * step / self._num_steps:.0f} %"
            self.write(f"step {step}/{self._num_steps} ({share}{self._time_left(step)}) {' '.join(values)}")
            self._shown = {}
        else:
            with contextlib.suppress(OSError, ValueError):
                self._bar.set_postfix_str(terminal(self._fitting(values)))  # keeps the last held-out loss in view

    def _fitting(self, values: list[str]) -> str:
        """The values that the terminal's line has room for."""
        columns = 80
        with contextlib.suppress(OSError, ValueError):
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or columns
        longest = {"percentage": 100, "n_fmt": self._num_steps, "total_fmt": self._num_steps, "remaining": "00:00:00"}
        room = columns - len(_LINE.format(**longest, postfix=", ", bar="#"))
        text = ""
        for value in values:
            if len(text) + len(value) < room:
                text = f"{text} {value}".strip()
        return text

    def _time_left(self, step: int) -> str:
        """Time left at the mean speed so far, evaluations and checkpoints included; empty after the first step."""
        done, left = step - self._start - 1, self._num_steps - step
        if done <= 0 or left <= 0:
            return ""
        seconds = (time.monotonic() - self._since) / done * left
        for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
            if seconds >= 2 * size:
                return f", {seconds / size:.0f} {unit} left"
        return f", {seconds:.0f} s left"

    def write(self, text: str) -> None:
        """Write a line above the bar."""
        if not self._active:
            return
        with contextlib.suppress(OSError, ValueError):
            if self._bar is None:
                print(terminal(text), file=sys.stderr, flush=True)
            else:
                self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.close()


def _is_terminal() -> bool:
    """Whether standard error is a terminal with a known width: with 0 columns a bar would be invisible."""
    try:
        return sys.stderr is not None and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # no terminal, or closed
        return False
