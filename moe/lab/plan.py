"""The runs of a suite in order, and the learning rate that a sweep chooses for each arm."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Mapping

from moe.lab.records import Key, Record
from moe.lab.suite import Suite, Sweep


@dataclasses.dataclass(frozen=True)
class Choice:
    """Outcome of an arm's sweep.

    Attributes:
        rate: peak learning rate of the arm's runs: the base config's until the sweep and its check are complete.
        tuned: True once they are.
        tried: (horizon, learning rate) → mean primary loss over the sweep's seeds; infinite if one diverged.
        optimum: best rate at the sweep's horizon, once every rate has been tried on every reserved seed.
        to_check: rates that the check at the longest horizon needs next.
        at_edge: the rate is the lowest or highest tried, so that a better one may lie beyond.
    """

    rate: float
    tuned: bool = False
    tried: Mapping[tuple[int, float], float] = dataclasses.field(default_factory=dict)
    optimum: float | None = None
    to_check: tuple[float, ...] = ()
    at_edge: bool = False


def choose(suite: Suite, records: Iterable[Record], variant: str) -> Choice:
    """An arm's learning rate: the sweep's optimum, or a lower one that the check at the longest horizon prefers."""
    sweep = suite.sweep
    if sweep is None:
        return Choice(suite.learning_rate)
    has_check = sweep.horizon < suite.longest  # otherwise seed 0 at the chosen rate is an ordinary run
    losses: dict[tuple[int, float], list[float]] = {}
    for record in records:
        swept = record.steps == sweep.horizon and record.seed in sweep.seeds
        checked = has_check and record.steps == suite.longest and record.seed == sweep.checked_on
        if record.variant == variant and (swept or checked):
            losses.setdefault((record.steps, record.learning_rate), []).append(record.primary_loss)
    tried = {point: statistics.fmean(values) for point, values in losses.items()}
    if any(len(losses.get((sweep.horizon, rate), [])) < len(sweep.seeds) for rate in sweep.learning_rates):
        return Choice(suite.learning_rate, tried=tried)
    optimum = min(sweep.learning_rates, key=lambda rate: tried[sweep.horizon, rate])
    best, to_check = _check(sweep, suite.longest, tried, optimum)
    if to_check:
        return Choice(suite.learning_rate, tried=tried, optimum=optimum, to_check=to_check)
    return Choice(best, True, tried, optimum, at_edge=best in (sweep.learning_rates[0], sweep.learning_rates[-1]))


def _check(
    sweep: Sweep, longest: int, tried: Mapping[tuple[int, float], float], optimum: float
) -> tuple[float, tuple[float, ...]]:
    """(best rate from the optimum downwards, rates to train for the longest horizon before it is known)."""
    rates = sweep.learning_rates[sweep.learning_rates.index(optimum) :: -1]
    if sweep.horizon == longest:
        return optimum, ()
    for rate, lower in itertools.pairwise(rates):
        if missing := tuple(r for r in (rate, lower) if (longest, r) not in tried):
            return rate, missing
        if tried[longest, rate] <= tried[longest, lower]:
            return rate, ()
    return rates[-1], ()


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
    return found + [
        Key(name, suite.longest, rate, sweep.checked_on) for name in arms for rate in choices[name].to_check
    ]


def parents(suite: Suite, records: Iterable[Record], key: Key) -> dict[str, Key]:
    """The runs that a run needs first: "starts_from" and "teacher" → run."""
    chosen, records = suite.variants[key.variant], list(records)
    names = {"starts_from": chosen.starts_from, "teacher": chosen.teacher}
    return {
        field: Key(name, key.steps, choose(suite, records, name).rate, key.seed)
        for field, name in names.items()
        if name
    }
