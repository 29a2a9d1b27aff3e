"""Programs timed in turns, for the benchmarks in ``scripts/``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Seconds of each call of one program: wall clock, and processor time of all threads."""

    clock: list[float] = dataclasses.field(default_factory=list)
    processor: list[float] = dataclasses.field(default_factory=list)


def in_turns(programs: Mapping[Any, Callable[[], Any]], repeats: int) -> dict[Any, Seconds]:
    """Time each program ``repeats`` times, waiting for its results, after one call of each that compiles it. Programs
    take turns, so that a busy moment of the machine affects all of them."""
    seconds = {name: Seconds() for name in programs}
    for program in programs.values():
        jax.block_until_ready(program())
    for _ in range(repeats):
        for name, program in programs.items():
            start, processor_start = time.perf_counter(), time.process_time()
            jax.block_until_ready(program())
            seconds[name].clock.append(time.perf_counter() - start)
            seconds[name].processor.append(time.process_time() - processor_start)
    return seconds
