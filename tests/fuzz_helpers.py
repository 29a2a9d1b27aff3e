"""Outcomes of a fuzzed config: two steps with a finite loss, or one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe.config import Config, ConfigError, DataConfig, StartConfig, TrainConfig, validate_mesh
from moe.config.parse import from_config_dict
from moe.parallel.mesh import make_mesh
from moe.training import profiling
from moe.training.batches import place
from moe.training.step import Program, build
from moe.training.train import train
from tests.run_helpers import rows

_PROGRAMS: dict[Any, Program] = {}


def set_field(tree: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A copy of a config's dict with another value of a field, given by its dotted name."""
    section, _, rest = name.partition(".")
    inner = tree.get(section, {})
    inner = {"name": inner} if isinstance(inner, str) else inner  # a gate given by its name
    return tree | {section: set_field(inner, rest, value) if rest else value}


def shared_build(config: Config, mesh: Any, teacher: Any = None) -> Program:
    """Build a program, or reuse that of a config that differs only in fields on which no program depends."""
    if teacher is not None:
        return build(config, mesh, teacher)
    own = TrainConfig(config.train.num_steps, config.train.batch_size, config.train.accumulation_steps)
    lengths = config.data.sequence_length, config.data.input_length
    data = DataConfig(sequence_length=lengths[0], input_length=lengths[1])
    key = dataclasses.replace(config, seed=0, data=data, train=own, start=StartConfig()), mesh
    if key not in _PROGRAMS:
        if len(_PROGRAMS) > 20:
            _PROGRAMS.clear()
            jax.clear_caches()
        _PROGRAMS[key] = build(config, mesh)
    return dataclasses.replace(_PROGRAMS[key], config=config)


def listing(folder: Path) -> set[str]:
    return {os.fspath(path) for path in folder.rglob("*")}


def is_one_sentence(error: ConfigError, left: set[str] | None = None) -> None:
    """Assert that a refusal is one line of bounded length and that it leaves no files behind."""
    message = str(error)
    assert not left, message
    assert 0 < len(message) < 2100, message
    assert "\n" not in message, message


def trains_or_refuses(tree: dict[str, Any], folder: Path, devices: Sequence[Any]) -> bool:
    """Assert that a run trains, with a report, or is refused and leaves nothing in the folder; True if it trained."""
    before = listing(folder)
    try:
        config = from_config_dict(tree)
        train(config, os.fspath(folder / "run"), devices, make_program=shared_build, quiet=True)
    except ConfigError as error:
        is_one_sentence(error, left=listing(folder) - before)
        return False
    losses = [row["cross_entropy"] for row in rows(folder / "run", "train")]
    assert losses
    assert np.isfinite(losses).all(), losses
    assert (folder / "run" / "report.txt").exists()
    return True


def steps_or_sentence(tree: dict[str, Any], devices: Sequence[Any]) -> bool:
    """Assert that a config's program trains two steps on random tokens, or that it is refused; True if it trained."""
    try:
        config = from_config_dict(tree)
        mesh = make_mesh(config.mesh, devices)
        validate_mesh(config, mesh.shape)
        program = shared_build(config, mesh)
        profiling.refuse_too_large(program)
    except ConfigError as error:
        is_one_sentence(error)
        return False
    two_steps(program)
    return True


def two_steps(program: Program) -> None:
    """Assert that two train steps on random tokens have finite losses."""
    rng = np.random.default_rng(0)
    made = {key: np.ones(leaf.shape, np.int32) for key, leaf in program.batch.items()}
    for key, ones in made.items():
        if key.endswith("positions"):
            made[key] = np.arange(ones.shape[1], dtype=np.int32) * ones
        elif not key.endswith("segment_ids"):
            made[key] = rng.integers(0, program.config.model.vocab_size, ones.shape).astype(np.int32)
    with jax.set_mesh(program.mesh):
        batch = place(made, program.mesh)
        state = program.init()
        for _ in range(2):
            state, metrics = program.train_step(state, batch)
            assert np.isfinite(metrics.cross_entropy), metrics


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError where the code hangs."""

    def end(*_: Any) -> None:
        raise TimeoutError(f"{seconds} s have passed")

    old = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
