"""The numbers of a suite as one long table.

``results.csv`` has a value per (variant, steps, learning_rate, seed, step, quantity, domain, layer) and loads with
``pandas.read_csv``. ``compared`` is False for the runs of a sweep and of learning rates that lost. The table is made
from the records alone, byte for byte the same on every machine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from etils import epath

from moe.checkpoints import manager
from moe.lab.records import DIVERGED, Record
from moe.routing import balancing
from moe.system.atomic_files import write_atomic
from moe.system.metrics_files import METRICS, read_rows

RESULTS = "results.csv"
COLUMNS = ("variant", "steps", "learning_rate", "seed", "compared", "step", "quantity", "domain", "layer", "value")

#: step, quantity, domain, layer, value
Row = tuple[int, str, str, str, float]


def checkpoint_steps(directory: Path, every: int = 1) -> list[int]:
    """Steps of a run's complete checkpoints: multiples of ``every`` and the last one, without those saved at a stop."""
    steps = manager.complete_steps(epath.Path(directory))
    return [step for step in steps if step % every == 0 or step == steps[-1]]


def run_rows(directory: Path) -> list[Row]:
    """Logged values of a run: training loss and drops, and the routers' statistics on held-out text."""
    rows: list[Row] = []
    for row in read_rows(epath.Path(directory) / METRICS):
        if row["kind"] == "train":
            rows.append((row["step"], "train_loss", "", "", row["cross_entropy"]))
            rows += _per_layer(row, "train_", {name: row.get(name, []) for name in _TRAINING})
        elif row["kind"] == "heldout/all" and "expert_load" in row:
            load = np.asarray(row["expert_load"])
            rows += _per_layer(row, "", {
                "max_violation": balancing.max_violation(load),
                "dead_experts": balancing.dead_experts(load),
                "least_load": load.min(-1) * load.shape[-1],
                **{name: row[name] for name in ("router_entropy", "fraction_tokens_dropped", "router_z_loss")},
            })  # fmt: skip
    return rows


_TRAINING = ("fraction_tokens_dropped", "router_z_loss", "max_violation")


def _per_layer(row: dict[str, Any], prefix: str, quantities: dict[str, Any]) -> list[Row]:
    return [
        (row["step"], f"{prefix}{name}", "", str(layer), float(value))
        for name, values in quantities.items()
        for layer, value in enumerate(values)
    ]


def frame(records: Iterable[Record], compared: Collection[str]) -> pd.DataFrame:
    """The long table of some runs; ``compared`` are the hashes of the runs that comparisons and claims use."""
    rows = []
    for record in records:
        key = (*record.key, record.run in compared)
        rows += [(*key, 0, name, "", "", value) for name, value in record.costs.items()]
        rows += [(*key, *row) for row in record.rows]
        rows.append((*key, record.steps, "diverged", "", "", float(record.status == DIVERGED)))
        for name, value in sorted(record.probes.items()):
            quantity, _, layer = name.partition("@")
            rows.append((*key, record.steps, quantity, "", layer, value))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def write(directory: Path, records: Iterable[Record], compared: Collection[str]) -> None:
    """Write results.csv, atomically."""
    write_atomic(directory / RESULTS, frame(records, compared).to_csv(index=False, float_format="%.7g").encode())
