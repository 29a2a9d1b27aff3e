"""Opening the workdir of a run or an import for evaluation, analysis or generation, on the devices at hand."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from moe.checkpoints import parameters
from moe.checkpoints.workdir import read_config
from moe.config import Config, MeshConfig, OptimizerConfig, to_dict, validate_mesh
from moe.config.parse import from_config_dict
from moe.data import pipeline
from moe.data.tokenizer_files import find_tokenizer
from moe.models.factory import abstract_model
from moe.parallel.mesh import make_mesh
from moe.parallel.parameters import parameter_shardings
from moe.training.step import Program, build


@dataclasses.dataclass(frozen=True)
class Workdir:
    """An opened workdir.

    Attributes:
        path: the folder.
        program: over all devices, with rows and parameters sharded.
        prepared: documents of its domains, and its tokenizer.
    """

    path: str
    program: Program
    prepared: pipeline.Prepared

    def variables(self, step: int | None = None) -> dict[str, Any]:
        """Variables of a checkpoint; None: the newest. See :func:`moe.checkpoints.parameters.read_variables`."""
        return parameters.read_variables(self.path, self.program.config.model, mesh=self.program.mesh, step=step)

    def steps(self) -> list[int]:
        """Steps of its checkpoints, in order."""
        return parameters.saved_steps(self.path)

    def step_or_newest(self, step: int | None) -> int:
        """See :func:`moe.checkpoints.parameters.chosen_step`."""
        return parameters.chosen_step(self.path, step)


def on_devices(program: Program, variables: dict[str, Any]) -> dict[str, Any]:
    """A model's variables as arrays on the program's mesh, each device with its shard.

    Programs would put a NumPy array whole on every device where nothing in them says how it is split, such as experts,
    and again for every batch.
    """
    return jax.device_put(variables, parameter_shardings(program.mesh, nnx.state(abstract_model(program.config.model))))


def same_text(config: Config, domains: Sequence[str]) -> dict[tuple[str, str], Any]:
    """(section, field) → value of the settings with which another run reads the same text as this config."""
    return {
        ("data", "dataset"): config.data.dataset,
        ("data", "domains"): tuple(domains),
        ("data", "text_suffixes"): config.data.text_suffixes,
        ("data", "directory"): config.data.directory,
        ("data", "objective"): config.data.objective,
        ("data", "sequence_length"): config.data.sequence_length,
        ("data", "pack"): config.data.pack,
        ("train", "batch_size"): config.train.batch_size,
        # Required by the checks of the objective; not used here.
        ("distill", "teacher"): config.distill.teacher,
        ("policy", "kl"): config.policy.kl,
        ("policy", "replay"): config.policy.replay,
    }


def open_workdir(path: str, instead: dict[tuple[str, str], Any]) -> Workdir:
    """Read the config, prepare the data and build the program; nothing is compiled yet.

    Use the result under ``jax.set_mesh(result.program.mesh)``.

    Args:
        path: folder with config.json, a tokenizer and checkpoints.
        instead: (section, field) → value that replaces the workdir's; None keeps the workdir's. Sections may be dotted.

    Raises:
        moe.config.ConfigError: a file is missing, or the settings are impossible.
    """
    tree = to_dict(read_config(path))
    for (section, name), value in instead.items():
        if value is not None:
            functools.reduce(operator.getitem, section.split("."), tree)[name] = value
    others = [instead.get(("data", name)) is not None for name in ("dataset", "domains")]
    if any(others):  # weights and domains belong to the workdir's own text
        tree["data"]["weights"] = ()
        tree["data"]["domains"] = tree["data"]["domains"] if others[1] else ()
    tree["data"]["chat_template"] = ""  # the workdir's tokenizer has it
    tree["data"]["streams"] = 0
    tree["train"] |= {"accumulation_steps": 1, "rampup_rows": (), "rampup_steps": ()}
    # Nothing is trained here, so the optimizer of a user's module is not imported.
    tree["optimizer"]["name"] = OptimizerConfig().name
    # A checkpoint can be restored onto any mesh.
    config = dataclasses.replace(from_config_dict(tree), mesh=MeshConfig(data=1, fsdp=-1))
    mesh = make_mesh(config.mesh)
    validate_mesh(config, mesh.shape)
    prepared = pipeline.prepare_run(config, tokenizer=find_tokenizer(path, chat=config.objective.conversations))
    with jax.set_mesh(mesh):
        return Workdir(path, build(config, mesh), prepared)
