"""Metric files ``metrics.jsonl`` (bit-reproducible) and ``timing.jsonl`` (wall clock), and further writers of rows.

Rows are dicts of scalars and short lists. Only process 0 writes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import pydantic
from etils import epath

from moe.system.atomic_files import in_bucket, write_atomic
from moe.system.fields import ConfigError, whole_number
from moe.system.foreign_files import Fields, Json, Step, kept_whole, parse
from moe.system.reading import open_regular

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"


class Writer(Protocol):
    """Receiver of the rows of a run, in process 0."""

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Take a row: numbers and nested lists ([L] per MoE layer, [L,E] per expert), or the text of a warning."""
        ...

    def close(self) -> None:
        """Finish; called once, also after an error."""
        ...


#: (workdir, config as a dict, steps done: rows after them are written again) → Writer.
Factory = Callable[[epath.Path, dict[str, Any], int], Writer]


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


def read_rows(path: epath.Path | Path) -> list[Json]:
    """All rows of :func:`iterate_rows`."""
    return list(iterate_rows(path))


def iterate_rows(path: epath.Path | Path, kind: str = "") -> Iterator[Json]:
    """Rows of a JSON-lines file, one at a time: those of a long run of a large model fill gigabytes.

    A last line cut short by a crash is dropped, and a missing file has no rows. In a bucket, objects of further rows
    beside it are read too (:class:`_Segments`).

    Args:
        path: of the file.
        kind: of the rows; other lines are not parsed. Empty: all rows.

    Raises:
        ConfigError: any other line is not a row of metrics, or the path is no regular file.
    """
    for _, row in _entries(path, kind.encode()):
        if kind in ("", row["kind"]):
            yield row


def _entries(path: epath.Path | Path, part: bytes = b"") -> Iterator[tuple[bytes, Json]]:
    """Lines and their rows, of the lines that contain these bytes."""
    for line, where in _lines(path):
        if part not in line:
            continue
        try:
            yield line, parse(line, _ROW, f"{where}: not a row of metrics; restore or delete it")
        except ConfigError:
            if line.endswith(b"\n"):  # else it is unfinished
                raise


def _lines(path: epath.Path | Path) -> Iterator[tuple[bytes, str]]:
    """Lines of a file and of the objects beside it, and where each is. An object N replaces the rows from N on."""
    files = [(0, path)] if path.exists() else []
    files += [(int(segment.name), segment) for segment in _segments(path)]
    ends, count = [*(first for first, _ in files[1:]), sys.maxsize], 0
    for (first, file), end in zip(files, ends, strict=False):  # without files there is an end too many
        if first > count:
            continue
        with open_regular(file) as lines:
            for number, line in enumerate(itertools.islice(lines, end - first), 1):
                yield line, f"{file}, line {number}"
                count = first + number


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

    def __init__(self, path: epath.Path, kept: Iterable[bytes]):
        self._path, self._new = path, []
        self._count = self._join(kept)

    def write(self, line: str) -> None:
        self._new.append(line)

    def flush(self) -> None:
        """Nothing: rows become visible at the next :meth:`sync`."""

    def sync(self) -> None:
        if self._new:
            folder = self._path.with_name(f"{self._path.name}.rows")
            write_atomic(folder / f"{self._count:09d}", "".join(self._new))
            self._count, self._new = self._count + len(self._new), []

    def _join(self, kept: Iterable[bytes]) -> int:
        """Write these lines to FILE alone, and return their number."""
        lines = list(kept)
        write_atomic(self._path, lines)
        for segment in _segments(self._path):
            segment.unlink()
        return len(lines)

    def close(self) -> None:
        self.sync()
        self._join(line for line, _ in _lines(self._path))


class _Appended:
    """Rows appended to a metrics file of a file system."""

    def __init__(self, path: epath.Path, kept: Iterable[bytes]):
        write_atomic(path, kept)
        self._file = path.open("a")
        self.write = self._file.write
        self.flush = self._file.flush
        self.close = self._file.close

    def sync(self) -> None:
        os.fsync(self._file.fileno())


class MetricsWriter:
    """Appends rows to the metric files of a workdir, and passes them to other writers."""

    def __init__(self, workdir: epath.Path, step: int, config: dict[str, Any], writers: Sequence[Factory] = ()):
        """Open the files and drop rows after ``step``, from which the run continues: they will be written again.

        Args:
            workdir: folder of the run.
            step: steps done.
            config: the run's config as nested dicts, for the other writers.
            writers: makers of other writers.
        """
        self.rows = {METRICS: 0, TIMING: 0}  # number of rows in each file, in the process that writes
        self._active = jax.process_index() == 0
        self._writers, self._files = [], {}
        with contextlib.ExitStack() as opened:  # closed here if a later one cannot be opened
            for make in writers if self._active else ():
                self._writers.append(make(workdir, config, step))
                opened.callback(self._writers[-1].close)
            for name in (METRICS, TIMING) if self._active else ():
                kept = self._up_to(step, workdir / name)
                self._files[name] = (_Segments if in_bucket(workdir) else _Appended)(workdir / name, kept)
                opened.callback(self._files[name].close)
            self._opened = opened.pop_all()

    def _up_to(self, step: int, path: epath.Path) -> Iterator[bytes]:
        """Lines of the rows up to a step, which are counted."""
        for line, row in _entries(path):
            if row["step"] <= step:
                self.rows[path.name] += 1
                yield line if line.endswith(b"\n") else line + b"\n"

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
        self._opened.close()


def to_python(tree: Any) -> Any:
    """Convert the arrays of a tree to Python numbers and lists, for JSON."""
    return jax.tree.map(lambda array: np.asarray(array).tolist(), tree)
