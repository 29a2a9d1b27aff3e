"""Programs by ``data.objective``: what :func:`moe.training.loop.train` takes as ``make_program``."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from moe.config import Config
from moe.posttraining.dpo import PreferenceObjective
from moe.training.losses import describe_auxiliary
from moe.training.step import Program, Teacher, build


def make_program(config: Config, mesh: Mesh, teacher: Teacher | None = None) -> Program:
    """See :func:`moe.training.step.build`."""
    if config.data.objective != "preferences":
        return build(config, mesh, teacher)
    program = build(config, mesh, teacher, objective=PreferenceObjective())
    about = (
        f"objective: preferences (DPO), beta {config.preferences.beta:g}, against {config.distill.teacher}; "
        f"auxiliary losses: {describe_auxiliary(config.model.moe)}"
    )
    return dataclasses.replace(program, about=about)
