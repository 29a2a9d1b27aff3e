"""Training loss of the last tenth of a run, batch by batch: the second endpoint, paired between arms of one seed."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

from moe.models.state import TrainState
from moe.system.atomic_files import append, write_atomic
from moe.training.batches import Batch
from moe.training.step import Program
from moe.training.update import TrainMetrics

#: In a run's workdir.
FILE = "last_losses.txt"


def recording(program: Program, path: Path) -> Program:
    """Wrap a run's program so that it appends a line "STEP LOSS" to a file for each batch of the last tenth.

    A resumed run appends the steps after its checkpoint again, with the same losses.
    """
    first, counter = _first(program.config.train.num_steps), itertools.count()
    offset: list[int] = []

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, TrainMetrics]:
        if not offset:
            offset.append(int(state.step) + 1)
            _drop_unfinished_line(path)
        number = offset[0] + next(counter)
        state, metrics = program.train_step(state, batch)
        if number >= first:
            append(path, f"{number} {float(metrics.cross_entropy)!r}\n")
        return state, metrics

    return dataclasses.replace(program, train_step=step)


def _drop_unfinished_line(path: Path) -> None:
    """Drop a last line that a full disk or a crash cut short, since the next one would be appended to it."""
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        write_atomic(path, text[: text.rfind("\n") + 1])


def _first(steps: int) -> int:
    """The first step, counted from 1, of the last tenth of a run, which has at least one step."""
    return steps - max(steps // 10, 1) + 1


def losses(path: Path, steps: int) -> list[float]:
    """Training loss of each batch of the last tenth; NaN where none was recorded, the later one if trained twice."""
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    by_step = {int(line[0]): float(line[1]) for line in lines if len(line) == 2}
    return [by_step.get(step, math.nan) for step in range(_first(steps), steps + 1)]
