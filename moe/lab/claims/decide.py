"""Decides registered claims on the records of their suite.

"below" is supported if the whole 95 % interval is below zero, contradicted if it is above, undecided otherwise; the
other rules are as symmetric. A claim is supported if all its parts are, contradicted if one is. A claim tested at a
horizon shorter than it applies from is "below the crossing", whatever its effects are. Diverged runs count as outcomes:
their loss is infinite, and a sign test over all seeds decides.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats

from moe.lab import statistics
from moe.lab.claims.registration import Claim, Part
from moe.lab.expressions import parse
from moe.lab.statistics import ALPHA, Effect
from moe.lab.table import MissingError, Table

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
BELOW, NOT_TESTED = "below the crossing", "not tested"
#: Seeds that a finding must have to meet all criteria.
SEEDS = 5
#: Verdicts in the order of a summary.
VERDICTS = (SUPPORTED, CONTRADICTED, UNDECIDED, BELOW, NOT_TESTED)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One part of a claim, decided.

    Attributes:
        part: what was registered.
        effect: of its value over seeds.
        verdict: supported, contradicted or undecided; empty for the rule "shown".
        detectable: smallest effect that this many seeds find with 80 % power at the spread seen.
        seeds_needed: seeds that would find the published effect at that spread; 0 if there is none to find.
        note: what else to know, such as diverged runs.
    """

    part: Part
    effect: Effect
    verdict: str
    detectable: float
    seeds_needed: int
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Finding:
    """Verdict of a suite's records on a claim.

    Attributes:
        claim: as registered.
        verdict: one of :data:`VERDICTS`.
        steps: horizon that it was tested at; 0 if it was not.
        outcomes: per part.
        post_hoc: the claim's text differs from what it was when its runs started.
        lacks: what keeps the finding from meeting all criteria: regime, tuning, seeds, power.
        note: why it was not tested.
    """

    claim: Claim
    verdict: str
    steps: int = 0
    outcomes: tuple[Outcome, ...] = ()
    post_hoc: bool = False
    lacks: tuple[str, ...] = ()
    note: str = ""


def assess(claim: Claim, table: Table | None) -> Finding:
    """Test a claim at the longest horizon for which its arms have runs."""
    if table is None:
        return Finding(claim, NOT_TESTED, note=f"suite {claim.suite} has not been run")
    arms = arms_of(claim)
    steps = table.longest(*arms)
    if not steps:
        missing = [arm for arm in arms if arm not in table.variants]
        return Finding(claim, NOT_TESTED, note=f"no runs of {', '.join(missing)}" if missing else "no common seeds")
    try:
        outcomes = tuple(_outcome(part, table, steps) for part in claim.parts)
        in_regime = not claim.requires or statistics.effect([*table.values(steps, claim.requires).values()]).high < 0
    except MissingError as error:
        return Finding(claim, NOT_TESTED, steps, note=str(error))
    post_hoc = any(
        record.claims.get(str(claim.number)) != claim.hash
        for record in table.used
        if record.variant in arms and record.steps == steps
    )
    verdict = _verdict([outcome.verdict for outcome in outcomes if outcome.verdict])
    if steps < claim.min_steps:
        verdict = BELOW
    elif not in_regime:
        return Finding(claim, NOT_TESTED, steps, outcomes, post_hoc, note=f"{claim.requires} is not below zero")
    return Finding(claim, verdict, steps, outcomes, post_hoc, _lacks(claim, table, steps, outcomes))


def arms_of(claim: Claim) -> list[str]:
    """Arms that a claim is about."""
    texts = [part.value for part in claim.parts] + ([claim.requires] if claim.requires else [])
    return list(dict.fromkeys(term.variant for text in texts for term in parse(text) if term.quantity))


def _outcome(part: Part, table: Table, steps: int) -> Outcome:
    if part.rule == "less_variance":
        return _variance(part, table, steps)
    values = np.asarray([*table.values(steps, part.value).values()])
    if not np.isfinite(values).all():
        return _with_diverged(part, values)
    effect = statistics.effect(values)
    detectable = statistics.smallest_detectable(effect.sd, effect.n)
    needed = statistics.seeds_needed(effect.sd, part.published) if part.published and effect.sd > 0 else 0
    return Outcome(part, effect, verdict_of(part.rule, part.margin, effect), detectable, needed)


def verdict_of(rule: str, margin: float, e: Effect) -> str:
    """Verdict of an interval; "" for the rule "shown"."""
    if rule == "shown":
        return ""
    if e.n < 2:
        return UNDECIDED
    if rule == "within":
        inside, outside = -margin < e.low and e.high < margin, e.low > margin or e.high < -margin
    elif rule == "above":
        inside, outside = e.low > 0, e.high < 0
    else:  # below, not_above
        bound = margin if rule == "not_above" else 0.0
        inside, outside = e.high < bound, e.low > bound
    return SUPPORTED if inside else CONTRADICTED if outside else UNDECIDED


def _with_diverged(part: Part, values: np.ndarray) -> Outcome:
    """Sign test over seeds: infinite differences have a sign, and two diverged runs of a pair are a tie."""
    lower, higher = int((values < 0).sum()), int((values > 0).sum())
    p = float(scipy.stats.binomtest(lower, lower + higher).pvalue) if lower + higher else 1.0
    finite = values[np.isfinite(values)]
    mean = float(finite.mean()) if len(finite) else math.nan
    effect = Effect(mean, -math.inf, math.inf, p, len(values))
    diverged = f"{len(values) - len(finite)} of {len(values)} pairs have a diverged run"
    note = f"{diverged}; sign test: {lower} lower, {higher} higher"
    verdict = UNDECIDED
    if part.rule == "shown":
        verdict = ""
    elif p < ALPHA and part.rule in ("below", "not_above", "above"):
        verdict = SUPPORTED if (lower > higher) == (part.rule != "above") else CONTRADICTED
    return Outcome(part, effect, verdict, math.inf, 0, note)


def _variance(part: Part, table: Table, steps: int) -> Outcome:
    """Pitman-Morgan test of the expression's first term varying less over seeds than its second."""
    first, second = (
        [*table.values(steps, [dataclasses.replace(t, factor=1.0)]).values()] for t in parse(part.value)[:2]
    )
    if len(first) < 3 or len(first) != len(second) or not np.isfinite(first + second).all():
        return Outcome(part, Effect(math.nan, -math.inf, math.inf, 1.0, len(first)), UNDECIDED, math.inf, 0)
    ratio, p = statistics.pitman_morgan(first, second)
    verdict = SUPPORTED if p < ALPHA / 2 else CONTRADICTED if p > 1 - ALPHA / 2 else UNDECIDED
    effect = Effect(ratio, 0.0, math.inf, 2 * min(p, 1 - p), len(first))
    return Outcome(part, effect, verdict, math.inf, 0, "ratio of variances; Pitman-Morgan test, no interval")


def _verdict(verdicts: Sequence[str]) -> str:
    if all(verdict == SUPPORTED for verdict in verdicts):
        return SUPPORTED
    return CONTRADICTED if CONTRADICTED in verdicts else UNDECIDED


def _lacks(claim: Claim, table: Table, steps: int, outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """Criteria that a finding does not meet."""
    lacks = []
    if steps < claim.min_steps:
        lacks.append(f"regime: {steps:,} steps of at least {claim.min_steps:,}")
    # A learning rate may favour one of several arms; a single arm's models are compared with themselves.
    arms = arms_of(claim)
    if len(arms) > 1 and any("loss" in outcome.part.value for outcome in outcomes):
        if untuned := [arm for arm in arms if not table.choices[arm, steps].tuned]:
            lacks.append(f"tuning: learning rate not swept for {', '.join(untuned)}")
        if at_edge := [arm for arm in arms if table.choices[arm, steps].at_edge]:
            lacks.append(f"tuning: best learning rate at the edge of the sweep for {', '.join(at_edge)}")
    n = min((outcome.effect.n for outcome in outcomes), default=0)
    if n < SEEDS:
        lacks.append(f"seeds: {n} of at least {SEEDS}")
    for outcome in outcomes:
        published = outcome.part.published
        if published and outcome.verdict == UNDECIDED and abs(published) < outcome.detectable < math.inf:
            lacks.append(f"power: finds {outcome.detectable:.3f}, the paper's effect is {published:+.3f}")
    return tuple(lacks)


def adjusted_p(findings: Sequence[Finding]) -> Mapping[tuple[int, str], float]:
    """(claim number, part) → p adjusted by Holm's method over all deciding parts with at least two seeds."""
    tested = [
        (finding.claim.number, outcome.part.what, outcome.effect.p)
        for finding in findings
        for outcome in finding.outcomes
        if outcome.verdict and outcome.effect.n > 1
    ]
    adjusted = statistics.holm([p for *_, p in tested])
    return {(number, what): p for (number, what, _), p in zip(tested, adjusted, strict=True)}
