"""The numbers of a suite as one long table, and back.

In: the workdirs of its runs. Out: ``results.csv``, a row per (variant, seed, step, quantity, domain, layer), which two
runs of a suite write byte for byte alike on one kind of machine; ``timing.csv``, what the clock said, which they do
not; and :class:`Results`, which the statistics read. The report is made from these two files alone.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from moe.lab.runner import DONE, Run
from moe.lab.suite import Suite
from moe.metrics_files import METRICS, TIMING, read_rows
from moe.routing import balancing

#: Domain under which the mean loss over a suite's primary domains stands.
PRIMARY = "primary"
COLUMNS = ("variant", "seed", "step", "quantity", "domain", "layer", "value")
TIMING_COLUMNS = ("variant", "seed", "seconds", "train_seconds", "tokens_per_second", "devices")
RESULTS, TIMES = "results.csv", "timing.csv"

Row = tuple[str, int, int, str, str, str, str]


class Results:
    """Values by what they are of.

    A key is (quantity, domain, layer): ``("loss", "primary", "")``, ``("max_violation", "", "2")``.
    """

    def __init__(self, rows: Iterable[Row], times: Iterable[dict[str, str]] = ()):
        self.variants: list[str] = []
        self.seeds: list[int] = []
        self._curves: dict[tuple[str, int, str, str, str], list[tuple[int, float]]] = {}
        for variant, seed, step, quantity, domain, layer, value in rows:
            if variant not in self.variants:
                self.variants.append(variant)
            if seed not in self.seeds:
                self.seeds.append(seed)
            key = (variant, seed, quantity, domain, layer)
            self._curves.setdefault(key, []).append((step, float(value)))
        self.seeds.sort()
        self.times = {(row["variant"], int(row["seed"])): row for row in times}

    @classmethod
    def read(cls, directory: Path) -> Results:
        """Of a folder that holds results.csv, and timing.csv if the clock is to be spoken of."""
        with (directory / RESULTS).open(newline="") as file:
            reader = csv.DictReader(file)
            rows = [
                (r["variant"], int(r["seed"]), int(r["step"]), r["quantity"], r["domain"], r["layer"], r["value"])
                for r in reader
            ]
        times: list[dict[str, str]] = []
        if (directory / TIMES).exists():
            with (directory / TIMES).open(newline="") as file:
                times = list(csv.DictReader(file))
        return cls(rows, times)

    def curve(
        self, variant: str, seed: int, quantity: str, domain: str = "", layer: str | int = ""
    ) -> list[tuple[int, float]]:
        """[(step, value)] in order; empty if it was not measured."""
        return self._curves.get((variant, seed, quantity, domain, str(layer)), [])

    def last(
        self, variant: str, seed: int, quantity: str, domain: str = "", layer: str | int = "", *, at: int | None = None
    ) -> float:
        """The value at the last step, or at the first one from ``at`` on; NaN if it was not measured."""
        curve = self.curve(variant, seed, quantity, domain, layer)
        if at is not None:
            curve = [point for point in curve if point[0] >= at][:1]
        return curve[-1][1] if curve else float("nan")

    def layers(self, variant: str, quantity: str) -> list[int]:
        """Layers for which a quantity was measured."""
        found = {key[4] for key in self._curves if key[0] == variant and key[2] == quantity and key[4]}
        return sorted(map(int, found))

    def quantities(self, variant: str) -> list[str]:
        """All that was measured of a variant, in order."""
        return list(dict.fromkeys(key[2] for key in self._curves if key[0] == variant))

    def over_layers(self, variant: str, seed: int, quantity: str, domain: str = "") -> float:
        """Mean over layers of the last value."""
        return float(
            np.mean(
                [self.last(variant, seed, quantity, domain, layer) for layer in self.layers(variant, quantity)]
                or [np.nan]
            )
        )

    def domains(self) -> list[str]:
        """Of the held-out text, without "all" and the primary mean."""
        names = []
        for key in self._curves:
            if key[2] == "loss" and key[3] not in ("", "all", PRIMARY, *names):
                names.append(key[3])
        return names

    def seconds_per_step(self, variant: str, seed: int) -> float:
        """By the clock; NaN if timing.csv is not there."""
        row = self.times.get((variant, seed))
        steps = self.curve(variant, seed, "loss", PRIMARY)
        return float(row["train_seconds"]) / steps[-1][0] if row and steps else float("nan")


def collect(suite: Suite, runs: Sequence[Run]) -> tuple[list[Row], list[dict[str, Any]]]:
    """(rows of results.csv, rows of timing.csv) of the runs that are done."""
    rows: list[Row] = []
    times = []
    for run in (run for run in runs if run.done):
        done = json.loads((run.directory / DONE).read_text())

        def add(
            step: int, quantity: str, value: float, domain: str = "", layer: int | str = "", run: Run = run
        ) -> None:
            rows.append((run.variant, run.seed, step, quantity, domain, str(layer), f"{value:.7g}"))

        for quantity, value in suite.costs(run.variant).items():
            add(0, quantity, value)
        losses: dict[int, dict[str, float]] = {}
        for row in read_rows(epath.Path(run.directory) / METRICS):
            if row["kind"] == "train":
                add(row["step"], "train_loss", row["cross_entropy"])
                for name in ("fraction_tokens_dropped", "router_z_loss"):
                    for layer, value in enumerate(row.get(name, [])):
                        add(row["step"], f"train_{name}", value, layer=layer)
            elif row["kind"].startswith("heldout/"):
                domain = row["kind"].removeprefix("heldout/")
                add(row["step"], "loss", row["loss"], domain)
                losses.setdefault(row["step"], {})[domain] = row["loss"]
                if domain == "all" and "expert_load" in row:
                    _add_routing(add, row)
        for step, by_domain in losses.items():
            add(step, "loss", statistics.fmean(by_domain[domain] for domain in suite.primary), PRIMARY)
        for name, value in sorted(done["probes"].items()):
            quantity, _, layer = name.partition("@")
            add(run.config.train.num_steps, quantity, value, layer=layer)
        timing = [row for row in read_rows(epath.Path(run.directory) / TIMING) if row["kind"] == "timing"]
        steps = [row["step"] for row in timing]
        lengths = np.diff([0, *steps])
        times.append(
            {
                "variant": run.variant,
                "seed": run.seed,
                "seconds": f"{done['seconds']:.1f}",
                # The first window compiles; its steps are counted at the median's pace.
                "train_seconds": f"{statistics.median(r['step_seconds'] for r in timing) * lengths.sum():.2f}",
                "tokens_per_second": f"{statistics.median(r['tokens_per_second'] for r in timing):.0f}",
                "devices": done["devices"],
            }
        )
    return rows, times


def _add_routing(add: Any, row: dict[str, Any]) -> None:
    load = np.asarray(row["expert_load"])
    per_layer = {
        "max_violation": balancing.max_violation(load),
        "dead_experts": balancing.dead_experts(load),
        "least_load": load.min(-1) * load.shape[-1],
        "router_entropy": row["router_entropy"],
        "fraction_tokens_dropped": row["fraction_tokens_dropped"],
        "router_z_loss": row["router_z_loss"],
    }
    for name, values in per_layer.items():
        for layer, value in enumerate(values):
            add(row["step"], name, float(value), layer=layer)


def write(directory: Path, rows: Sequence[Row], times: Sequence[dict[str, Any]]) -> None:
    """results.csv and timing.csv."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / RESULTS).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    with (directory / TIMES).open("w", newline="") as file:
        times_writer: csv.DictWriter[str] = csv.DictWriter(file, TIMING_COLUMNS, lineterminator="\n")
        times_writer.writeheader()
        times_writer.writerows(times)
