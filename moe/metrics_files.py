"""Where numbers go: ``metrics.jsonl`` (reproducible to the bit), ``timing.jsonl`` (wall clock), TensorBoard.

In: dicts of scalars and short lists. A row is written once: a resumed run first drops the rows after its checkpoint.
Only process 0 writes.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from tensorboardX import SummaryWriter

from moe.atomic_files import write_whole
from moe.config import ConfigError

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"


def read_rows(path: epath.Path | Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a last line cut short by a crash is left out; no file is no rows.

    Raises:
        ConfigError: any other line is no row.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not (isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("kind"), str)):
                raise ValueError
            rows.append(row)
        except (ValueError, RecursionError) as error:
            if number < len(lines):  # the last one has no end of line, if it is not empty
                raise ConfigError(f"{path}, line {number}: is no row of metrics; put it back, or delete it") from error
    return rows


class MetricsWriter:
    """Appends rows under a workdir."""

    def __init__(self, workdir: epath.Path, step: int):
        """Keeps the rows up to ``step``, the step the run goes on from."""
        self.rows = {METRICS: 0, TIMING: 0}  # in the files by now, where this process writes
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._files = {}
        for name in (METRICS, TIMING):
            kept = [row for row in read_rows(workdir / name) if row["step"] <= step]
            write_whole(workdir / name, "".join(json.dumps(row) + "\n" for row in kept).encode())
            self.rows[name] = len(kept)
            self._files[name] = (workdir / name).open("a")
        self._board = SummaryWriter(os.fspath(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, kind: str, values: dict[str, Any], *, file: str = METRICS) -> None:
        """One row {step, kind, **values}; lists (per layer, per expert) are TensorBoard scalars name/0, name/1, …"""
        if not self._active:
            return
        self._files[file].write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self._files[file].flush()
        self.rows[file] += 1
        if kind == "warning":  # words, for people
            return
        for name, value in values.items():
            for index, entry in np.ndenumerate(np.asarray(value)):
                suffix = "".join(f"/{i}" for i in index)
                self._board.add_scalar(f"{kind}/{name}{suffix}", float(entry), step)
        self._board.flush()

    def sync(self) -> None:
        """Returns when the rows are on disk: a checkpoint that comes after them is never there without them."""
        if self._active:
            os.fsync(self._files[METRICS].fileno())

    def close(self) -> None:
        """Flushes and closes; all of them, if one cannot be."""
        if self._active:
            with contextlib.ExitStack() as stack:
                for closing in (self._board, *self._files.values()):
                    stack.callback(closing.close)


def to_python(tree: Any) -> Any:
    """Arrays of a tree as Python numbers and lists, ready for JSON."""
    return jax.tree.map(lambda array: np.asarray(array).tolist(), tree)
