"""Progress of a run on standard error: a bar on a terminal, else one line per logged or evaluated step.

Errors of the streams are ignored: a run goes on without its terminal.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import jax
import numpy as np
import tqdm


def say(text: str) -> None:
    """Print a line on standard output; what follows a closed pipe or a full disk is lost."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):  # or the interpreter's last flush would set the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """Shows losses and speed while a run trains."""

    def __init__(self, start: int, num_steps: int, quiet: bool):
        """
        Args:
            start: steps done.
            num_steps: steps of the whole run.
            quiet: show nothing.
        """
        self._active = not quiet and jax.process_index() == 0
        self._shown: dict[str, str] = {}
        self._bar = None
        if self._active and _is_terminal():
            self._bar = tqdm.tqdm(total=num_steps, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1)

    def advance(self) -> None:
        """Count one step."""
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.update()

    def logged(self, row: dict[str, Any], timing: dict[str, float]) -> None:
        """Take the values of a logged row, shown by the next :meth:`show`."""
        self._shown |= {"loss": f"{row['cross_entropy']:.3f}"}
        if "fraction_tokens_dropped" in row:
            self._shown["dropped"] = f"{np.mean(row['fraction_tokens_dropped']):.3f}"
        self._shown |= {"tokens/s": f"{timing['tokens_per_second']:.0f}", "MFU": f"{timing['mfu']:.2f}"}
        if "mfu_datasheet" in timing:
            self._shown["MFU"] += f" (of the datasheet's peak {timing['mfu_datasheet']:.2f})"

    def evaluated(self, heldout_loss: float) -> None:
        """Take the held-out loss, shown by the next :meth:`show`."""
        self._shown["heldout"] = f"{heldout_loss:.3f}"

    def show(self, step: int) -> None:
        """Show what was logged or measured at this step, if anything."""
        if not self._shown:
            return
        order = [name for name in ("loss", "heldout", "dropped", "tokens/s", "MFU") if name in self._shown]
        text = " ".join(f"{name} {self._shown[name]}" for name in order)
        if self._bar is None:
            self.write(f"step {step} {text}")
            self._shown = {}
        else:
            with contextlib.suppress(OSError, ValueError):
                self._bar.set_postfix_str(text)  # keeps the last held-out loss in view

    def write(self, text: str) -> None:
        """Write a line above the bar."""
        if not self._active:
            return
        with contextlib.suppress(OSError, ValueError):
            if self._bar is None:
                print(text, file=sys.stderr, flush=True)
            else:
                self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.close()


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False
