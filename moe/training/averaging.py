"""Averages of a run's weights, written as a workdir."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from moe.checkpoints import parameters as stored
from moe.checkpoints import streamed
from moe.checkpoints.pinned import base_step
from moe.checkpoints.workdir import read_config
from moe.config import Config, ConfigError, LoraConfig
from moe.data.tokenizer_files import companions, find_tokenizer
from moe.models.adapters import merge
from moe.models.factory import abstract_parameters
from moe.parallel.target import host_device
from moe.system.atomic_files import refuse_files
from moe.training.optimizer import averaged_weights, find_average
from moe.training.optimizer_files import read_optimizer


def write_average(workdir: str, out: str, steps: Sequence[int], *, ema: bool) -> str:
    """Write a workdir with averaged weights and the run's config and tokenizer; return a one-line summary.

    Selection biases are those of the newest checkpoint.

    Args:
        steps: of the checkpoints to average; empty: all that are there.
        ema: take the moving average of the newest checkpoint instead.

    Raises:
        ConfigError: a checkpoint or the tokenizer is missing, ``out`` holds files, or the run keeps no moving average.
    """
    config = read_config(workdir)
    find_tokenizer(workdir)  # a model without one could not be evaluated
    refuse_files(out)
    if ema and not config.optimizer.ema_decay:
        raise ConfigError(f"--ema: {workdir} was trained with optimizer.ema_decay=0 and keeps no moving average")
    there = stored.saved_steps(workdir)
    chosen, newest = sorted(set(steps)) or there, there[-1]  # the run may save further ones meanwhile
    weights = _moving_average(workdir, config, newest) if ema else _mean(workdir, config, chosen)
    biases = stored.read_biases(workdir, config.model, step=newest)
    streamed.write_workdir(out, dataclasses.replace(config, lora=LoraConfig()), weights, biases, companions(workdir))
    what = f"the moving average at step {newest}" if ema else f"the mean of steps {', '.join(map(str, chosen))}"
    return f"{out}: {what} of {workdir}"


def _mean(workdir: str, config: Config, steps: Sequence[int]) -> Any:
    """Mean over checkpoints; of a run that trains adapters, the base with the mean of A and that of B."""
    for step in steps:
        stored.chosen_step(workdir, step)
    if config.lora.rank:
        trees = [stored.read_adapters(workdir, config, step=step, dtype=np.float32) for step in steps]
        mean_of = jax.tree.map(lambda *arrays: np.mean(arrays, axis=0, dtype=np.float64).astype(np.float32), *trees)
        return _with_base(workdir, config, mean_of)

    def mean(path: tuple[str, ...]) -> np.ndarray:
        total = None
        for step in steps:
            tree = stored.read_parameters(workdir, config.model, step=step, dtype=np.float32, only=path)
            (array,) = jax.tree.leaves(tree)
            total = array.astype(np.float64) if total is None else np.add(total, array, out=total)
        assert total is not None
        total /= len(steps)
        return total.astype(np.float32)

    return _one_by_one(config, mean)


def _moving_average(workdir: str, config: Config, step: int) -> Any:
    """The moving average, merged with the base of a run that trains adapters."""
    average = find_average(read_optimizer(config, workdir, "--ema", step, average_only=True))

    def of_run(path: tuple[str, ...]) -> np.ndarray:
        total = functools.reduce(operator.getitem, path, average.total)
        with jax.default_device(host_device()):
            return np.asarray(averaged_weights(config.optimizer, average._replace(total=total)))

    if not config.lora.rank:
        return _one_by_one(config, of_run)
    with jax.default_device(host_device()):
        return _with_base(workdir, config, averaged_weights(config.optimizer, average))


def _with_base(workdir: str, config: Config, adapters: Any) -> Any:
    """The base of a run's adapters with averaged ones. What is trained is averaged, A and B, as the run's own
    evaluations of its moving average do: the product of two means, not the mean of the products."""
    base = {"step": base_step(config, workdir), "dtype": np.float32}

    def merged(path: tuple[str, ...]) -> np.ndarray:
        tree = stored.read_parameters(config.start.checkpoint, config.model, only=path, **base)
        with jax.default_device(host_device()):
            (array,) = jax.tree.leaves(merge(tree, adapters, config.lora.alpha / config.lora.rank))
        return np.asarray(array)

    return _one_by_one(config, merged)


def _one_by_one(config: Config, compute: Callable[[tuple[str, ...]], np.ndarray]) -> Any:
    """A model's parameters, each computed from its key path when it is written, so that only one is in memory."""

    def written(path: Any, parameter: jax.ShapeDtypeStruct) -> streamed.Streamed:
        names = tuple(key.key for key in path)
        return streamed.in_parts(parameter.shape, np.dtype(np.float32), lambda: compute(names))

    return jax.tree_util.tree_map_with_path(written, nnx.to_pure_dict(abstract_parameters(config.model)))
