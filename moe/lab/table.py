"""Look-ups in the records of a suite, at the learning rate of each arm."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from moe.lab import schedule
from moe.lab.expressions import Term, parse, variants_of
from moe.lab.records import DIVERGED, PRIMARY, Record
from moe.lab.suite import Suite


class MissingError(LookupError):
    """A run or a quantity that the records do not hold."""


class Table:
    """Values of the runs that comparisons and claims are about, at each arm's learning rate.

    Their seeds are the suite's and, unless it has fixed ones, those of other suites' runs of the same arms.
    """

    def __init__(self, suite: Suite, records: Iterable[Record]):
        """``records`` may hold runs of other suites; :attr:`records` are those of this one."""
        records = list(records)
        self.suite, self.plan = suite, schedule.PlannedRuns(suite, records)
        self.choices = self.plan.choices
        others = () if suite.fixed_seeds else (record.seed for record in records)
        seeds = sorted({*suite.seeds, *others} - suite.reserved_seeds)
        self._runs: dict[tuple[str, int, int], Record] = {}
        for name, steps, seed in itertools.product(suite.variants, suite.steps, seeds):
            record = self.plan.record(self.plan.key(name, steps, seed))
            if record is not None:
                self._runs[name, steps, seed] = dataclasses.replace(record, variant=name, seed=seed)
        used = {record.run for record in self._runs.values()}
        self.records = [*self._runs.values(), *(r for r in self.plan.swept() if r.run not in used)]
        self._curves: dict[tuple[str, int, int], dict[tuple[str, str, str], list[tuple[int, float]]]] = {}

    @property
    def variants(self) -> list[str]:
        """Arms with a run, in the suite's order."""
        return [name for name in self.suite.variants if any(key[0] == name for key in self._runs)]

    @property
    def horizons(self) -> list[int]:
        """Horizons with a run, ascending."""
        return sorted({key[1] for key in self._runs})

    @property
    def used(self) -> list[Record]:
        """The records of this table's runs."""
        return list(self._runs.values())

    def only(self, seeds: Collection[int]) -> Table:
        """Copy of the table with only the runs of these seeds."""
        found = copy.copy(self)
        found._runs = {key: run for key, run in self._runs.items() if key[2] in seeds}
        found._curves = {}
        return found

    def seeds(self, steps: int, *variants: str) -> list[int]:
        """Seeds of a horizon that all of these arms have."""
        of = [{seed for name, horizon, seed in self._runs if (name, horizon) == (arm, steps)} for arm in variants]
        return sorted(set.intersection(*of)) if of else []

    def longest(self, *variants: str) -> int:
        """Longest horizon at which all of these arms share a seed; 0 if there is none."""
        return max((steps for steps in self.horizons if self.seeds(steps, *variants)), default=0)

    def fullest(self, variant: str) -> int:
        """Horizon for which an arm has the most seeds, the longest among equals; 0 without runs."""
        return max(self.horizons, key=lambda steps: (len(self.seeds(steps, variant)), steps), default=0)

    def record(self, variant: str, steps: int, seed: int) -> Record:
        """One run.

        Raises:
            MissingError: there is no such run.
        """
        try:
            return self._runs[variant, steps, seed]
        except KeyError:
            raise MissingError(f"no run of {variant} at {steps:,} steps with seed {seed}") from None

    def losses(self, variant: str, steps: int) -> dict[int, float]:
        """Seed → primary loss of an arm's runs; infinite for a diverged one."""
        return {seed: self.record(variant, steps, seed).primary_loss for seed in self.seeds(steps, variant)}

    def diverged(self, variant: str, steps: int) -> list[int]:
        """Seeds of the arm's diverged runs."""
        return [s for s in self.seeds(steps, variant) if self.record(variant, steps, s).status == DIVERGED]

    def curve(
        self, variant: str, steps: int, seed: int, quantity: str, domain: str = "", layer: str = ""
    ) -> list[tuple[int, float]]:
        """[(step, value)] in order; empty if it was not measured."""
        key = (variant, steps, seed)
        if key not in self._curves:
            curves = self._curves.setdefault(key, {})
            for step, name, where, depth, value in self.record(*key).rows:
                curves.setdefault((name, where, depth), []).append((step, value))
        return self._curves[key].get((quantity, domain, layer), [])

    def dropped(self, variant: str, steps: int, layer: str = "") -> float:
        """Share of assignments dropped over the whole training, mean over seeds; 0 for a dense arm.

        ``layer``: one MoE layer instead of the mean over all.
        """
        quantity = "train_fraction_tokens_dropped"
        curves = [
            self.curve(variant, steps, seed, quantity, "", name)
            for seed in self.seeds(steps, variant)
            for name in ([layer] if layer else self.layers(variant, quantity))
        ]
        values = [value for curve in curves for _, value in curve]
        return float(np.mean(values)) if values else 0.0

    def layers(self, variant: str, quantity: str) -> list[str]:
        """Layers for which a quantity was logged or probed."""
        found = set()
        for record in self.used:
            if record.variant == variant:
                found |= {layer for _, name, _, layer, _ in record.rows if name == quantity}
                found |= {name.partition("@")[2] for name in record.probes if name.partition("@")[0] == quantity}
        return sorted(found - {""}, key=int)

    def value(self, steps: int, seed: int, term: Term) -> float:
        """A term without its factor; infinite if it is the loss of a diverged run.

        Raises:
            MissingError: the run or the quantity is missing.
        """
        record = self.record(term.variant, steps, seed)
        if record.status == DIVERGED and term.quantity in ("loss", "own_loss"):
            return math.inf
        layers = self.layers(term.variant, term.quantity)
        if term.layers.endswith("-"):
            layers = [layer for layer in layers if int(layer) >= int(term.layers[:-1])]
        elif term.layers:
            layers = [term.layers]
        domain = PRIMARY if term.quantity in ("loss", "own_loss") else ""
        return float(np.mean([self._single(record, term, domain, layer) for layer in layers or [""]]))

    def _single(self, record: Record, term: Term, domain: str, layer: str) -> float:
        name = f"{term.quantity}@{layer}" if layer else term.quantity
        if name in record.probes:
            return record.probes[name]
        curve = self.curve(record.variant, record.steps, record.seed, term.quantity, domain, layer)
        if not curve or (term.first and curve[0][0] == record.steps):  # measured at the end only, as in a sweep's runs
            raise MissingError(f"no {term.quantity} of {term.variant}")
        return curve[0 if term.first else -1][1]

    def values(self, steps: int, expression: str | Sequence[Term]) -> dict[int, float]:
        """Seed → value of a linear combination, for the seeds that all its arms share and whose runs have every
        quantity: a probe may have been measured on some of the runs only.

        Raises:
            MissingError: no seed, or a quantity is missing from all of them.
        """
        terms = parse(expression) if isinstance(expression, str) else expression
        arms = variants_of(terms)
        seeds = self.seeds(steps, *arms)
        missing = MissingError(f"no seed at {steps:,} steps that {', '.join(arms)} share")
        found = {}
        for seed in seeds:
            try:
                parts = [t.factor * (self.value(steps, seed, t) if t.quantity else 1.0) for t in terms]
            except MissingError as error:
                missing = error
                continue
            found[seed] = float(sum(parts))  # +inf or -inf if one side diverged, NaN if both did
        if not found:
            raise missing
        return found

    def over_training(self, steps: int, expression: str | Sequence[Term]) -> dict[int, list[float]]:
        """Step → value per seed of a linear combination of primary losses, at the evaluations that all runs share.

        Diverged runs, which have no held-out loss, are left out.

        Raises:
            ValueError: a quantity that is not "loss".
        """
        terms = parse(expression) if isinstance(expression, str) else expression
        if any(term.quantity not in ("", "loss") for term in terms):
            raise ValueError(f"{expression}: only losses can be followed over training")
        found: list[dict[int, float]] = []
        for seed in self.seeds(steps, *variants_of(terms)):
            curves = [dict(self.curve(term.variant, steps, seed, "loss", PRIMARY)) for term in terms if term.quantity]
            if all(curves):  # a diverged run has no held-out loss
                constant = sum(term.factor for term in terms if not term.quantity)
                factors = [term.factor for term in terms if term.quantity]
                shared = set.intersection(*map(set, curves))
                found.append(
                    {
                        step: constant + sum(f * curve[step] for f, curve in zip(factors, curves, strict=True))
                        for step in shared
                    }
                )
        shared = set.intersection(*map(set, found)) if found else set()
        return {step: [of_seed[step] for of_seed in found] for step in sorted(shared)}

    def row_differences(self, variant: str, baseline: str, steps: int) -> tuple[np.ndarray, list[str]]:
        """([seeds, rows] loss differences of primary held-out rows, domain of each row)."""
        primary, pairs = set(self.suite.primary_domains), []
        seeds = self.seeds(steps, variant, baseline)
        for seed in seeds:
            arm, base = (self.record(name, steps, seed) for name in (variant, baseline))
            if arm.row_losses and len(arm.row_losses) == len(base.row_losses):
                pairs.append(np.asarray(arm.row_losses) - np.asarray(base.row_losses))
        domains = self.record(baseline, steps, seeds[0]).row_domains if pairs else []
        primary = primary or set(domains)
        keep = [domain in primary for domain in domains]
        if not any(keep):
            return np.empty((0, 0)), []
        return np.asarray(pairs)[:, keep], [domain for domain in domains if domain in primary]
