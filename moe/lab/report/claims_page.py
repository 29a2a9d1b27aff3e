"""Tables of claims: verdicts first, then each part's effect beside the published one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moe.lab import statistics
from moe.lab.claims.decide import (
    BELOW,
    NOT_TESTED,
    SEEDS,
    UNDECIDED,
    VERDICTS,
    Finding,
    Outcome,
    adjusted_p,
    arms_of,
    assess,
)
from moe.lab.claims.registration import Claim
from moe.lab.report.markdown import table
from moe.lab.table import Table

_RULES = {
    "below": "below 0",
    "above": "above 0",
    "less_variance": "variance ratio below 1",
    "shown": "shown only",
}


def claims_section(claims: Sequence[Claim], tables: Mapping[str, Table]) -> str:
    """Verdicts, what each finding lacks, and every part with its interval.

    Args:
        claims: to test.
        tables: suite → its records.
    """
    findings = [assess(claim, tables.get(claim.suite)) for claim in claims]
    spread = _spread(findings)
    verdicts = [
        (str(f.claim.number), f.claim.text, f"**{f.verdict}**", _standing(f, tables.get(f.claim.suite), spread))
        for f in findings
    ]
    adjusted = adjusted_p(findings)
    parts = [_part(finding, outcome, adjusted) for finding in findings for outcome in finding.outcomes]
    blocks = [table(("", "claim", "verdict", "what it lacks"), verdicts)]
    if parts:
        header = (
            "", "quantity", "rule", "ours [95 %]", "p", "p, Holm", "published", "smallest detectable",
            "seeds for published", "source",
        )  # fmt: skip
        blocks.append(table(header, parts))
    if several := _several(findings):
        blocks.append(f"Runs that serve several claims, whose findings are therefore not independent: {several}.")
    return "\n\n".join(blocks)


def write_page(directory: Path, claims: Sequence[Claim], digest: str, tables: Mapping[str, Table]) -> None:
    """Write claims.md: all claims over the suites that have records."""
    findings = [assess(claim, tables.get(claim.suite)) for claim in claims]
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in VERDICTS}
    complete = sum(f.verdict in VERDICTS[:3] and not f.lacks and not f.post_hoc for f in findings)
    text = [
        "# Claims of the papers",
        "; ".join(f"{verdict}: {count}" for verdict, count in counts.items())
        + f". {complete} of {len(findings)} meet all criteria of this page: regime, tuned arms, five seeds, power.",
        "A claim is supported if the whole 95 % interval of each part is on its side, contradicted if that of one part "
        "is on the other side, undecided otherwise. It is tested at the longest horizon that its arms have; if that is "
        "shorter than the one from which the claim applies, the result is below the crossing and no evidence against "
        "it. Learning rates must be swept where losses of several arms are compared. The smallest detectable effect is "
        "that of a paired t test with 80 % power at the spread seen; for claims without runs, at the median spread of "
        "the loss differences tested. The models are tiny (see each suite's report).",
        f"Claims file: SHA-256 `{digest}`.",
        claims_section(claims, tables),
    ]
    (directory / "claims.md").write_text("\n\n".join(text) + "\n")


def _standing(finding: Finding, found: Table | None, spread: float) -> str:
    """Remarks on the verdict, and what would decide the claim."""
    parts = ["**post hoc: the claim was edited after its runs started**"] if finding.post_hoc else []
    parts += [finding.note] if finding.note else []
    parts += finding.lacks
    seeds = [statistics.seeds_needed(o.effect.sd, o.effect.mean) for o in finding.outcomes if _open(o)]
    if finding.verdict == UNDECIDED and seeds:
        parts.append(f"{_count(max(seeds))} seeds would find effects as large as those seen")
    elif finding.verdict in (UNDECIDED, NOT_TESTED, BELOW) and found is not None:
        parts.append(_to_test(finding.claim, found, spread))
    return "; ".join(parts) or "nothing"


def _open(outcome: Outcome) -> bool:
    """True if more seeds of the same spread could decide the part."""
    return outcome.verdict == UNDECIDED and outcome.effect.sd > 0 and outcome.effect.mean != 0


def _spread(findings: Sequence[Finding]) -> float:
    """Median over the tested loss differences of their standard deviation over seeds; NaN without one."""
    seen = [o.effect.sd for f in findings for o in f.outcomes if o.part.value.startswith("loss[") and o.effect.sd > 0]
    return float(np.median(seen)) if seen else math.nan


def _to_test(claim: Claim, found: Table, spread: float) -> str:
    """Runs that a claim needs, and the effect that they would find."""
    tokens = claim.min_steps * found.suite.tokens_per_step / 1e6
    text = f"needs {SEEDS} seeds of each arm for {claim.min_steps:,} steps ({tokens:.1f}M tokens)"
    if math.isfinite(spread) and any("loss[" in part.value for part in claim.parts):
        text += f", which find {statistics.smallest_detectable(spread, SEEDS):.3f} nats"
        published = [abs(part.published) for part in claim.parts if part.published and "loss[" in part.value]
        if published:
            seeds = statistics.seeds_needed(spread, min(published))
            text += f"; the published {min(published):.3f} needs {_count(seeds)} seeds"
    return text


def _count(seeds: int) -> str:
    return "more than 1000" if seeds > 1000 else str(seeds)


def _part(finding: Finding, outcome: Outcome, adjusted: Mapping[tuple[int, str], float]) -> tuple[str, ...]:
    part, e = outcome.part, outcome.effect
    rule = _RULES.get(part.rule) or f"{'below' if part.rule == 'not_above' else 'within ±'} {part.margin:g}"
    p = adjusted.get((finding.claim.number, part.what))
    if part.rule == "less_variance":
        ours = f"{e.mean:.3g}, n = {e.n}"
    else:
        ours = str(e) if math.isfinite(e.mean) else f"undefined, n = {e.n}"
    needed = _count(outcome.seeds_needed) if outcome.seeds_needed else ""
    return (
        str(finding.claim.number),
        part.what + (f" ({outcome.note})" if outcome.note else ""),
        rule + (f": {outcome.verdict}" if outcome.verdict else ""),
        f"{ours} at {finding.steps:,} steps",
        f"{e.p:.2g}" if e.n > 1 else "–",
        f"{p:.2g}" if p is not None else "–",
        f"{part.published:+.3f}" if part.published is not None else "–",
        f"{outcome.detectable:.4f}" if math.isfinite(outcome.detectable) else "–",
        needed or "–",
        finding.claim.source,
    )


def _several(findings: Sequence[Finding]) -> str:
    users: dict[str, list[int]] = {}
    for finding in findings:
        for arm in arms_of(finding.claim) if finding.outcomes else []:
            users.setdefault(f"{finding.claim.suite}/{arm}", []).append(finding.claim.number)
    shared = {arm: numbers for arm, numbers in users.items() if len(numbers) > 1}
    return "; ".join(f"{arm} (claims {', '.join(map(str, numbers))})" for arm, numbers in shared.items())
