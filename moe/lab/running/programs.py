"""Compiled programs that runs of a suite share."""

from __future__ import annotations

import dataclasses
from typing import Any

from moe.config import Config, DistillConfig, StartConfig
from moe.training.step import Program, build


class Programs:
    """Compiled programs by config; runs that differ only in seed and starting point share one."""

    def __init__(self) -> None:
        self._programs: dict[Config, Program] = {}

    def __call__(self, config: Config, mesh: Any, teacher: Any = None) -> Program:
        """See :func:`moe.training.step.build`."""
        if teacher is not None:  # the teacher's variables are part of the program
            return build(config, mesh, teacher)
        start = StartConfig("any" if config.lora.rank else "")  # adapters need one; which is not part of the program
        key = dataclasses.replace(config, seed=0, start=start, distill=DistillConfig())
        if key not in self._programs:
            self._programs[key] = build(config, mesh)
        return dataclasses.replace(self._programs[key], config=config)
