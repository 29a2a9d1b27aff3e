"""Decides registered claims on the records of their suite.

A claim of a family is supported or contradicted where the p-value of its rule, adjusted by Holm's method over all of
that family, is below 5 %; members of the family without runs count with p = 1. Every other claim is exploratory: its
interval is reported as on the claim's side, on the other side or on both, and with fewer than five seeds as a trial.
Diverged runs count as outcomes: their loss is infinite, and a sign test over all seeds decides.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats

from moe.lab import inference
from moe.lab.claims.registration import Claim, Part, Primary
from moe.lab.expressions import parse, variants_of
from moe.lab.inference import ALPHA, Effect
from moe.lab.records import Record
from moe.lab.suite import MAX_DROP_DIFFERENCE
from moe.lab.table import MissingError, Table

SUPPORTED = "supported"
CONTRADICTED = "contradicted"
UNDECIDED = "undecided"
FOR = "exploratory: for it"
AGAINST = "exploratory: against it"
OPEN = "exploratory: open"
TRIAL = "exploratory: a trial"
TOO_SHORT, NOT_TESTED = "too few steps", "not tested"
#: Number of seeds below which an exploratory claim is a trial.
SEEDS = 5
#: Verdicts in the order of a summary.
VERDICTS = (SUPPORTED, CONTRADICTED, UNDECIDED, FOR, AGAINST, OPEN, TRIAL, TOO_SHORT, NOT_TESTED)
_INTERIM = "interim"
_EXPLORATORY = {SUPPORTED: FOR, CONTRADICTED: AGAINST, UNDECIDED: OPEN}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One part of a claim, tested.

    Attributes:
        part: what was registered.
        effect: mean of its value over seeds, with the interval.
        side: supported, contradicted or undecided by the part's own interval; empty for the rule "shown".
        p: p-value of the rule's test, below 5 % where ``side`` is not undecided; 1 with fewer than two seeds.
        detectable: smallest effect that this many seeds detect with 80 % power at the observed spread.
        note: further remarks, such as diverged runs.
    """

    part: Part
    effect: Effect
    side: str
    p: float
    detectable: float
    note: str = ""

    @property
    def replication(self) -> str:
        """Whether the interval contains the published effect; empty without a comparable one or without an interval."""
        published, e = self.part.published, self.effect
        if published is None or self.part.differs or not math.isfinite(e.low) or not math.isfinite(e.high):
            return ""
        return "contains it" if e.low <= published <= e.high else "excludes it"

    @property
    def bound(self) -> float:
        """Largest absolute effect within the interval; infinite without an interval."""
        return max(abs(self.effect.low), abs(self.effect.high))


@dataclasses.dataclass(frozen=True)
class Finding:
    """Evidence of a suite's records on a claim.

    Attributes:
        claim: as registered.
        verdict: one of :data:`VERDICTS`.
        steps: horizon at which it was tested; 0 if it was not.
        outcomes: per part.
        adjusted: p adjusted over the claim's family; NaN for an exploratory claim.
        post_hoc: the claim's text differs from what it was when its runs started.
        lacks: caveats on the comparison: steps, tuning, seeds, power, dropping.
        note: why it was not tested.
    """

    claim: Claim
    verdict: str
    steps: int = 0
    outcomes: tuple[Outcome, ...] = ()
    adjusted: float = math.nan
    post_hoc: bool = False
    lacks: tuple[str, ...] = ()
    note: str = ""

    @property
    def interim(self) -> bool:
        """True if a claim of a family lacks registered seeds, without which it has no verdict."""
        return any(text.startswith(_INTERIM) for text in self.lacks)


def assess(claims: Sequence[Claim], tables: Mapping[str, Table], primary: Primary | None) -> list[Finding]:
    """Test claims, each at the longest horizon for which its arms have runs.

    Args:
        claims: all that are registered, since Holm's method needs whole families.
        tables: suite → its records; a suite without records may be missing.
        primary: the primary family; None: every claim is exploratory.
    """
    findings = [_assess(claim, tables.get(claim.suite), primary) for claim in claims]
    adjusted: dict[int, float] = {}
    for name in {claim.family for claim in claims} - {""}:
        family = [finding for finding in findings if finding.claim.family == name]
        p_values = [f.outcomes[0].p if f.outcomes and f.verdict not in (TOO_SHORT, NOT_TESTED) else 1.0 for f in family]
        adjusted |= zip([f.claim.number for f in family], inference.holm(p_values), strict=True)
    return [_after_holm(finding, adjusted.get(finding.claim.number)) for finding in findings]


def _after_holm(finding: Finding, adjusted: float | None) -> Finding:
    """Set the verdict of a finding by the p-value adjusted over its family; None: it is exploratory."""
    if adjusted is None:
        verdict = _EXPLORATORY.get(finding.verdict, finding.verdict)
        few = finding.verdict in _EXPLORATORY and min(outcome.effect.n for outcome in finding.outcomes) < SEEDS
        return dataclasses.replace(finding, verdict=TRIAL if few else verdict)
    decided = finding.verdict in (SUPPORTED, CONTRADICTED) and adjusted < ALPHA and not finding.interim
    verdict = finding.verdict if decided or finding.verdict in (TOO_SHORT, NOT_TESTED) else UNDECIDED
    return dataclasses.replace(finding, verdict=verdict, adjusted=adjusted)


def _assess(claim: Claim, table: Table | None, primary: Primary | None) -> Finding:
    """Test a claim by its own intervals, before the adjustment over its family."""
    if table is None:
        return Finding(claim, NOT_TESTED, note=f"suite {claim.suite} has not been run")
    if claim.family:  # with seeds added until an effect shows, chance would show one
        table = table.only(table.suite.registered_seeds)
    arms = arms_of(claim)
    steps = table.longest(*arms)
    if not steps:
        missing = [arm for arm in arms if arm not in table.variants]
        return Finding(claim, NOT_TESTED, note=f"no runs of {', '.join(missing)}" if missing else "no common seeds")
    try:
        outcomes = tuple(_outcome(part, table, steps) for part in claim.parts)
        applies = not claim.requires or inference.effect([*table.values(steps, claim.requires).values()]).high < 0
    except MissingError as error:
        return Finding(claim, NOT_TESTED, steps, note=str(error))
    post_hoc = any(
        record.claims.get(str(claim.number)) != claim.hash
        for record in table.used
        if record.variant in arms and record.steps == steps
    )
    verdict = _verdict([outcome.side for outcome in outcomes if outcome.side])
    if steps < claim.min_steps:
        verdict = TOO_SHORT
    elif not applies:
        note = f"{claim.requires} is not below zero"
        return Finding(claim, NOT_TESTED, steps, outcomes, post_hoc=post_hoc, note=note)
    lacks = _lacks(claim, table, steps, outcomes, primary)
    return Finding(claim, verdict, steps, outcomes, post_hoc=post_hoc, lacks=lacks)


def runs_of(finding: Finding, table: Table) -> list[tuple[str, Record]]:
    """(arm, record) of the runs that a finding is about; ``table`` is that of its suite."""
    if finding.claim.family:
        table = table.only(table.suite.registered_seeds)
    arms = arms_of(finding.claim)
    seeds = table.seeds(finding.steps, *arms)
    return [(arm, table.record(arm, finding.steps, seed)) for arm in arms for seed in seeds]


def arms_of(claim: Claim) -> list[str]:
    """Arms that a claim is about."""
    texts = [part.value for part in claim.parts] + ([claim.requires] if claim.requires else [])
    return variants_of(term for text in texts for term in parse(text))


def _outcome(part: Part, table: Table, steps: int) -> Outcome:
    if part.rule == "less_variance":
        return _variance(part, table, steps)
    values = np.asarray([*table.values(steps, part.value).values()])
    if not np.isfinite(values).all():
        return _with_diverged(part, values)
    effect = inference.effect(values)
    if part.rule != "shown" and _same_runs(part, table, steps):
        return Outcome(part, effect, UNDECIDED, 1.0, math.inf, "the arms are the same runs")
    detectable = inference.smallest_detectable(effect.sd, effect.n)
    side, p = side_of(part.rule, part.margin, effect)
    return Outcome(part, effect, side, p, detectable)


def _same_runs(part: Part, table: Table, steps: int) -> bool:
    """True if all arms of a difference are the same runs, such as two whose sweeps chose the same rate."""
    arms = variants_of(parse(part.value))
    seeds = table.seeds(steps, *arms)
    return len(arms) > 1 and all(len({table.record(arm, steps, seed).run for arm in arms}) == 1 for seed in seeds)


def bound_of(rule: str, margin: float, mean: float) -> float:
    """Boundary between a rule's sides: the margin for "not above", its end nearer the mean for "within", else zero."""
    if rule == "within":
        return math.copysign(margin, mean)
    return margin if rule == "not_above" else 0.0


def side_of(rule: str, margin: float, e: Effect) -> tuple[str, float]:
    """(side of the rule on which the interval lies, p-value of the corresponding test); ("", p) for the rule "shown".

    The p-values are two-sided, so that they are below 5 % where the 95 % interval decides. They are against zero, for
    "not above" against the margin, and for "within" against the end of the margin nearer to the mean.
    """
    if rule == "shown":
        return "", e.p
    if e.n < 2:
        return UNDECIDED, 1.0
    bound = bound_of(rule, margin, e.mean)
    if rule == "within":
        inside, outside = -margin < e.low and e.high < margin, e.low > margin or e.high < -margin
    else:
        below, above = e.high < bound, e.low > bound
        inside, outside = (above, below) if rule == "above" else (below, above)
    return SUPPORTED if inside else CONTRADICTED if outside else UNDECIDED, _p_against(e, bound)


def _p_against(e: Effect, bound: float) -> float:
    """Two-sided p-value of a mean against a bound."""
    if e.sd == 0:
        return float(e.mean == bound)
    t = (e.mean - bound) / (e.sd / math.sqrt(e.n))
    return 2 * float(scipy.stats.t.sf(abs(t), e.n - 1))


def _with_diverged(part: Part, values: np.ndarray) -> Outcome:
    """Sign test over seeds: infinite differences have a sign, and two diverged runs of a pair are a tie.

    The sign is that of the difference to the rule's bound, which is the margin for "not above".
    """
    bound = part.margin if part.rule == "not_above" else 0.0
    lower, higher = int((values < bound).sum()), int((values > bound).sum())
    p = float(scipy.stats.binomtest(lower, lower + higher).pvalue) if lower + higher else 1.0
    finite = values[np.isfinite(values)]
    mean = float(finite.mean()) if len(finite) else math.nan
    effect = Effect(mean, -math.inf, math.inf, p, len(values))
    diverged = f"{len(values) - len(finite)} of {len(values)} pairs have a diverged run"
    note = f"{diverged}; sign test: {lower} lower, {higher} higher"
    if part.rule == "shown":
        return Outcome(part, effect, "", p, math.inf, note)
    if part.rule not in ("below", "not_above", "above"):
        return Outcome(part, effect, UNDECIDED, 1.0, math.inf, note)
    side = SUPPORTED if (lower > higher) == (part.rule != "above") else CONTRADICTED
    return Outcome(part, effect, side if p < ALPHA else UNDECIDED, p, math.inf, note)


def _variance(part: Part, table: Table, steps: int) -> Outcome:
    """Pitman-Morgan test of the expression's first term varying less over seeds than its second."""
    # One arm may have more seeds than the other; the test needs pairs.
    by_seed = [table.values(steps, [dataclasses.replace(term, factor=1.0)]) for term in parse(part.value)[:2]]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    first, second = ([values[seed] for seed in seeds] for values in by_seed)
    if len(seeds) < 3 or not np.isfinite(first + second).all():
        return Outcome(part, Effect(math.nan, -math.inf, math.inf, 1.0, len(seeds)), UNDECIDED, 1.0, math.inf)
    ratio, one_sided = inference.pitman_morgan(first, second)
    p = 2 * min(one_sided, 1 - one_sided)
    side = UNDECIDED if p >= ALPHA else SUPPORTED if one_sided < 0.5 else CONTRADICTED
    effect = Effect(ratio, 0.0, math.inf, p, len(first))
    return Outcome(part, effect, side, p, math.inf, "ratio of variances; Pitman-Morgan test, no interval")


def _verdict(sides: Sequence[str]) -> str:
    if all(side == SUPPORTED for side in sides):
        return SUPPORTED
    return CONTRADICTED if CONTRADICTED in sides else UNDECIDED


def _lacks(
    claim: Claim, table: Table, steps: int, outcomes: Sequence[Outcome], primary: Primary | None
) -> tuple[str, ...]:
    """Caveats on the comparison, reported beside its verdict."""
    lacks = [f"{steps:,} steps; the claim needs at least {claim.min_steps:,}"] if steps < claim.min_steps else []
    arms = arms_of(claim)
    # A learning rate or a capacity may favour one of several arms; one arm's models are compared with themselves.
    if len(arms) > 1 and any("loss" in outcome.part.value for outcome in outcomes):
        lacks += _unequal_arms(arms, table, steps)
    lacks += _missing_seeds(claim, table.seeds(steps, *arms), table.suite.registered_seeds, outcomes)
    for outcome in outcomes:
        lacks += _planned(outcome.part, len(table.suite.registered_seeds))
        if outcome.side == UNDECIDED:
            lacks += _lacking_power(outcome, primary)
    return tuple(lacks)


def _planned(part: Part, seeds: int) -> list[str]:
    """Caveat on an equivalence that its seeds could not be expected to show."""
    if part.rule != "within" or part.spread is None:
        return []
    needed = inference.smallest_margin(part.spread, seeds)
    if needed <= part.margin:
        return []
    return [
        f"registered with too few seeds: at the spread expected then, {part.spread:g}, {seeds} show equivalence only "
        f"within ±{needed:.3f}; the margin is ±{part.margin:.3f}"
    ]


def _unequal_arms(arms: Sequence[str], table: Table, steps: int) -> list[str]:
    """Learning rates that were not swept, and shares of dropped assignments that differ."""
    lacks = []
    choices = {arm: table.choices[arm, steps] for arm in arms}
    untuned = [arm for arm in arms if not choices[arm].tuned]
    begun = [arm for arm in untuned if choices[arm].tried]
    if rest := [arm for arm in untuned if arm not in begun]:
        lacks.append(f"learning rate not swept for {', '.join(rest)}")
    if begun:
        lacks.append(f"learning rate not swept to the end for {', '.join(begun)}")
    if at_edge := [arm for arm in arms if choices[arm].at_edge]:
        lacks.append(f"best learning rate at the edge of the sweep for {', '.join(at_edge)}")
    dropped = {arm: table.dropped(arm, steps) for arm in arms}
    difference = max(dropped.values()) - min(dropped.values())
    if difference > MAX_DROP_DIFFERENCE and not table.suite.dropping_differs:
        shares = ", ".join(f"{arm} {share:.1%}" for arm, share in dropped.items())
        lacks.append(f"not comparable: the arms drop different shares in training ({shares})")
    return lacks


def _missing_seeds(
    claim: Claim, seeds: Sequence[int], registered: Sequence[int], outcomes: Sequence[Outcome]
) -> list[str]:
    """Seeds that were not measured, and those without which a finding is preliminary."""
    lacks = []
    n = min((outcome.effect.n for outcome in outcomes), default=0)
    if n < len(seeds):
        lacks.append(f"measured on {n} of {len(seeds)} seeds")
    there = min(n, len(set(registered) & set(seeds)))
    if claim.family and there < len(registered):  # a verdict after each new seed would find effects by chance
        lacks.append(f"{_INTERIM}, {there} of the {len(registered)} registered seeds")
    elif n < SEEDS:
        lacks.append(f"{n} seeds; a finding needs at least {SEEDS}")
    return lacks


def _lacking_power(outcome: Outcome, primary: Primary | None) -> list[str]:
    """Caveat on an undecided outcome: the least that its seeds would show at their spread, if that is too much."""
    if outcome.part.rule == "within":
        needed = inference.smallest_margin(outcome.effect.sd, outcome.effect.n)
        if (margin := outcome.part.margin) < needed < math.inf:
            return [f"low power: can show equivalence only within ±{needed:.3f}; the margin is ±{margin:.3f}"]
        return []
    smallest = primary.smallest if primary and "loss[" in outcome.part.value else 0.0
    if 0 < smallest < outcome.detectable < math.inf:
        return [f"low power: detects {outcome.detectable:.3f}; the smallest effect of interest is {smallest:.3f}"]
    return []
