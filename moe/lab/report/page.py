"""A suite's report, made from its records alone: verdict and effects first, then claims, comparisons, cost, routing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe.lab import inference, results
from moe.lab.claims.registration import Claim, Registered
from moe.lab.expressions import parse
from moe.lab.records import TABLE, update_table
from moe.lab.report import figures, sections
from moe.lab.report.claims_page import claims_section, rules
from moe.lab.report.figures import loss_effect
from moe.lab.report.regime import regime
from moe.lab.suite import Comparison, Suite
from moe.lab.table import Table
from moe.system.atomic_files import write_atomic
from moe.system.escaping import markdown_page, markdown_text


def write(directory: Path, tables: Mapping[str, Table], suite: Suite, registered: Registered, command: str) -> None:
    """Write records.parquet, results.csv, report.md and its pictures.

    Args:
        directory: folder of the report.
        tables: suite → its records, of this suite and of those that hold other members of a family.
        suite: suite of the report.
        registered: all claims.
        command: command that made the records.
    """
    directory.mkdir(parents=True, exist_ok=True)
    found, claims = tables[suite.name], registered.claims
    update_table(directory / TABLE, found.records)
    results.write(directory, found.records, {record.run for record in found.used})
    own = [claim for claim in claims if claim.suite == suite.name]
    parts = [f"# {suite.name}", markdown_text(suite.question), *_headline(found)]
    main = next(iter(suite.comparisons.items()), None)
    pictures: list[str] = []
    if main:
        arms = _arms(found, main[1])
        pictures = _pictures(directory, found, main[1], arms, _published(own, main[1].baseline))
    parts += [f"![{Path(name).stem}]({name})" for name in pictures[:3]]
    if own:
        parts += ["## Claims", rules(registered.primary)]
        parts += [claims_section(claims, tables, registered.primary, suite.name)]
    for index, (name, comparison) in enumerate(suite.comparisons.items()):
        if _arms(found, comparison):
            note = sections.COMPARISON_NOTE if index == 0 else ""
            parts += [f"## {name[0].upper()}{name[1:]}", sections.comparison_section(found, comparison, note)]
    parts += [f"![{Path(name).stem}]({name})" for name in pictures[3:]]
    if suite.experts:
        parts += ["## Law of experts and tokens", sections.law_section(found)]
    parts += ["## Learning rates", sections.sweep_section(directory, found)]
    if main and (effects := sections.domain_effects_section(found, main[1])):
        parts += ["## Effects per domain", effects]
    parts += ["## Cost", sections.costs_section(found), "## Held-out loss per domain", sections.domains_section(found)]
    if routed := sections.routing_section(found):
        picture = figures.routing(directory / "routing.png", found)
        parts += ["## Routing at the last step", routed, f"![routing]({picture})"]
    if probed := sections.probes_section(found):
        parts += ["## Probes of the trained models", probed]
        arms = [name for name in found.variants if "specialisation" in suite.variants[name].probes]
        names = [figures.specialisation(directory / f"specialisation_{name}.png", found, name) for name in arms]
        names.append(figures.masked(directory / "masked.png", found))
        parts += [f"![{Path(name).stem}]({name})" for name in names if name]
    parts += ["## Where the numbers come from", _provenance(found, command, registered.digest if own else "")]
    write_atomic(directory / "report.md", markdown_page("\n\n".join(part for part in parts if part) + "\n"))


def _arms(found: Table, comparison: Comparison) -> list[str]:
    """Arms of a comparison that share at least one run with the baseline."""
    return [arm for arm in comparison.variants if found.longest(arm, comparison.baseline)]


def _published(claims: Sequence[Claim], baseline: str) -> dict[str, float]:
    """Arm → published effect of the claims that are about its loss less that of the baseline."""
    found = {}
    for part in (part for claim in claims for part in claim.parts if part.published is not None):
        terms = parse(part.value)
        difference = [(t.factor, t.quantity, t.first) for t in terms] == [(1, "loss", False), (-1, "loss", False)]
        if difference and terms[1].variant == baseline and part.published is not None:
            found[terms[0].variant] = part.published
    return found


def _pictures(
    directory: Path, found: Table, comparison: Comparison, arms: Sequence[str], published: Mapping[str, float]
) -> list[str]:
    if not arms:
        return []
    names = [
        figures.losses(directory / "losses.png", found, [comparison.baseline, *arms]),
        figures.forest(directory / "effects.png", found, comparison, arms, published),
    ]
    compared = [steps for steps in found.horizons if any(found.seeds(steps, a, comparison.baseline) for a in arms)]
    if len(compared) > 1:
        names.append(figures.by_horizon(directory / "horizons.png", found, comparison, arms))
    return [*names, *filter(None, [figures.curve_differences(directory / "curves.png", found, comparison, arms)])]


# --- Verdict ---------------------------------------------------------------------------------------------------------
def _headline(found: Table) -> list[str]:
    """Sentences on the first comparison at the longest horizon, then on missing runs."""
    suite, lines = found.suite, []
    if not found.horizons:
        return ["**No run is finished yet.**"]
    compared = list(suite.comparisons.values())[:1]
    pairs = [(arm, comparison.baseline) for comparison in compared for arm in comparison.variants]
    reached = max((found.longest(*pair) for pair in pairs), default=0) or found.horizons[-1]
    for comparison in compared:
        for arm in _arms(found, comparison):
            lines.append(f"- {_sentence(found, arm, comparison.baseline, reached)}")
    if lines:
        tokens = reached * suite.tokens_per_step
        lines.insert(0, f"**After {tokens / 1e6:.3g} million tokens ({reached:,} steps), exploratory:**\n")
    parts = ["\n".join(lines)]
    if not_tuned := [name for name in found.variants if not found.choices[name, reached].tuned]:
        which = "any arm" if len(not_tuned) == len(found.variants) else ", ".join(not_tuned)
        parts.append(
            f"**The learning rate is not tuned for {which}** at {reached:,} steps: a difference may come from learning "
            "rates rather than from layers."
        )
    if reached < suite.longest:
        parts.append(
            f"The longest horizon, {suite.longest:,} steps, has no comparison yet: shorter ones are no evidence "
            "against a claim about longer training."
        )
    if len(suite.seeds) < 3:
        parts.append("**A trial:** two seeds suggest the size of an effect, but cannot show that there is one.")
    if missing := _missing(found):
        parts.append(f"**Incomplete.** {missing}")
    return parts


def _sentence(found: Table, arm: str, baseline: str, reached: int) -> str:
    steps = found.longest(arm, baseline)
    e = loss_effect(found, arm, baseline, steps)
    where = "" if steps == reached else f" after {steps:,} steps"
    if not math.isfinite(e.mean):
        counts = {name: len(found.diverged(name, steps)) for name in (arm, baseline)}
        return f"{arm}{where}: diverged in {counts[arm]} runs, {baseline} in {counts[baseline]}, of {e.n} seeds."
    if e.n < 2:
        return f"{arm}{where}: {e.mean:+.4f} nats against {baseline} on one seed, which decides nothing."
    side = "better than" if e.high < 0 else "worse than" if e.low > 0 else "not significantly different from"
    detectable = inference.smallest_detectable(e.sd, e.n)
    text = f"{arm}{where} is {side} {baseline}: {e.mean:+.4f} nats [{e.low:+.4f}, {e.high:+.4f}], "
    text += f"n = {e.n}, p = {e.p:.2g}, smallest detectable effect {detectable:.4f}."
    return text + _crossing(found, arm, baseline)


def _crossing(found: Table, arm: str, baseline: str) -> str:
    """The sentence about where an arm gets ahead; empty without two horizons."""
    points = [(s, loss_effect(found, arm, baseline, s)) for s in found.horizons]
    points = [(s * found.suite.tokens_per_step, e) for s, e in points if math.isfinite(e.mean)]
    if len(points) < 2:
        return ""
    ahead = [e.mean <= 0 for _, e in points]
    if ahead != sorted(ahead):  # no horizon from which on it is ahead
        return " Its mean loss is the lower one at some horizons and the higher one at others."
    crossing = inference.crossing(*zip(*points, strict=True))
    if crossing.tokens == 0:
        return " Its mean loss is the lower one at every horizon."
    if math.isnan(crossing.tokens):
        return " Its mean loss is the higher one at every horizon."
    end = "beyond the longest horizon" if math.isinf(crossing.high) else f"{crossing.high / 1e6:.2f}"
    point, low = crossing.tokens / 1e6, crossing.low / 1e6
    return f" Its mean loss is the lower one from about {point:.2f} million tokens on [{low:.2f}, {end}]."


def _missing(found: Table) -> str:
    """Arms and seeds of the suite that have no run, by horizon."""
    suite, texts = found.suite, []
    for steps in suite.steps:
        counts = {name: len(set(found.seeds(steps, name)) & set(suite.seeds)) for name in suite.variants}
        lacking = [f"{name} {count}" for name, count in counts.items() if count < len(suite.seeds)]
        if lacking:
            texts.append(f"{steps:,} steps: {', '.join(lacking)}")
    if not texts:
        return ""
    return f"Number of finished seeds, of {len(suite.seeds)}, where some are missing: {'; '.join(texts)}."


def _provenance(found: Table, command: str, digest: str) -> str:
    records, base = found.records, found.suite.config(next(iter(found.suite.variants)))
    commits, hardware = (sorted({getattr(r, field) for r in records}) for field in ("commit", "hardware"))
    data = sorted({f"{name} {version}" for r in records for name, version in r.data.items()})
    lines = [
        f"Command: `{command.replace('`', '')}`",
        f"Commit: {', '.join(f'`{commit}`' for commit in commits) or 'none'}",
        f"Hardware: {'; '.join(hardware) or 'none'}",
        f"Model: {base.model.num_layers} layers of width {base.model.d_model}; "
        f"{found.suite.tokens_per_step:,} tokens per step",
        regime(found),
        f"Versions of the text: {', '.join(data) or 'none'}; primary domains: "
        f"{', '.join(found.suite.primary_domains) or 'all'}; up to {found.suite.heldout_rows} held-out rows per "
        "domain, mixed over domains in every batch",
        f"Runs: {len(records)} in `{TABLE}`, of which {len(found.used)} are compared; "
        f"{sum(record.seconds for record in records) / 3600:.1f} hours in total",
        "Every number on this page is computed from these records; `results.csv` holds them as one long table, without "
        "the losses of single held-out rows",
    ]
    if digest:
        lines.append(f"Claims file: SHA-256 `{digest}`; each run stores the hashes of the claims when it starts")
    return "\n".join(f"- {line}." for line in lines)
