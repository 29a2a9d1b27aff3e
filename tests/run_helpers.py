"""Small training runs: their config, a program compiled once, a finished run, and ways to interrupt one."""

import contextlib
import dataclasses
import functools
import json

import jax
import pytest
from etils import epath

from moe.checkpoints import manager
from moe.checkpoints.streamed import streamed, write_parameters
from moe.config import to_dict
from moe.config.parse import from_config_dict
from moe.configs import base
from moe.system.metrics_files import read_rows
from moe.training import loop as training
from moe.training.step import build
from moe.training.train import train
from tests.tiny_text import build as build_text

ONE = jax.devices()[:1]
SETTINGS = {
    "model.num_layers": 1,
    "train.log_every": 1,
    "train.eval_every": 6,
    "train.sample_tokens": 0,
    "optimizer.learning_rate": 1e-2,
}


@pytest.fixture(scope="module")
def compilation_cache(tmp_path_factory):
    """A compilation cache on disk: most runs of a test file share one program."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return build_text(tmp_path_factory.mktemp("data"))


def tiny(directory, tree=None, **overrides):
    tree = base.get_config() if tree is None else tree
    settings = {
        "model.vocab_size": 400,
        "model.d_model": 16,
        "model.num_layers": 2,
        "model.num_heads": 2,
        "model.num_kv_heads": 2,
        "model.head_dim": 8,
        "model.d_ff": 16,
        "model.moe.d_ff": 16,
        "model.moe.dispatch": "einsum",  # compiles fastest
        "data.dataset": "tiny_text/split",
        "data.directory": str(directory),
        "data.sequence_length": 16,
        "data.shuffle_window": 4,
        "data.heldout_rows": 8,
        "optimizer.warmup_steps": 2,
        "train.batch_size": 8,  # few rows per expert: few chunk sizes to compile
        "train.num_steps": 6,
        "train.log_every": 2,
        "train.eval_every": 3,
        "train.save_every": 2,
        "train.sample_tokens": 4,
    } | overrides
    tree.update_from_flattened_dict(settings)
    return from_config_dict(tree)


def compile_once(build=build):
    """A make_program that builds once and then reuses the program, for runs whose settings do not affect it."""
    made = []

    def make(config, mesh, teacher=None):
        if not made:
            made.append(build(config, mesh, teacher))
        return dataclasses.replace(made[0], config=config)

    return make


#: One make_program, hence one program, for the whole process.
compiled_programs = functools.cache(compile_once)


def write_run(folder, config, parameters):
    """Write a workdir that holds only a config and parameters."""
    folder = epath.Path(folder)
    folder.mkdir(exist_ok=True)
    write_parameters(folder, streamed(parameters))
    (folder / "config.json").write_text(json.dumps(to_dict(config)))


@pytest.fixture(scope="module")
def programs():
    """A make_program that compiles once."""
    return compiled_programs()


@pytest.fixture(scope="module")
def whole(directory, programs, tmp_path_factory):
    """Workdir of an undisturbed run: 6 steps, checkpoints at 2, 4 and 6, the newest two kept."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(tiny(directory, **SETTINGS), str(workdir), ONE, make_program=programs)
    return workdir


class Interrupted(Exception):
    """Raised inside a run by `at_step`, in place of a kill."""


def raise_interrupted():
    raise Interrupted


def at_step(wanted, act):
    """A replacement of `next_batch` that calls `act` before the batch of one step."""
    take = training.next_batch

    def taking(iterator, step, checkpoints):
        if step == wanted:
            act()
        return take(iterator, step, checkpoints)

    return taking


@contextlib.contextmanager
def interrupted(step):
    """Interrupt runs in its body before the batch of a step is read; 0: no interruption."""
    with pytest.MonkeyPatch.context() as patch:
        if step:
            patch.setattr(training, "next_batch", at_step(step, raise_interrupted))
        yield


def rows(workdir, kind):
    return [row for row in read_rows(workdir / "metrics.jsonl") if row["kind"] == kind]


def steps(workdir):
    return manager.complete_steps(epath.Path(workdir))


def state_of(program, workdir, step):
    checkpoints = manager.Checkpoints(epath.Path(workdir), 9)
    state, _ = checkpoints.restore(step, program.state)
    checkpoints.close()
    return state
