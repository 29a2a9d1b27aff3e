"""Tables of claims: verdicts first, then each part's effect beside the published one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moe.lab import identity, inference
from moe.lab.claims.decide import (
    NOT_TESTED,
    OPEN,
    SEEDS,
    TOO_SHORT,
    UNDECIDED,
    VERDICTS,
    Finding,
    Outcome,
    assess,
    bound_of,
    runs_of,
)
from moe.lab.claims.registration import Claim, Part, Primary, Registered
from moe.lab.records import Record
from moe.lab.report.markdown import spans
from moe.lab.report.regime import regimes
from moe.lab.table import Table
from moe.system.atomic_files import write_atomic
from moe.system.escaping import markdown_page, markdown_table, markdown_text

_RULES = {
    "below": "below 0",
    "above": "above 0",
    "less_variance": "variance ratio below 1",
    "shown": "reported only",
}
#: Remark on a claim that was edited after its runs had started.
POST_HOC = "**post hoc: the claim was edited after its runs started**"
_RULES_TEXT = (
    "Only claims of a family get verdicts: of the primary one, of the one that repeats it on other seeds, and of the "
    "one at the initial scale of Switch's paper. They are supported or contradicted where the p-value, adjusted by "
    "Holm's method over all contrasts of the family ({count} in the primary one), is below 5 %, and never before all "
    "registered seeds have been run. Every other claim is exploratory: its 95 % interval lies on the claim's side (for "
    "it), on the other side (against it), or on both (open); with fewer than {seeds} seeds it is a trial. Losses are "
    "evaluated without drops. Bound: the largest absolute effect that the interval contains. "
    "Smallest detectable: the effect that a paired t test detects with 80 % power at the observed spread; it is "
    "compared with the smallest effect of interest, {smallest:g} nats. For a claim of no difference, the margin within "
    "which as many seeds can show equivalence with that power is compared with the claim's margin. Replication: "
    "whether our interval contains the published effect, which is that of a model a thousand times as large; a "
    "published number of another setting, which is named, is not compared."
)


def claims_section(
    claims: Sequence[Claim], tables: Mapping[str, Table], primary: Primary | None, suite: str = ""
) -> str:
    """Verdicts, what each finding lacks, and every part with its interval.

    Args:
        claims: all that are registered.
        tables: suite → its records.
        primary: the primary family.
        suite: show only the claims of this suite; empty: all.
    """
    findings = [f for f in assess(claims, tables, primary) if suite in ("", f.claim.suite)]
    spreads = _spreads(findings)
    verdicts = [
        (
            str(f.claim.number),
            markdown_text(f.claim.sentence) + (f" ({f.claim.family})" if f.claim.family else ""),
            f"**{f.verdict}**" if f.claim.family else f.verdict,
            _standing(f, tables.get(f.claim.suite), spreads),
        )
        for f in findings
    ]
    parts = [_part(finding, outcome) for finding in findings for outcome in finding.outcomes]
    blocks = [markdown_table(("no.", "claim", "verdict", "caveats"), verdicts)]
    if parts:
        header = (
            "no.", "quantity", "rule", "ours [95 %]", "p", "p, Holm", "bound", "published", "replication",
            "smallest detectable", "source",
        )  # fmt: skip
        blocks.append(markdown_table(header, parts))
    if several := _several(findings, tables):
        header = ("runs", "seeds", "claims", "mean loss − that of all seeds of the arm")
        text = "Runs that serve several claims, whose findings are therefore not independent, by the hash of the run:"
        blocks.append(f"{text}\n\n{markdown_table(header, several)}")
    return "\n\n".join(blocks)


def rules(primary: Primary | None) -> str:
    """The rules of the verdicts, and what was known when they were set."""
    if primary is None:
        return "No primary family is registered: every claim is exploratory."
    text = _RULES_TEXT.format(count=len(primary.claims), seeds=SEEDS, smallest=primary.smallest)
    return f"{text}\n\nPilot: {markdown_text(primary.pilot)}"


def write_page(directory: Path, registered: Registered, tables: Mapping[str, Table]) -> None:
    """Write claims.md: all claims over the suites that have records."""
    claims, primary = registered.claims, registered.primary
    findings = assess(claims, tables, primary)
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in VERDICTS}
    text = [
        "# Claims of the papers",
        f"{len(findings)} claims; " + "; ".join(f"{verdict}: {count}" for verdict, count in counts.items()) + ".",
        f"Primary question: {markdown_text(primary.question)}" if primary else "",
        rules(primary),
        f"Length of the runs, at the suite's longest horizon: {regimes(tables)}" if regimes(tables) else "",
        f"Claims file: SHA-256 `{registered.digest}`.",
        claims_section(claims, tables, primary),
    ]
    write_atomic(directory / "claims.md", markdown_page("\n\n".join(filter(None, text)) + "\n"))


def _standing(finding: Finding, found: Table | None, spreads: Mapping[int, float]) -> str:
    """Remarks on the verdict, and what would decide the claim."""
    parts = [POST_HOC] if finding.post_hoc else []
    if finding.claim.wording:
        parts.append(f"reworded; registered as: {markdown_text(finding.claim.text)}")
    parts += [markdown_text(finding.note)] if finding.note else []
    parts += finding.lacks
    seeds = [inference.seeds_needed(o.effect.sd, _distance(o)) for o in finding.outcomes if _open(o)]
    if finding.verdict in (UNDECIDED, OPEN) and seeds:
        parts.append(f"{_count(max(seeds))} seeds would decide it at the observed mean and spread")
    elif finding.verdict in (NOT_TESTED, TOO_SHORT) and found is not None:
        parts.append(_to_test(finding.claim, found, spreads.get(finding.claim.min_steps, 0.0)))
    return "; ".join(parts) or "–"


def _open(outcome: Outcome) -> bool:
    """True if more seeds of the same spread could decide the part."""
    return outcome.side == UNDECIDED and outcome.effect.sd > 0 and _distance(outcome) != 0


def _distance(outcome: Outcome) -> float:
    """Difference between the mean and the boundary of the part's rule."""
    mean = outcome.effect.mean
    return mean - bound_of(outcome.part.rule, outcome.part.margin, mean)


def _spreads(findings: Sequence[Finding]) -> dict[int, float]:
    """Minimum steps of claims → median standard deviation over seeds of their tested loss differences."""
    seen: dict[int, list[float]] = {}
    for finding in findings:
        known = [o.effect.sd for o in finding.outcomes if "loss[" in o.part.value and o.effect.sd > 0]
        seen.setdefault(finding.claim.min_steps, []).extend(known)
    return {steps: float(np.median(known)) for steps, known in seen.items() if known}


def _to_test(claim: Claim, found: Table, spread: float) -> str:
    """Runs that a claim needs, and the effect that they would find."""
    seeds = len(found.suite.registered_seeds) if claim.family else SEEDS
    tokens = claim.min_steps * found.suite.tokens_per_step / 1e6
    text = f"needs {seeds} seeds of each arm for {claim.min_steps:,} steps ({tokens:.1f}M tokens)"
    if spread and any("loss[" in part.value for part in claim.parts):
        text += f", which would detect {inference.smallest_detectable(spread, seeds):.3f} nats"
    return text


def _count(seeds: int) -> str:
    return f"more than {inference.MOST_SEEDS}" if seeds > inference.MOST_SEEDS else str(seeds)


def _published(part: Part) -> str:
    """The paper's effect, and how its setting differs."""
    if part.published is None:
        return "–"
    return f"{part.published:+.3f}" + (f" ({markdown_text(part.differs)})" if part.differs else "")


def _part(finding: Finding, outcome: Outcome) -> tuple[str, ...]:
    part, e = outcome.part, outcome.effect
    rule = _RULES.get(part.rule) or f"{'below' if part.rule == 'not_above' else 'within ±'} {part.margin:g}"
    side = {"supported": ": on its side", "contradicted": ": on the other side", "undecided": ": open"}
    if not math.isfinite(e.mean):
        ours = f"undefined, n = {e.n}"
    else:
        ours = f"{e.mean:.3g}, n = {e.n}" if part.rule == "less_variance" else str(e)
    is_open = outcome.side == UNDECIDED and math.isfinite(outcome.bound)
    return (
        str(finding.claim.number),
        markdown_text(part.what) + (f" ({outcome.note})" if outcome.note else ""),
        rule + side.get(outcome.side, ""),
        f"{ours} at {finding.steps:,} steps",
        f"{outcome.p:.2g}" if e.n > 1 else "–",
        f"{finding.adjusted:.2g}" if math.isfinite(finding.adjusted) else "–",
        f"at most {outcome.bound:.4f}" if is_open else "–",
        _published(part),
        outcome.replication or "–",
        f"{outcome.detectable:.4f}" if math.isfinite(outcome.detectable) else "–",
        markdown_text(finding.claim.source),
    )


def _several(findings: Sequence[Finding], tables: Mapping[str, Table]) -> list[tuple[str, ...]]:
    """Rows on the runs that more than one of the findings is about, grouped by their arms and claims.

    A run is found by its hash, since an arm has other names in other suites.
    """
    arms = {}
    numbers = {}
    runs = dict[str, Record]()
    for finding in findings:
        if not finding.outcomes:
            continue
        for arm, record in runs_of(finding, tables[finding.claim.suite]):
            runs[record.run] = record
            arms.setdefault(record.run, {})[f"{finding.claim.suite}/{arm}"] = None
            numbers.setdefault(record.run, {})[finding.claim.number] = None
    groups: dict[tuple[tuple[str, ...], tuple[int, ...]], list[Record]] = {}
    for run, record in runs.items():
        if len(numbers[run]) > 1:
            groups.setdefault((tuple(arms[run]), tuple(sorted(numbers[run]))), []).append(record)
    everywhere = {record.run: record for table in tables.values() for record in table.used}
    alike: dict[str, list[float]] = {}
    for record in everywhere.values():
        alike.setdefault(_without_seed(record), []).append(record.primary_loss)
    rows = []
    for (names, claims), group in groups.items():
        others = alike[_without_seed(group[0])]
        shift = float(np.mean([record.primary_loss for record in group]) - np.mean(others))
        rows.append((
            ", ".join(names),
            spans([record.seed for record in group]),
            ", ".join(map(str, claims)),
            f"{shift:+.4f} of {len(others)}" if len(others) > len(group) and math.isfinite(shift) else "–",
        ))  # fmt: skip
    return rows


def _without_seed(record: Record) -> str:
    """Identity of a run's arm."""
    return identity.digest({name: value for name, value in record.form.items() if name != "seed"})
