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
import pydantic
from etils import epath

from moe.atomic_files import in_bucket, write_atomic
from moe.config import Config, ConfigError, read_small_file, to_dict
from moe.fields import whole_number
from moe.foreign_files import Fields, Step, kept_whole, parse
from moe.metric_writers import Factory

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"


_LARGEST = 1 << 34  # bytes


class _Row(Fields):
    """Fields of a row that reports and the lab read. Lists have a value per MoE layer."""

    step: Step
    kind: str
    cross_entropy: float = 0.0
    skipped: float = 0.0
    loss: float = 0.0
    perplexity: float = 0.0
    bits_per_byte: float = 0.0
    targets: int = 0
    standard_error: float = 0.0
    text: str = ""
    expert_load: list[list[float]] = pydantic.Field(default_factory=list)
    fraction_tokens_dropped: list[float] = pydantic.Field(default_factory=list)
    router_entropy: list[float] = pydantic.Field(default_factory=list)
    router_z_loss: list[float] = pydantic.Field(default_factory=list)
    max_violation: list[float] = pydantic.Field(default_factory=list)

    @pydantic.model_validator(mode="after")
    def _check_layers(self) -> _Row:
        lists = {"expert_load", "fraction_tokens_dropped", "router_entropy", "router_z_loss", "max_violation"}
        if len({len(getattr(self, name)) for name in lists & self.model_fields_set}) > 1:
            raise ValueError("its lists have different numbers of MoE layers")
        if len({len(layer) for layer in self.expert_load}) > 1:
            raise ValueError("expert_load has different numbers of experts")
        return self


_ROW = kept_whole(_Row)


def read_rows(path: epath.Path | Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file; a last line cut short by a crash is dropped, and a missing file has no rows.

    In a bucket, objects of further rows beside it are read too (:class:`_Segments`).

    Raises:
        ConfigError: any other line is not a row of metrics, or the path is no regular file.
    """
    rows = _read_lines(path) if path.exists() else []
    for segment in _segments(path):
        first = int(segment.name)
        if first <= len(rows):
            rows[first:] = _read_lines(segment)
    return rows


def _read_lines(path: epath.Path | Path) -> list[dict[str, Any]]:
    rows = []
    lines = read_small_file(path, largest=_LARGEST).split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parse(line, _ROW, f"{path}, line {number}: not a row of metrics; restore or delete it"))
        except ConfigError:
            if number < len(lines):  # the last entry is empty or an unfinished line
                raise
    return rows


def _segments(path: epath.Path | Path) -> list[epath.Path | Path]:
    """Objects with the rows that follow those of a metrics file in a bucket, in order."""
    folder = path.with_name(f"{path.name}.rows")
    found = sorted(folder.iterdir()) if in_bucket(path) and folder.is_dir() else []
    for segment in found:
        if whole_number(segment.name) is None:
            raise ConfigError(f"{segment}: not an object of rows of metrics; move it away")
    return found


class _Segments:
    """Rows of a metrics file in a bucket, where nothing can be appended.

    Each call of :meth:`sync` writes the new rows to an object FILE.rows/N, where N is the number of rows before them;
    an object whose rows FILE has too changes nothing. Objects are merged into FILE when it is closed or opened again.
    """

    def __init__(self, path: epath.Path, kept: list[str]):
        self._path, self._kept, self._new = path, kept, []
        self._join()

    def write(self, line: str) -> None:
        self._new.append(line)

    def flush(self) -> None:
        """Nothing: rows become visible at the next :meth:`sync`."""

    def sync(self) -> None:
        if self._new:
            folder = self._path.with_name(f"{self._path.name}.rows")
            write_atomic(folder / f"{len(self._kept):09d}", "".join(self._new))
            self._kept, self._new = self._kept + self._new, []

    def _join(self) -> None:
        write_atomic(self._path, "".join(self._kept).encode())
        for segment in _segments(self._path):
            segment.unlink()

    def close(self) -> None:
        self.sync()
        self._join()


class _Appended:
    """Rows appended to a metrics file of a file system."""

    def __init__(self, path: epath.Path, kept: list[str]):
        write_atomic(path, "".join(kept).encode())
        self._file = path.open("a")
        self.write, self.flush, self.close = self._file.write, self._file.flush, self._file.close

    def sync(self) -> None:
        os.fsync(self._file.fileno())


class MetricsWriter:
    """Appends rows to the metric files of a workdir, and passes them to other writers."""

    def __init__(self, workdir: epath.Path, step: int, config: Config, writers: Sequence[Factory] = ()):
        """Open the files and drop rows after ``step``, from which the run continues: they will be written again."""
        self.rows = {METRICS: 0, TIMING: 0}  # number of rows in each file, in the process that writes
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._writers = [make(workdir, to_dict(config), step) for make in writers]
        self._files = {}
        for name in (METRICS, TIMING):
            kept = [json.dumps(row) + "\n" for row in read_rows(workdir / name) if row["step"] <= step]
            self.rows[name] = len(kept)
            self._files[name] = (_Segments if in_bucket(workdir) else _Appended)(workdir / name, kept)

    def write(self, step: int, kind: str, values: dict[str, Any], *, file: str = METRICS) -> None:
        """Write a row of the step, the kind and these values."""
        if not self._active:
            return
        self._files[file].write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self._files[file].flush()
        self.rows[file] += 1
        for writer in self._writers:
            writer.write(step, kind, values)

    def sync(self) -> None:
        """Flush the metric rows to disk; called before a checkpoint, so that none exists without its rows."""
        if self._active:
            for file in self._files.values():
                file.sync()

    def close(self) -> None:
        """Close all files, even if closing one of them fails."""
        if self._active:
            with contextlib.ExitStack() as stack:
                for closing in (*self._writers, *self._files.values()):
                    stack.callback(closing.close)


def to_python(tree: Any) -> Any:
    """Convert the arrays of a tree to Python numbers and lists, for JSON."""
    return jax.tree.map(lambda array: np.asarray(array).tolist(), tree)
