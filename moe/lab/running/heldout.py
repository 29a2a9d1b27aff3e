"""Held-out losses row by row, on batches mixed over domains."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from moe.analysis import probes
from moe.checkpoints import parameters
from moe.config import Config
from moe.data import pipeline
from moe.training.batches import Batch, forward, place
from moe.training.losses import linear_cross_entropy
from moe.training.step import Program


@dataclasses.dataclass(frozen=True)
class MixedRows:
    """Held-out rows, alternating between domains so that every batch is mixed as in training.

    Attributes:
        batches: of the train step's microbatch size; the last one is padded.
        domains: domain of each row, without padding rows.
        targets: number of targets of each row.
    """

    batches: list[dict[str, np.ndarray]]
    domains: list[str]
    targets: np.ndarray


def mixed_rows(
    prepared: pipeline.Prepared, config: Config, rows_per_domain: int, domains: Sequence[str] = ()
) -> MixedRows:
    """Up to ``rows_per_domain`` evenly spaced held-out rows of each domain (default: all), one of each in turn."""
    data = dataclasses.replace(config.data, heldout_rows=rows_per_domain)
    by_domain = {}
    for domain in domains or prepared.domains:
        single = pipeline.heldout_batches(prepared, data, domain=domain, batch_size=1)
        by_domain[domain] = [row for row in single if (row["targets"] >= 0).any()]
    picked = [
        (domain, rows[index])
        for index in range(rows_per_domain)
        for domain, rows in by_domain.items()
        if index < len(rows)
    ]
    size = config.train.microbatch_rows
    rows = [row for _, row in picked]
    padding = {
        key: np.full_like(value, -1) if key == "targets" else value * (not key.endswith("segment_ids"))
        for key, value in rows[0].items()
    }
    rows += [padding] * (-len(rows) % size)
    batches = [
        {key: np.concatenate([row[key] for row in rows[start : start + size]]) for key in padding}
        for start in range(0, len(rows), size)
    ]
    targets = np.asarray([int((row["targets"] >= 0).sum()) for _, row in picked])
    return MixedRows(batches, [domain for domain, _ in picked], targets)


def with_unseen(prepared: pipeline.Prepared, config: Config, unseen: Sequence[str]) -> pipeline.Prepared:
    """Add embedded domains that no run is trained on to the held-out documents of a run."""
    if not unseen:
        return prepared
    data = dataclasses.replace(config.data, dataset="embedded", domains=tuple(unseen), weights=())
    further = pipeline.prepare(
        data,
        config.model.vocab_size,
        tokenizer=prepared.tokenizer,
        progress=lambda _: None,
        objective=prepared.objective,
    )
    return pipeline.Prepared(
        prepared.tokenizer,
        prepared.domains + further.domains,
        prepared.train | further.train,
        prepared.heldout | further.heldout,
        prepared.versions | further.versions,
        prepared.objective,
    )


def dropless(config: Config) -> Config | None:
    """The config for evaluation without drops; None for a gate that has no dropless form."""
    moe = config.model.moe
    if moe.gate is None:
        return config
    if any(gate.experts_choose or gate.slots_per_expert for gate in moe.gates):
        return None
    return probes.dropless(config)


class RowLosses:
    """Mean nats per target of every held-out row, for checkpoints of one arm; compiled once."""

    def __init__(self, program: Program, rows: MixedRows):
        """``program`` may be of any run of the arm."""
        self.rows, self._program = rows, program
        self._losses = jax.jit(functools.partial(_row_losses, program))

    def __call__(self, directory: Path, step: int) -> np.ndarray:
        """[rows] losses of the checkpoint of a step."""
        program = self._program
        variables = parameters.read_variables(str(directory), program.config.model, mesh=program.mesh, step=step)
        sums = [self._losses(variables, place(batch, program.mesh)) for batch in self.rows.batches]
        return np.concatenate([np.asarray(s) for s in sums])[: len(self.rows.targets)] / self.rows.targets


def _row_losses(program: Program, variables: dict[str, Any], batch: Batch) -> Float[Array, " B"]:
    """Summed nats of each row."""
    model = program.model(variables)
    hidden = forward(model, batch).hidden
    matrix = model.output_matrix()

    def of_row(row: Float[Array, "T D"], targets: Int[Array, " T"]) -> Array:
        nll, _ = linear_cross_entropy(row[None], matrix, targets[None])
        return nll

    return jax.vmap(of_row)(jnp.asarray(hidden), batch["targets"])
