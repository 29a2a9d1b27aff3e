"""Metrics of logged steps: conversion, averages, and time per step."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import numpy as np

from moe.config import Config
from moe.models import flops
from moe.parallel import target
from moe.parallel.mesh import AXES, axis_size
from moe.routing import balancing
from moe.system.metrics_files import to_python
from moe.training import profiling
from moe.training.update import TrainMetrics

#: Numbers of an objective on answers: name in rows → (name on the terminal and in the report, format).
TERMS = {
    "preference_margin": ("margin", "{:.3f}"),
    "preference_accuracy": ("accuracy", "{:.1%}"),
    "policy_ratio": ("ratio", "{:.3f}"),
    "policy_clipped": ("clipped", "{:.1%}"),
    "policy_extreme": ("extreme ratios", "{:.1%}"),
    "policy_old_kl": ("KL from the sampler", "{:.4f}"),
    "policy_kl": ("KL from the reference", "{:.4f}"),
}


def shown_terms(row: dict[str, Any]) -> dict[str, str]:
    """Name → text of the numbers of :data:`TERMS` in a logged row."""
    return {name: form.format(row[key]) for key, (name, form) in TERMS.items() if key in row}


def step_metrics(metrics: TrainMetrics | dict[str, Any]) -> dict[str, Any]:
    """One step's metrics as a flat JSON dict; waits for the step. Metrics from a checkpoint are JSON already."""
    if isinstance(metrics, dict):
        return metrics
    values = {field.name: getattr(metrics, field.name) for field in dataclasses.fields(metrics)}
    layers, terms = values.pop("layers"), values.pop("terms")
    return to_python(values | terms | (layers.metrics() if layers is not None else {}))


def mean_row(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Average the metrics of several steps; per-layer values derived from the load use the mean load.

    Steps with a skipped update are counted in ``skipped`` and excluded from the means, unless all were skipped.
    ``broken_tokens`` is the sum over all steps.
    """
    averaged = [values for values in steps if not values["skipped"]] or steps
    row = {name: np.mean([values[name] for values in averaged], axis=0).tolist() for name in steps[0]}
    row["skipped"] = sum(int(values["skipped"]) for values in steps)
    if "expert_load" in row:
        row["broken_tokens"] = np.sum([values["broken_tokens"] for values in steps], axis=0).tolist()
        load = np.asarray(row["expert_load"])
        row["max_violation"] = balancing.max_violation(load).tolist()
        row["dead_experts"] = balancing.dead_experts(load).tolist()
    return row


class StepClock:
    """Seconds per step, excluding evaluation and saving, and the share spent waiting for data.

    As a context manager it measures the wait for one batch.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start a new interval."""
        self._start = time.perf_counter()
        self._waited = 0.0
        self._steps = 0

    def __enter__(self) -> None:
        self._steps += 1
        self._entered = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        self._waited += time.perf_counter() - self._entered

    @property
    def steps(self) -> int:
        """Steps of the current interval; 1 before the first has begun."""
        return max(self._steps, 1)

    def lap(self) -> tuple[float, float]:
        """(seconds per step, seconds of waiting per step) of the interval; starts a new one."""
        result = (time.perf_counter() - self._start) / self.steps, self._waited / self.steps
        self.restart()
        return result


class Throughput:
    """Tokens per second and MFU from seconds per step."""

    def __init__(self, config: Config):
        self._tokens = config.tokens_per_step
        self._flops = flops.train_flops(config)
        self._dtype = config.model.dtype
        self._datasheet = target.current().peak_flops or 0.0

    @functools.cached_property
    def _peak(self) -> float:
        """FLOP/s of all devices, measured once, on each at the same time."""
        return profiling.measured_matmul_rate(self._dtype) * axis_size(*AXES)

    def row(self, seconds: float, waited: float, batches: float = 1.0) -> dict[str, float]:
        """Row for ``timing.jsonl``; the first call measures the matmul rate, the denominator of ``mfu``.

        Where the datasheet's peak is known, ``mfu_datasheet`` has that as its denominator.

        Args:
            seconds: per step.
            waited: of these, for data.
            batches: rows per step as a share of ``train.batch_size``.
        """
        tokens, executed = batches * self._tokens, batches * self._flops
        row = {
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": executed / seconds / self._peak,
            "data_wait_share": waited / seconds,
        }
        if self._datasheet:
            row["mfu_datasheet"] = executed / seconds / (self._datasheet * axis_size(*AXES))
        return row
