"""Programs timed in turns: what the benchmarks in ``scripts/`` share.

In: calls by name. Out: seconds of each, by the clock and by the processors.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Of one program, call by call: by the clock, and the processors' time of all threads."""

    clock: list[float] = dataclasses.field(default_factory=list)
    processor: list[float] = dataclasses.field(default_factory=list)


def in_turns(programs: Mapping[Any, Callable[[], Any]], repeats: int) -> dict[Any, Seconds]:
    """Times each program as often, waiting for what it returns; in turns, so that a busy moment hits all alike, and
    after one call of each, which compiles."""
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
