"""Start of an open run: data, model, first files, and the state that training goes on from."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from moe.checkpoints.manager import Checkpoints
from moe.checkpoints.noted_code import edited_code, note_code, other_values
from moe.checkpoints.orbax_threads import no_background_tracebacks
from moe.checkpoints.pinned import pinned_steps
from moe.checkpoints.workdir import (
    REPORT,
    Contents,
    contents,
    disk_errors,
    latest_change,
    locked_workdir,
    record_changes,
    write_run_files,
)
from moe.config import Config, ConfigError, sparse_layers
from moe.data import pipeline
from moe.data.preparation import describe_shares
from moe.dispatch import modes
from moe.models import flops
from moe.parallel.mesh import local_rows
from moe.system.metrics_files import METRICS, iterate_rows
from moe.training import profiling, warm_start
from moe.training.agreement import refuse_other_code, refuse_other_inputs, refuse_other_workdir
from moe.training.evaluation import check_domains, load_heldout
from moe.training.loop import Start
from moe.training.open_run import OpenRun
from moe.training.own_code import PureCode
from moe.training.own_parts import probe_parts
from moe.training.progress import Console
from moe.training.report import prompts
from moe.training.step import Program, build
from moe.training.teacher import read_teacher


def start_run(
    run: OpenRun,
    console: Console,
    resources: contextlib.ExitStack,
    make_program: Callable[..., Program] = build,
) -> Start:
    """Prepare the data, build the model, write the first files, and restore or make the state.

    Args:
        resources: receives what stays open while the run trains: the mesh as context, the reader of the data, the lock
            of a new workdir.
        make_program: see :func:`moe.training.train.train`.

    Raises:
        ConfigError: before anything is written, if data, model or start do not fit; later, if the disk fails.
    """
    config, directory = run.config, run.directory
    prepared = _prepared(run, console)
    resources.enter_context(jax.set_mesh(run.mesh))
    resources.enter_context(no_background_tracebacks())
    resources.enter_context(profiling.out_of_memory_as_config_error())
    console.stage("making the model")
    pinned = pinned_steps(config, directory if run.contents.is_run else None)
    teacher = read_teacher(config, run.mesh, prepared.tokenizer, pinned.teacher)
    program = make_program(config, run.mesh, teacher)
    probe_parts(config)
    own_code = PureCode(program, config)
    computed = own_code.computed(prepared.examples)
    refuse_other_code(config, computed)
    profiling.refuse_too_large(program, teacher and teacher[1])
    size = config.train.rows_read
    rows = local_rows(run.mesh, size)
    iterator = pipeline.train_iterator(prepared, config.data, batch_size=size, seed=config.seed, rows=rows)
    resources.callback(iterator.close)  # its thread would abort the process if it were still at work at the exit
    step, saved = 0, {}
    state = None
    if run.contents < Contents.CHECKPOINTS:
        iterator.start_prefetch()  # reads the first batch while the rest is built
    if run.contents < Contents.CHECKPOINTS or config.lora.rank:  # a checkpoint of adapters lacks their base
        state = warm_start.first_state(program, console.say, pinned.base)
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        if run.contents is Contents.NOTHING:
            resources.enter_context(locked_workdir(directory))
        if not run.contents.is_run and jax.process_index() == 0 and contents(directory).is_run:
            raise ConfigError(f"--workdir={directory}: another run was started in it just now; use another one")
        pinned.note(directory)
        write_run_files(config, prepared.tokenizer.files, directory, new=not run.contents.is_run)
        checkpoints = Checkpoints(
            directory, config.train.keep_checkpoints, config.train.keep_every, save_every=config.train.save_every
        )
        refuse_other_workdir(directory)  # again, since process 0 has now written the config of a new run
    console.say(_description(program))
    if program.about:
        console.say(program.about)
    if config.data.weights:
        console.say(describe_shares(config.data, prepared.domains))
    with disk_errors(directory):
        if run.contents is Contents.CHECKPOINTS:
            checkpoint = checkpoints.resume(program.state, iterator, console.say)
            if checkpoint is None:
                raise ConfigError(f"--workdir={directory}: its checkpoints were removed while the run started")
            step, restored, saved = checkpoint
            state = restored if state is None else state.restored(restored)
            console.say(f"resuming {directory} at step {step} of {config.train.num_steps}")
        changes = run.changes | other_values(computed, directory)
        _apply_changes(config, changes, step, directory, console.say)
        note_code(config, directory, computed)
    assert state is not None  # made above, or restored
    heldout = functools.cache(lambda: load_heldout(program, prepared))  # at the first evaluation
    return Start(program, prepared, iterator, heldout, checkpoints, directory, step, state, saved, own_code)


def _prepared(run: OpenRun, console: Console) -> pipeline.Prepared:
    """Documents and tokenizer, which all processes share, and of which the report can show some."""
    console.stage("preparing the data")
    config = run.config
    prepared = pipeline.prepare_run(config, tokenizer=warm_start.tokenizer(config, run.directory), progress=console.say)
    check_domains(prepared)
    if console.shows:
        for line in pipeline.describe_sizes(prepared, config.data):
            console.say(line)
    refuse_other_inputs(config, prepared)
    if config.train.sample_tokens:
        prompts(config, prepared)
    return prepared


def _description(program: Program) -> str:
    """Lines on model and mesh, and on how assignments reach their experts."""
    model = program.config.model
    total, active = flops.count_parameters(model)
    axes = " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    text = f"model: {total:,} parameters, {active:,} active per token; mesh: {axes} ({jax.default_backend()})"
    if model.memory.layers:
        _, tables = flops.sparse_parameters(model)
        text += f"\nmemory of n-grams: {tables / (total - active):.1%} of the {total - active:,} sparse parameters"
    if not any(sparse_layers(model)):
        return text
    hosts = model.moe.hosts(program.mesh.shape["expert"])
    if hosts > 1 and model.sent_precision != "none":
        text += (
            f"\nrows to experts on other hosts (model.moe.exchange_hosts={model.moe.exchange_hosts}) are rounded to "
            f"{model.sent_precision}; on another mesh those would be other rows"
        )
    return f"{text}\ndispatch: {modes.describe(model.moe.dispatch)}"


def _apply_changes(
    config: Config, changes: dict[str, list[Any]], step: int, directory: epath.Path, say: Callable[[str], Any]
) -> None:
    """Record changed settings, and edits of the user's modules; a report of fewer steps is deleted, since it will be
    written again."""
    changes = changes | edited_code(config, directory)
    if step > config.train.num_steps:
        raise ConfigError(f"train.num_steps={config.train.num_steps}: the run has done {step} steps already")
    if step == config.train.num_steps and "train.num_steps" in changes:
        kinds = {row["kind"] for row in iterate_rows(directory / METRICS) if row["step"] == step}
        for kind, missing in (("heldout/all", "evaluated"), ("train", "logged")):  # the report shows both rows
            if kind not in kinds:
                raise ConfigError(f"train.num_steps={step}: this step was not {missing}; end the run at a later one")
    if step < (latest := latest_change(directory)):
        say(f"steps {step + 1} to {latest} are trained again, with the settings that were changed at step {latest}")
    record_changes(config, changes, step, directory)
    for name, (old, new) in changes.items():
        say(f"changed from step {step} on: {name} {old!r} to {new!r}")
    if step < config.train.num_steps and jax.process_index() == 0:
        (directory / REPORT).unlink(missing_ok=True)
