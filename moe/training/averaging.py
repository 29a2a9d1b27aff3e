"""Averages of a run's weights, written as a workdir."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from moe.atomic_files import refuse_files
from moe.checkpoints import parameters as stored
from moe.checkpoints.pinned import base_step
from moe.checkpoints.workdir import read_config
from moe.config import Config, ConfigError, LoraConfig, MeshConfig
from moe.data.tokenizer_files import companions, find_tokenizer
from moe.models.adapters import merge
from moe.parallel.mesh import make_mesh
from moe.training.optimizer import averaged_weights
from moe.training.warm_start import optimizer_state


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
    stored.write_workdir(out, dataclasses.replace(config, lora=LoraConfig()), weights, biases, companions(workdir))
    what = f"the moving average at step {newest}" if ema else f"the mean of steps {', '.join(map(str, chosen))}"
    return f"{out}: {what} of {workdir}"


def _mean(workdir: str, config: Config, steps: Sequence[int]) -> Any:
    """Mean over checkpoints, of which only one at a time is in memory, besides the sum."""
    total = None
    for step in steps:
        tree = stored.read_parameters(workdir, config.model, step=step, dtype=np.float32)
        share = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) / len(steps), tree)
        total = share if total is None else jax.tree.map(np.add, total, share)
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), total)


def _moving_average(workdir: str, config: Config, step: int) -> Any:
    weights = averaged_weights(config.optimizer, optimizer_state(config, workdir, "--ema", step))
    if config.lora.rank:
        mesh = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
        base, _ = stored.read_base(config, base_step(config, workdir), mesh)
        weights = merge(base, weights, config.lora.alpha / config.lora.rank)
    return jax.tree.map(np.asarray, weights)
