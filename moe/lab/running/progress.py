"""Progress of a suite: its name, runs, steps and time left, as lines on the terminal and in ``progress.log``."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from moe.lab.records import Key, Record
from moe.lab.suite import Suite
from moe.system.atomic_files import append
from moe.system.metrics_files import METRICS, read_rows
from moe.system.waiting import repeatedly
from moe.training import progress

LOG = "progress.log"
_SECONDS_BETWEEN_LINES = 60.0


class Progress:
    """Writes a line when a run starts and ends, and one a minute in between."""

    def __init__(self, suite: Suite, workdir: Path):
        self._suite, self._path = suite, workdir / LOG
        self._start = time.monotonic()
        self._trained = 0.0  # FLOPs of the runs that this process has finished
        self._left = 0.0  # FLOPs of the current run and of those after it
        self._before = 0.0  # FLOPs of the current run that an earlier process has done
        self._title = ""

    def say(self, text: str) -> None:
        """Append a line with the time of day."""
        line = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {text}"
        progress.say(line)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        append(self._path, line + "\n")

    def start(self, key: Key, planned: Sequence[Key], done: Iterable[Key], unnamed: Sequence[Key] = ()) -> None:
        """Report the start of a run and note the FLOPs left; ``unnamed``: runs that a sweep has yet to name."""
        done = set(done)
        left = [run for run in planned if run not in done]
        self._left = sum(self._flops(run) for run in (*left, *unnamed))
        total = f"about {len(planned) + len(unnamed)}" if unnamed else f"{len(planned)}"
        self._title = f"{self._suite.name}, run {len(planned) - len(left) + 1} of {total}, {key}"
        self.say(f"{self._title}: start")

    @contextlib.contextmanager
    def following(self, key: Key, directory: Path) -> Iterator[None]:
        """Write a line a minute while the run in ``directory`` is trained."""

        def trained() -> list[dict[str, Any]]:
            return [row for row in read_rows(epath.Path(directory) / METRICS) if row["kind"] == "train"]

        def follow() -> None:
            with contextlib.suppress(OSError):  # of a full disk, which would end this thread; perhaps not the run
                if rows := trained():
                    self._follow(key, rows[-1]["step"], rows[-1]["cross_entropy"])

        begun = rows[-1]["step"] if (rows := trained()) else 0
        self._before = self._flops(key) * begun / key.steps
        try:
            with repeatedly(_SECONDS_BETWEEN_LINES, follow):
                yield
        finally:
            self._trained += self._flops(key) - self._before

    def finish(self, key: Key, record: Record) -> None:
        """Report the end of a run, with the loss that comparisons use."""
        loss = "".join(f", held-out loss {value:.4f}" for value in record.losses())
        self.say(f"{self._title}: {record.status}{loss}; {self._time_left(self._flops(key))}")

    def _follow(self, key: Key, step: int, loss: float) -> None:
        time_left = self._time_left(self._flops(key) * step / key.steps, running=True)
        self.say(f"{self._title}: step {step:,} of {key.steps:,}, loss {loss:.3f}; {time_left}")

    def _flops(self, key: Key) -> float:
        return self._suite.costs(key.variant, key.steps)["flops"]

    def _time_left(self, current: float, *, running: bool = False) -> str:
        """Time left for all planned runs at this process's pace so far, and when they would end.

        Args:
            current: FLOPs done of the current run.
            running: whether they are part of what this process has done so far.
        """
        trained = self._trained + (current - self._before) * running
        if trained <= 0:
            return "time left not known yet"
        minutes = round((self._left - current) * (time.monotonic() - self._start) / trained / 60)
        end = datetime.datetime.now() + datetime.timedelta(minutes=minutes)
        return f"{minutes // 60} h {minutes % 60} min left at the pace of this process, until {end:%d %B %H:%M}"
