"""Reinforcement learning on the model's own samples: sample, score, step, and resume to the bit.

A round samples ``group_size`` completions of each prompt with the parameters of its beginning, scores them, and trains
``updates`` steps on all of them. All draws of a round follow from the seed and its number, so a run that goes on from a
checkpoint repeats what it would have done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
import pydantic
from etils import epath

from moe.checkpoints.manager import Checkpoints
from moe.checkpoints.orbax_threads import no_background_tracebacks
from moe.checkpoints.pinned import pinned_steps
from moe.checkpoints.workdir import locked_workdir, refuse_other_run, write_run_files
from moe.config import ConfigError, ModelConfig, from_config_dict, to_dict
from moe.data import rollouts
from moe.models.sampling import Rollout, Sampler, make_sampler
from moe.models.state import TrainState
from moe.objectives.policy import Policy
from moe.system.atomic_files import write_atomic
from moe.system.fields import check_fields, raised_as_errors, require, setting
from moe.system.foreign_files import read_object, refuse
from moe.system.metrics_files import METRICS, MetricsWriter
from moe.system.sealed_folder import CONFIG
from moe.training import warm_start
from moe.training.batches import place
from moe.training.metric_writers import find_writers
from moe.training.metrics import mean_row, step_metrics
from moe.training.step import Program

#: Sizes of the rounds of a run, in its workdir.
ROUNDS = "rounds.json"


class Task(Protocol):
    """Prompts, and rewards that a program can verify."""

    def prompts(self, rng: np.random.Generator, count: int) -> list[np.ndarray]:
        """Token ids of ``count`` prompts."""
        ...

    def reward(self, prompt: np.ndarray, completion: np.ndarray) -> float:
        """Reward of a completion's token ids."""
        ...


@dataclasses.dataclass(frozen=True)
class Engine:
    """Sampler of rollouts: a model that may differ from the trained one, as a serving engine does.

    Attributes:
        sample: see :func:`moe.models.sampling.make_sampler`.
        load: maps the trained variables and a key of the round to the engine's variables.
    """

    sample: Sampler
    load: Callable[[dict[str, Any], Any], dict[str, Any]] = lambda variables, _: variables


def own_engine(model: ModelConfig, num_tokens: int, stop_tokens: Sequence[int] = ()) -> Engine:
    """The trained model itself."""
    return Engine(make_sampler(model, num_tokens, stop_tokens))


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Sizes of a round; ``train.batch_size`` must be the prompts times ``group_size``.

    Attributes:
        group_size: completions of a prompt.
        updates: train steps on the rollouts of a round.
        save_every: rounds between checkpoints.
    """

    group_size: int = setting(4, least=2)
    updates: int = setting(1, least=1)
    save_every: int = setting(10, least=1)

    def __post_init__(self) -> None:
        check_fields(self, "rounds.")


def make_groups(
    prompts: Sequence[np.ndarray], samples: Sequence[Rollout], task: Task, group_size: int
) -> list[rollouts.Group]:
    """Group the samples by prompt, with their rewards; the samples of a prompt are consecutive.

    Raises:
        ConfigError: a reward or another field of the rollouts is invalid.
    """

    def completion(prompt: np.ndarray, sample: Rollout) -> rollouts.Completion:
        with raised_as_errors("the task's reward"):
            reward = float(task.reward(prompt, sample.tokens))
        log_probs = np.minimum(sample.log_probs, 0).tolist()
        return rollouts.Completion(
            tokens=sample.tokens.tolist(), log_probs=log_probs, reward=reward, experts=sample.experts
        )

    engine = None if samples[0].experts is None else "tensorrt_llm"
    try:
        return [
            rollouts.Group(
                prompt_tokens=np.asarray(prompt).tolist(),
                completions=[completion(prompt, one) for one in samples[i * group_size : (i + 1) * group_size]],
                engine=engine,
            )
            for i, prompt in enumerate(prompts)
        ]
    except pydantic.ValidationError as error:
        refuse("the rollouts of a round", error)


def train_online(program: Program, workdir: str, task: Task, engine: Engine, rounds: Rounds) -> list[dict[str, Any]]:
    """Train ``train.num_steps`` steps, or continue the run in the workdir; under ``jax.set_mesh(program.mesh)``.

    A run begins with random parameters, or as ``start`` and ``lora`` of its config say.

    Args:
        program: from :func:`moe.training.step.build` with data.objective "policy". Its reference model must be
            read at the step that the run has pinned: ``read_teacher(config, mesh, step=pinned_steps(config,
            directory).teacher)``, with directory None for a new run.
        workdir: receives config.json, rounds.json, ``metrics.jsonl`` with a row a round, what ``train.writers`` make
            of it, and checkpoints. Other settings of what is logged, evaluated and saved when are not read.
        task: prompts and rewards.
        engine: samples the rollouts.
        rounds: sizes.

    Returns:
        The rows of this call.

    Raises:
        ConfigError: sizes that do not divide, a workdir of another config or other sizes, or invalid output of the
            task or the engine; or this is one of several processes, since samples and rewards are whole in each.
    """
    if jax.process_count() > 1:
        raise ConfigError(f"train_online: must run in one process, not in {jax.process_count()}")
    config, directory = program.config, epath.Path(workdir)
    count, batch_size = rounds.group_size, config.train.batch_size
    if batch_size % count or config.train.num_steps % rounds.updates:
        raise ConfigError(
            f"train.batch_size={batch_size} and train.num_steps={config.train.num_steps}: must be divisible by "
            f"group_size={count} and updates={rounds.updates}"
        )
    rampup = config.train.rampup_rows
    require(not rampup, "train.rampup_rows", rampup, "must be () where rollouts are sampled while training")
    writers = find_writers(config.train.writers)
    new = not (directory / CONFIG).exists()
    if new:
        warm_start.check(config)
    directory.mkdir(parents=True, exist_ok=True)
    objective = config.objective
    assert isinstance(objective, Policy)
    rows = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked_workdir(directory))
        if not new:
            refuse_other_run(from_config_dict(to_dict(config)), directory)  # normalised as a config read from a file is
        _pin_sizes(rounds, directory, new=new)
        stack.enter_context(no_background_tracebacks())
        pinned = pinned_steps(config, None if new else directory)
        pinned.note(directory)
        checkpoints = Checkpoints(directory, config.train.keep_checkpoints, config.train.keep_every)
        stack.callback(checkpoints.close)
        step, state = _begin(program, checkpoints, pinned.base)
        write_run_files(config, {}, directory, new=new)
        writer = stack.enter_context(contextlib.closing(MetricsWriter(directory, step, to_dict(config), writers)))
        for number in range(step // rounds.updates, config.train.num_steps // rounds.updates):
            rng = np.random.default_rng((config.seed, number))
            key = jax.random.fold_in(jax.random.key(config.seed), number)
            with raised_as_errors("the task's prompts"):
                prompts = [np.asarray(prompt) for prompt in task.prompts(rng, batch_size // count)]
            require(
                len(prompts) == batch_size // count,
                "the task's prompts",
                len(prompts),
                f"must be {batch_size // count}",
            )
            variables = engine.load(state.variables, jax.random.fold_in(key, 1))
            samples = engine.sample(variables, [prompt for prompt in prompts for _ in range(count)], key)
            require(len(samples) == batch_size, "the engine's samples", len(samples), f"must be {batch_size}")
            groups = make_groups(prompts, samples, task, count)
            state, metrics = _updates(program, state, objective, groups, rounds.updates)
            step = (number + 1) * rounds.updates
            reward = np.mean([one.reward for group in groups for one in group.completions])
            rows.append({"reward": float(reward)} | metrics)
            writer.write(step, "train", rows[-1])
            if (number + 1) % rounds.save_every == 0 or step == config.train.num_steps:
                writer.sync()
                checkpoints.save(step, state, None, {"rows": writer.rows[METRICS]}, None)
    return rows


def _begin(program: Program, checkpoints: Checkpoints, base: int | None) -> tuple[int, TrainState]:
    """(steps done, state after them) from the newest good checkpoint, or those of a new run."""
    restored = checkpoints.resume(program.state, None, print)
    if restored is None:
        return 0, warm_start.first_state(program, print, base)
    step, state = restored[:2]
    if program.config.lora.rank:  # the checkpoint holds only the adapters: add the base
        state = warm_start.first_state(program, base_step=base).restored(state)
    return step, state


def _pin_sizes(rounds: Rounds, directory: epath.Path, *, new: bool) -> None:
    """Record the sizes that determine the draws of a round. Raises ConfigError if the run was started with others."""
    sizes = {"group_size": rounds.group_size, "updates": rounds.updates}
    if new:
        write_atomic(directory / ROUNDS, json.dumps(sizes))
    elif (noted := read_object(directory / ROUNDS)) != sizes:
        raise ConfigError(f"{directory / ROUNDS}: the run has {noted}, not {sizes}; continue it with those")


def _updates(
    program: Program, state: TrainState, objective: Policy, groups: Sequence[rollouts.Group], updates: int
) -> tuple[TrainState, dict[str, Any]]:
    """Train ``updates`` steps on a round.

    The row is that of the first step, whose parameters sampled the round; ``skipped`` counts all updates.
    """
    examples = [example for group in groups for example in objective.of_group(group)]
    batch = place(objective.batch(examples), program.mesh)
    steps = []
    for _ in range(updates):
        state, metrics = program.train_step(state, batch)
        steps.append(metrics)
    rows = [step_metrics(metrics) for metrics in steps]
    return state, mean_row(rows[:1]) | {"skipped": sum(int(row["skipped"]) for row in rows)}
