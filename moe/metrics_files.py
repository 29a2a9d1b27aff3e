"""Metric files ``metrics.jsonl`` (bit-reproducible) and ``timing.jsonl`` (wall clock), and further writers of rows.

Rows are dicts of scalars and short lists. Only process 0 writes.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from moe.atomic_files import write_atomic
from moe.config import Config, ConfigError, to_dict
from moe.metric_writers import Factory

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"


def read_rows(path: epath.Path | Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file; a last line cut short by a crash is dropped, and a missing file has no rows.

    Raises:
        ConfigError: any other line is not a row of metrics.
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
            if number < len(lines):  # the last entry is empty or an unfinished line
                raise ConfigError(f"{path}, line {number}: not a row of metrics; restore or delete it") from error
    return rows


class MetricsWriter:
    """Appends rows to the metric files of a workdir, and passes them to other writers."""

    def __init__(self, workdir: epath.Path, step: int, config: Config, writers: Sequence[Factory] = ()):
        """Open the files and drop rows after ``step``, from which the run continues: they will be written again."""
        self.rows = {METRICS: 0, TIMING: 0}  # number of rows in each file, in the process that writes
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._files = {}
        for name in (METRICS, TIMING):
            kept = [row for row in read_rows(workdir / name) if row["step"] <= step]
            write_atomic(workdir / name, "".join(json.dumps(row) + "\n" for row in kept).encode())
            self.rows[name] = len(kept)
            self._files[name] = (workdir / name).open("a")
        self._writers = [make(workdir, to_dict(config), step) for make in writers]

    def write(self, step: int, kind: str, values: dict[str, Any], *, file: str = METRICS) -> None:
        """Write a row {step, kind, **values}."""
        if not self._active:
            return
        self._files[file].write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self._files[file].flush()
        self.rows[file] += 1
        for writer in self._writers:
            writer.write(step, kind, values)

    def sync(self) -> None:
        """Flush the metric rows to disk; called before a checkpoint, so that it never exists without its rows."""
        if self._active:
            os.fsync(self._files[METRICS].fileno())

    def close(self) -> None:
        """Close all files, even if closing one of them fails."""
        if self._active:
            with contextlib.ExitStack() as stack:
                for closing in (*self._writers, *self._files.values()):
                    stack.callback(closing.close)


def to_python(tree: Any) -> Any:
    """Convert the arrays of a tree to Python numbers and lists, for JSON."""
    return jax.tree.map(lambda array: np.asarray(array).tolist(), tree)
