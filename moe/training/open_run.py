"""A finished run or an import, opened for whoever evaluates or analyses it.

In: a workdir, and settings to use instead of its own. Out: its program, its data and its variables, on the devices
that are here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from etils import epath

from moe.checkpoints import manager, parameters
from moe.config import ConfigError, MeshConfig, to_dict, validate_mesh
from moe.data import pipeline
from moe.data.tokenizer_files import find_tokenizer
from moe.parallel.mesh import make_mesh
from moe.routing.resolve import from_config_dict
from moe.training.step import Program, build


@dataclasses.dataclass(frozen=True)
class Workdir:
    """An open one.

    Attributes:
        path: of the folder.
        program: over all devices: rows are split, and parameters where the run split them.
        prepared: the text of its domains, and its tokenizer.
    """

    path: str
    program: Program
    prepared: pipeline.Prepared

    def variables(self, step: int | None = None) -> dict[str, Any]:
        """Of the checkpoint of that step; None: the newest. See :func:`moe.checkpoints.parameters.read_variables`."""
        return parameters.read_variables(self.path, self.program.config.model, self.program.mesh, step=step)

    def steps(self) -> list[int]:
        """Of its checkpoints, in order."""
        steps = manager.complete_steps(epath.Path(self.path))
        if not steps:
            raise ConfigError(f"{self.path}: holds no checkpoints")
        return steps


def open_workdir(path: str, instead: dict[tuple[str, str], Any]) -> Workdir:
    """Reads the config, prepares the data, builds the program (in which nothing is compiled yet).

    Use the result under ``jax.set_mesh(result.program.mesh)``.

    Args:
        path: holds config.json, a tokenizer and checkpoints.
        instead: (section, field) → value to use instead of the workdir's; None: leave it.

    Raises:
        moe.config.ConfigError: something of that is missing or impossible.
    """
    tree = to_dict(parameters.read_config(path))
    for (section, name), value in instead.items():
        if value is not None:
            tree[section][name] = value
    others = [instead.get(("data", name)) is not None for name in ("dataset", "domains")]
    if any(others):  # what belongs to the workdir's own text
        tree["data"]["weights"] = ()
        tree["data"]["domains"] = tree["data"]["domains"] if others[1] else ()
    tree["data"]["streams"] = 0
    tree["train"]["accumulation_steps"] = 1
    # A checkpoint fits any mesh.
    config = dataclasses.replace(from_config_dict(tree), mesh=MeshConfig(data=1, fsdp=-1))
    mesh = make_mesh(config.mesh)
    validate_mesh(config, mesh.shape)
    prepared = pipeline.prepare(config.data, config.model.vocab_size, tokenizer=find_tokenizer(path))
    with jax.set_mesh(mesh):
        return Workdir(path, build(config, mesh), prepared)
