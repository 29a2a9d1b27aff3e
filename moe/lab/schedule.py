"""The runs of a suite in order, the record of each, and the learning rate that a sweep chooses per arm and horizon."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Mapping

from moe.lab.records import Key, Record
from moe.lab.suite import Suite, Sweep


@dataclasses.dataclass(frozen=True)
class Choice:
    """Outcome of an arm's sweep at one horizon.

    Attributes:
        rate: peak learning rate of the arm's runs: the best one tried, the base config's until one has been tried.
        tuned: True once the next lower and the next higher rate have been tried on every reserved seed too.
        tried: learning rate → mean primary loss over the sweep's seeds; infinite if one diverged.
        to_try: rates that the sweep needs next.
        at_edge: the rate is the lowest or highest of the sweep, so that a better one may lie beyond.
    """

    rate: float
    tuned: bool = False
    tried: Mapping[float, float] = dataclasses.field(default_factory=dict)
    to_try: tuple[float, ...] = ()
    at_edge: bool = False


class PlannedRuns:
    """The runs that a suite names, and which of them have a record; a record is found by the hash of its run.

    Attributes:
        choices: (arm, horizon) → learning rate.
    """

    def __init__(self, suite: Suite, records: Iterable[Record]):
        """``records`` may hold runs of other suites and of earlier versions of an arm, which are ignored."""
        self.suite = suite
        self._records = {record.run: record for record in records}
        self.choices: dict[tuple[str, int], Choice] = {}
        # The arms that others start from come first: their rates are part of the others' runs.
        for name in sorted(suite.variants, key=lambda name: (len(family(suite, name)), suite.variants[name].rate_from)):
            source = suite.variants[name].rate_from
            for steps in suite.steps:
                shared = self.choices.get((source, steps))
                self.choices[name, steps] = shared or self._choose(source or name, steps)

    def run(self, key: Key) -> str:
        """Hash of a run."""
        parents = {role: self.run(parent) for role, parent in self.parents(key).items()}
        return self.suite.run(key.variant, key.seed, steps=key.steps, learning_rate=key.learning_rate, parents=parents)

    def record(self, key: Key) -> Record | None:
        """The record of a run; None if it is not finished."""
        return self._records.get(self.run(key))

    def swept(self) -> list[Record]:
        """The finished runs of the sweep, under the names that they have in this suite."""
        keys = self._sweep_runs(self.suite.sweep) if self.suite.sweep else []
        pairs = [(key, self.record(key)) for key in keys]
        return [dataclasses.replace(r, variant=key.variant, seed=key.seed) for key, r in pairs if r is not None]

    def parents(self, key: Key) -> dict[str, Key]:
        """The runs that a run needs first: "starts_from" and "teacher" → run."""
        chosen = self.suite.variants[key.variant]
        names = {"starts_from": chosen.starts_from, "teacher": chosen.teacher}
        return {role: self.key(name, key.steps, key.seed) for role, name in names.items() if name}

    def key(self, variant: str, steps: int, seed: int) -> Key:
        """The run of an arm at its learning rate."""
        return Key(variant, steps, self.choices[variant, steps].rate, seed)

    def _choose(self, variant: str, steps: int) -> Choice:
        """The best learning rate tried, and what is missing on both sides of it."""
        suite, sweep = self.suite, self.suite.sweep
        if sweep is None or steps not in sweep.at(suite):
            return Choice(suite.learning_rate)
        tried: dict[float, float] = {}
        for rate in sweep.learning_rates:
            found = [self.record(Key(variant, steps, rate, seed)) for seed in sweep.seeds]
            finished = [record for record in found if record is not None]
            if len(finished) == len(sweep.seeds):
                tried[rate] = statistics.fmean(record.primary_loss for record in finished)
        return _choice(suite, sweep, tried)

    def runs(self, *, sweep: bool = True) -> list[Key]:
        """All runs that can be named now, most informative first.

        The sweep comes first, then the headline arms seed by seed with the shortest horizon first, then the other arms
        in the same order. The runs of an arm are named once its learning rate is known.

        Args:
            sweep: False: no sweep; every arm takes the best rate tried so far.
        """
        suite = self.suite
        sweeping = sweep and suite.sweep is not None
        keys = self._sweep_runs(suite.sweep) if sweeping and suite.sweep is not None else []
        headline = [name for name in suite.variants if not suite.headline or name in suite.headline]
        others = [name for name in suite.variants if name not in headline]
        for arms in (headline, others):
            for seed, steps, name in itertools.product(suite.seeds, suite.steps, arms):
                needed = (*family(suite, name), name)
                if not sweeping or all(self._settled(arm, steps) for arm in needed):
                    keys += [self.key(arm, steps, seed) for arm in needed]
        return list(dict.fromkeys(keys))

    def unnamed(self) -> list[Key]:
        """Runs that :meth:`runs` will name as the sweep goes on: the fewest possible; their rates may still change."""
        suite = self.suite
        if suite.sweep is None:
            return []
        named, keys = set(self.runs()), list[Key]()
        for name, steps in itertools.product(suite.variants, suite.steps):
            rates = {key.learning_rate for key in named if (key.variant, key.steps) == (name, steps)}
            if not suite.variants[name].rate_from and not self._settled(name, steps):
                # The best rate and its neighbours on both sides.
                missing = [rate for rate in suite.sweep.learning_rates if rate not in rates][: max(3 - len(rates), 0)]
                keys += [Key(name, steps, rate, seed) for rate in missing for seed in suite.sweep.seeds]
            keys += [self.key(name, steps, seed) for seed in suite.seeds]
        return [key for key in dict.fromkeys(keys) if key not in named]

    def _settled(self, variant: str, steps: int) -> bool:
        """True if the arm's rate at this horizon is final: it is not swept, or its sweep is complete."""
        sweep = self.suite.sweep
        return sweep is None or steps not in sweep.at(self.suite) or self.choices[variant, steps].tuned

    def _sweep_runs(self, sweep: Sweep) -> list[Key]:
        """The sweep's runs, seed by seed. A child's are named once its parents' rates are settled, and follow the
        parents' runs, which are not part of the sweep where a parent takes its rate from another arm."""
        arms = [
            (name, steps)
            for steps in sweep.at(self.suite)
            for name, variant in self.suite.variants.items()
            if not variant.rate_from and all(self._settled(parent, steps) for parent in family(self.suite, name))
        ]
        keys: list[Key] = []
        for seed, (name, steps) in itertools.product(sweep.seeds, arms):
            keys += [self.key(parent, steps, seed) for parent in family(self.suite, name)]
            choice = self.choices[name, steps]
            keys += [Key(name, steps, rate, seed) for rate in (*choice.tried, *choice.to_try)]
        return list(dict.fromkeys(keys))


def _choice(suite: Suite, sweep: Sweep, tried: Mapping[float, float]) -> Choice:
    """The best rate tried so far, starting from the base config's, and its neighbours that have not been tried."""
    rates = sweep.learning_rates
    if suite.learning_rate not in tried:
        return Choice(suite.learning_rate, tried=tried, to_try=(suite.learning_rate,))
    best = min(tried, key=lambda rate: tried[rate])
    place = rates.index(best)
    neighbours = rates[max(place - 1, 0) : place] + rates[place + 1 : place + 2]
    to_try = tuple(rate for rate in neighbours if rate not in tried)
    return Choice(best, not to_try, tried, to_try, at_edge=best in (rates[0], rates[-1]))


def family(suite: Suite, variant: str) -> tuple[str, ...]:
    """Arms that an arm starts from or is taught by."""
    chosen = suite.variants[variant]
    return tuple(dict.fromkeys(filter(None, (chosen.starts_from, chosen.teacher))))
