"""The runs of a suite in order, and the learning rate that a sweep chooses for each arm."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from moe.lab.records import Key, Record
from moe.lab.suite import Suite


@dataclasses.dataclass(frozen=True)
class Choice:
    """Outcome of an arm's sweep.

    Attributes:
        rate: peak learning rate of the arm's runs: the base config's until the sweep and its check are complete.
        tuned: True once they are.
        tried: (horizon, learning rate) → mean primary loss over the sweep's seeds; infinite if one diverged.
        optimum: best rate at the sweep's horizon, once every rate has been tried on every reserved seed.
    """

    rate: float
    tuned: bool = False
    tried: Mapping[tuple[int, float], float] = dataclasses.field(default_factory=dict)
    optimum: float | None = None


def choose(suite: Suite, records: Iterable[Record], variant: str) -> Choice:
    """An arm's learning rate: the best at the longest horizon among the sweep's optimum and its neighbours."""
    sweep = suite.sweep
    if sweep is None:
        return Choice(suite.learning_rate)
    losses: dict[tuple[int, float], list[float]] = {}
    for record in records:
        if record.variant == variant and record.seed in sweep.seeds:
            losses.setdefault((record.steps, record.learning_rate), []).append(record.primary_loss)
    tried = {point: statistics.fmean(values) for point, values in losses.items()}
    if any(len(losses.get((sweep.horizon, rate), [])) < len(sweep.seeds) for rate in sweep.learning_rates):
        return Choice(suite.learning_rate, False, tried)
    optimum = min(sweep.learning_rates, key=lambda rate: tried[sweep.horizon, rate])
    checked = {rate: tried.get((suite.longest, rate), math.nan) for rate in neighbours(sweep.learning_rates, optimum)}
    if any(math.isnan(loss) for loss in checked.values()):
        return Choice(suite.learning_rate, False, tried, optimum)
    return Choice(min(checked, key=lambda rate: checked[rate]), True, tried, optimum)


def neighbours(rates: Sequence[float], rate: float) -> tuple[float, ...]:
    """A rate and those next to it."""
    index = rates.index(rate)
    return tuple(rates[max(index - 1, 0) : index + 2])


def family(suite: Suite, variant: str) -> tuple[str, ...]:
    """Arms that an arm starts from or is taught by."""
    chosen = suite.variants[variant]
    return tuple(dict.fromkeys(filter(None, (chosen.starts_from, chosen.teacher))))


def runs(suite: Suite, records: Iterable[Record], *, sweep: bool = True) -> list[Key]:
    """All runs that can be named now, most informative first.

    The sweep comes first, then its check, then the headline arms seed by seed with the shortest horizon first, then the
    other arms in the same order. The runs of an arm are named once its learning rate is known.

    Args:
        suite: the suite.
        records: finished runs.
        sweep: False: no sweep; every arm takes the base config's rate unless its sweep is complete already.
    """
    records = list(records)
    choices = {name: choose(suite, records, name) for name in suite.variants}
    settled = {name for name, choice in choices.items() if choice.tuned or not sweep or suite.sweep is None}
    found = _sweep_runs(suite, choices) if sweep and suite.sweep is not None else []
    headline = [name for name in suite.variants if not suite.headline or name in suite.headline]
    others = [name for name in suite.variants if name not in headline]
    for arms in (headline, others):
        for seed, steps, name in itertools.product(suite.seeds, suite.steps, arms):
            if settled.issuperset({name, *family(suite, name)}):
                found += [Key(arm, steps, choices[arm].rate, seed) for arm in (*family(suite, name), name)]
    return list(dict.fromkeys(found))


def _sweep_runs(suite: Suite, choices: Mapping[str, Choice]) -> list[Key]:
    """The sweep, and the check of each arm whose sweep is complete. A child's sweep waits for its parents' rates."""
    sweep = suite.sweep
    assert sweep is not None
    arms = [name for name in suite.variants if all(choices[parent].tuned for parent in family(suite, name))]
    found = [
        Key(name, sweep.horizon, rate, seed)
        for seed, name, rate in itertools.product(sweep.seeds, arms, sweep.learning_rates)
    ]
    for name in arms:
        if (optimum := choices[name].optimum) is not None:
            rates = neighbours(sweep.learning_rates, optimum)
            found += [Key(name, suite.longest, rate, sweep.seeds[0]) for rate in rates]
    return found


def parents(suite: Suite, records: Iterable[Record], key: Key) -> dict[str, Key]:
    """The runs that a run needs first: "starts_from" and "teacher" → run."""
    chosen, records = suite.variants[key.variant], list(records)
    names = {"starts_from": chosen.starts_from, "teacher": chosen.teacher}
    return {
        field: Key(name, key.steps, choose(suite, records, name).rate, key.seed)
        for field, name in names.items()
        if name
    }
