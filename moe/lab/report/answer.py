"""The page that answers the lab's main question in one screen: Switch or Mixtral?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe.lab import inference
from moe.lab.claims.decide import CONTRADICTED, NOT_TESTED, SUPPORTED, TOO_SHORT, Finding, assess
from moe.lab.claims.registration import Primary, Registered
from moe.lab.expressions import parse
from moe.lab.inference import Effect
from moe.lab.records import PRIMARY
from moe.lab.report import elsewhere
from moe.lab.report.claims_page import POST_HOC, rules
from moe.lab.report.figures import colors, legend_beside, save
from moe.lab.report.markdown import loss_cell, mean_sd, share_cell, share_note
from moe.lab.report.regime import regime
from moe.lab.step_seconds import StepSeconds
from moe.lab.table import Table
from moe.system.atomic_files import write_atomic
from moe.system.escaping import markdown_table, markdown_text

NAME = "switch_or_mixtral"
#: Suite that the page is about; the page's text on sizes and factors applies to no other.
SUITE = "switch_vs_mixtral"
_LIMITS = """\
The results say nothing about other sizes: the models have two million parameters in all, half a million of them active,
and learn text of four domains. Nor do they say anything about the layers of the released models: Switch's arm has 8
experts, its paper's 128 or more; Mixtral's has 16 of half the dense model's width, so that parameters and FLOPs are
equal, and was released with 8 of full width. Times are of a CPU, where dense and expert FFNs run the same matmuls. The
two factors are the second expert (of half the width) and dropping. As in the papers, the weight of an expert is the
router's probability with K = 1 and is renormalised over the two experts with K = 2, so the effect of K includes this
difference. All arms train at the base config's learning rate; the suite `tuned_rates` compares the arms, each at the
rate of its own sweep. Bits per byte: mean over the domains of nats per token / (ln 2 · bytes per token)."""

_OVER_TRAINING = """\
The contrasts at evaluations along the same runs, by training tokens per active parameter of the dense model. At the
earlier evaluations the learning rate has not decayed yet, so they are not what runs of that length would reach."""

_OTHER_SEEDS = """\
The same contrasts on seeds that no other suite counts (suite {suites}), adjusted by Holm's method over these alone:
{state}. All seeds: over those of both suites, exploratory."""


def is_asked(registered: Registered) -> bool:
    """Whether the primary family is about :data:`SUITE` only."""
    suites = {claim.suite for claim in registered.claims if claim.family == "primary"}
    return registered.primary is not None and suites == {SUITE}


def write_page(
    directory: Path,
    found: Table,
    registered: Registered,
    seconds: StepSeconds | None = None,
    others: Sequence[Table] = (),
) -> None:
    """Write switch_or_mixtral.md and its pictures from the suite's records.

    Args:
        directory: to write to.
        found: records of the suite of the primary family.
        registered: claims and rules.
        seconds: measured steps of the suite's arms.
        others: records of other suites; their first comparison with a ``whole`` gives the unit of every arm's gain,
            and claims of the family "replication" are decided on them.

    Raises:
        ConfigError: see :func:`moe.lab.claims.registration.read_claims`.
    """
    primary = registered.primary
    assert primary is not None, "the suite's claims have a primary family"
    tables = {table.suite.name: table for table in (*others, found)}
    assessed = assess([claim for claim in registered.claims if claim.family], tables, primary)
    findings = [finding for finding in assessed if finding.claim.family == "primary"]
    repeated = [finding for finding in assessed if finding.claim.family == "replication"]
    unit = _unit(others, found.suite.longest)
    scales, headline = tables.get(elsewhere.SCALES), _headline(findings)
    curve = _over_evaluations(found, headline)
    summary = elsewhere.summary(found, headline.claim.parts[0], curve, scales) if headline.outcomes else ""
    parts = [
        "# Switch or Mixtral, at one size?",
        f"{markdown_text(primary.question)} {_answer(findings)} {summary}".strip(),
        *_picture(_effects(directory / f"{NAME}.png", findings, repeated, primary)),
        _contrasts(findings),
        *_on_other_seeds(findings, repeated, tables),
        *elsewhere.simple_effects(found, tables.get(repeated[0].claim.suite) if repeated else None),
        *elsewhere.initial_scale(scales),
        *_at_papers_scale([finding for finding in assessed if finding.claim.family == "paper_scale"]),
        *_over_training(directory, found, findings),
        *elsewhere.unseen_text(found, findings),
        *elsewhere.speed_up(found, seconds),
        "## Arms",
        f"{regime(found)}." if found.horizons else "",
        _arms(found, seconds, unit),
        *([unit.note] if unit else []),
        *_picture(_loss_by_cost(directory / f"{NAME}_cost.png", found, seconds)),
        *([_measured(seconds)] if seconds else []),
        "## Limitations",
        _LIMITS.replace("\n", " "),
        "## Rules",
        rules(primary),
        f"Claims file: SHA-256 `{registered.digest}`. Records: suite `{found.suite.name}`.",
    ]
    write_atomic(directory / f"{NAME}.md", ("\n\n".join(filter(None, parts)) + "\n").encode())


def _headline(findings: Sequence[Finding]) -> Finding:
    """The finding on the two papers' layers, or the first one."""
    return next((f for f in findings if _contrast(f) == "loss[mixtral] - loss[switch]"), findings[0])


def _answer(findings: Sequence[Finding]) -> str:
    """Which of the contrasts are decided."""
    decided = [f for f in findings if f.verdict in (SUPPORTED, CONTRADICTED)]
    waiting = [f for f in findings if f.verdict in (NOT_TESTED, TOO_SHORT)]
    seeds = sorted({outcome.effect.n for f in findings for outcome in f.outcomes})
    if not seeds:
        return "**No pair of arms has a run yet.**"
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    text = f"**{len(decided)} of {len(findings)} contrasts decided**, on {count} seed{'' if seeds == [1] else 's'}"
    text += f"; {len(waiting)} have no runs yet." if waiting else "."
    return " ".join([text, *(f"{markdown_text(f.claim.sentence).rstrip('.')}: {f.verdict}." for f in decided)])


def _contrast(finding: Finding) -> str:
    """The expression that a finding is about, by which the primary family's and the replication's are matched."""
    return finding.claim.parts[0].value


def _contrasts(findings: Sequence[Finding], together: Mapping[str, Effect] | None = None) -> str:
    """Table of the findings; ``together``: contrast → its effect over all seeds, for another column."""
    rows = []
    for finding in findings:
        outcome = finding.outcomes[0] if finding.outcomes else None
        remarks = [POST_HOC, *finding.lacks] if finding.post_hoc else finding.lacks
        rows.append((
            markdown_text(finding.claim.parts[0].what),
            str(outcome.effect) if outcome and math.isfinite(outcome.effect.mean) else "–",
            f"{finding.adjusted:.2g}" if outcome else "–",
            f"**{finding.verdict}**",
            f"{outcome.bound:.4f}" if outcome and math.isfinite(outcome.bound) else "–",
            *([] if together is None else [str(together.get(_contrast(finding), "–"))]),
            "; ".join(remarks) or markdown_text(finding.note) or "–",
        ))  # fmt: skip
    columns = [] if together is None else ["all seeds [95 %]"]
    header = ("contrast, nats per token", "effect [95 %]", "p, Holm", "verdict", "bound", *columns, "caveats")
    return markdown_table(header, rows)


def _on_other_seeds(findings: Sequence[Finding], repeated: Sequence[Finding], tables: Mapping[str, Table]) -> list[str]:
    """The section on the replication's contrasts; empty without runs of one."""
    if not any(finding.outcomes for finding in repeated):
        return []
    pairs = [(first, again) for again in repeated for first in findings if _contrast(first) == _contrast(again)]
    together = {}
    for first, again in pairs:
        if first.outcomes and again.outcomes and first.steps == again.steps:
            values = [*_values(first, tables), *_values(again, tables)]
            if np.isfinite(values).all():
                together[_contrast(again)] = inference.effect(values)
    if any(finding.interim or not finding.outcomes for finding in repeated):
        state = "some runs are still to be made"
    else:
        decided = [pair for pair in pairs if pair[0].verdict in (SUPPORTED, CONTRADICTED)]
        agree = sum(first.verdict == again.verdict for first, again in decided)
        state = f"of the {len(decided)} that were decided on the first seeds, {agree} have the same verdict"
        if rest := len(pairs) - len(decided):
            state += f"; an undecided one, {rest} of {len(pairs)}, has nothing to repeat"
    suites = ", ".join(f"`{name}`" for name in sorted({finding.claim.suite for finding in repeated}))
    text = _OTHER_SEEDS.replace("\n", " ").format(suites=suites, state=state)
    return ["## Other seeds", text, _contrasts(repeated, together)]


def _at_papers_scale(findings: Sequence[Finding]) -> list[str]:
    """The contrasts of the family at the initial scale of Switch's paper; empty without runs of one."""
    if not any(finding.outcomes for finding in findings):
        return []
    suites = ", ".join(f"`{name}`" for name in sorted({finding.claim.suite for finding in findings}))
    text = f"Registered at scale 0.1 before any of its runs, on seeds that no other suite counts (suites {suites})."
    return [text, _contrasts(findings)]


def _values(finding: Finding, tables: Mapping[str, Table]) -> list[float]:
    """The contrast of a finding by registered seed."""
    table = tables[finding.claim.suite]
    return [*table.only(table.suite.registered_seeds).values(finding.steps, _contrast(finding)).values()]


def _over_evaluations(found: Table, finding: Finding) -> dict[float, Effect]:
    """Tokens per active parameter → effect of a contrast, at the evaluations of its runs."""
    terms = parse(_contrast(finding))
    if not finding.steps or any(term.quantity not in ("", "loss") for term in terms):
        return {}
    base = next(iter(found.suite.variants))
    per_step = found.suite.tokens_per_step / found.suite.costs(base, finding.steps)["active_parameters"]
    curve = found.over_training(finding.steps, terms)
    return {step * per_step: inference.effect(values) for step, values in curve.items()}


def _effects_over_training(curves: Mapping[str, Mapping[float, Effect]]) -> str:
    """Table with a column at the end of training, at half of it, a quarter and so on; empty for fewer than two."""
    last = max((max(curve, default=0.0) for curve in curves.values()), default=0.0)
    ratios = [last / 2**power for power in reversed(range(8))]
    shown = [at for at in ratios if any(math.isclose(at, x) for curve in curves.values() for x in curve)]
    if len(shown) < 2:
        return ""
    rows = []
    for what, curve in curves.items():
        cells = [next((str(e) for x, e in curve.items() if math.isclose(at, x)), "–") for at in shown]
        rows.append((markdown_text(what), *cells))
    return markdown_table(("contrast", *(f"{at:.3g} tokens per parameter" for at in shown)), rows)


def _over_training(directory: Path, found: Table, findings: Sequence[Finding]) -> list[str]:
    """The section on earlier evaluations; empty without two of them."""
    curves = {finding.claim.parts[0].what: _over_evaluations(found, finding) for finding in findings}
    table = _effects_over_training(curves)
    if not table:
        return []
    picture = _contrasts_over_training(directory / f"{NAME}_over_training.png", curves)
    return ["## Over training", _OVER_TRAINING.replace("\n", " "), table, *_picture(picture)]


def _contrasts_over_training(path: Path, curves: Mapping[str, Mapping[float, Effect]]) -> str:
    """The contrasts along the runs with their intervals as bands; empty without curves."""
    fig = Figure(figsize=(7.2, 5.4))
    axis = fig.subplots()
    for number, (what, effects) in enumerate(curves.items()):
        curve = {x: e for x, e in effects.items() if math.isfinite(e.mean)}
        if len(curve) < 2:
            continue
        xs, color = [*curve], f"C{number}"
        axis.plot(xs, [e.mean for e in curve.values()], color=color, marker=".", label=what)
        if all(e.n > 2 for e in curve.values()):
            low, high = [e.low for e in curve.values()], [e.high for e in curve.values()]
            axis.fill_between(xs, low, high, color=color, alpha=0.15)
    if not axis.lines:
        return ""
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="training tokens per active parameter of the dense model", ylabel="nats per token")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False)
    return save(fig, path)


@dataclasses.dataclass(frozen=True)
class _Unit:
    """A difference between two arms as the unit of every arm's gain: losses of both by seed, and the name and note of
    the second."""

    base: Mapping[int, float]
    whole: Mapping[int, float]
    name: str
    note: str


def _unit(others: Sequence[Table], steps: int) -> _Unit | None:
    """The first comparison with a ``whole`` that has runs of a horizon; None without one."""
    for table in others:
        for comparison in table.suite.comparisons.values():
            if comparison.whole and table.seeds(steps, comparison.baseline, comparison.whole):
                name, base = comparison.whole, comparison.baseline
                about = f"{markdown_text(table.suite.variants[name].note)}; suite `{table.suite.name}`"
                note = share_note(base, name, about)
                return _Unit(table.losses(base, steps), table.losses(name, steps), name, note)
    return None


def _arms(found: Table, seconds: StepSeconds | None, unit: _Unit | None) -> str:
    """Losses of every arm by how they are measured, and its cost."""
    steps, rows = found.suite.longest, []
    columns = (("loss", name) for name in found.suite.unseen)
    columns = [("own_loss", PRIMARY), ("last_tenth_loss", ""), *columns]
    for name in found.variants:
        cells = []
        for quantity, domain in columns:
            curves = [found.curve(name, steps, seed, quantity, domain) for seed in found.seeds(steps, name)]
            cells.append(mean_sd([curve[-1][1] for curve in curves if curve]))
        cells += [elsewhere.bits_per_byte(found, name), f"{found.dropped(name, steps):.1%}"]
        if unit:
            cells += [share_cell(found.losses(name, steps), unit.base, unit.whole)]
        if seconds:
            cells += [f"{1000 * seconds.arms[name][1]:.0f}" if name in seconds.arms else "–"]
        rows.append((name, markdown_text(found.suite.variants[name].note), loss_cell(found, name, steps), *cells))
    header = (
        "arm", "description", "loss, without drops", "loss at its own capacity", "training loss, last tenth",
        *(f"{name}, without drops" for name in found.suite.unseen), "bits per byte", "dropped in training",
        *([f"share of {unit.name}'s gain [95 %]"] if unit else []), *(["CPU ms per step"] if seconds else []),
    )  # fmt: skip
    return markdown_table(header, rows) if rows else "No run is finished yet."


def _picture(name: str) -> list[str]:
    return [f"![{Path(name).stem}]({name})"] if name else []


def _tested(findings: Sequence[Finding]) -> list[tuple[Finding, Effect]]:
    """Findings on a contrast whose effect is finite, with it."""
    return [(f, f.outcomes[0].effect) for f in findings if f.outcomes and math.isfinite(f.outcomes[0].effect.mean)]


def _effects(path: Path, findings: Sequence[Finding], repeated: Sequence[Finding], primary: Primary) -> str:
    """The contrasts with their intervals over the range that counts as no effect, those on other seeds below the first;
    empty without one."""
    tested = _tested(findings)
    if not tested:
        return ""
    again = {_contrast(finding): (finding, e) for finding, e in _tested(repeated)}
    labels = []
    fig = Figure(figsize=(7.2, 1.3 + 0.55 * len(tested)))
    axis = fig.subplots()
    bound = primary.equivalence
    axis.axvspan(-bound, bound, color="0.9", label=f"within ±{bound:g}: counts as no effect")
    for y, (finding, e) in enumerate(tested):
        _point(axis, -y, finding, e, "o", "C0")
        count = f"n = {e.n}"
        if other := again.get(_contrast(finding)):
            _point(axis, -y - 0.25, *other, "s", "C1", None if y else "on other seeds")
            count += f"; other seeds: {other[1].n}"
        labels.append(f"{_wrapped(finding.claim.parts[0].what)}\n({count})")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks([-y for y in range(len(tested))], labels, fontsize=8)
    axis.set(xlabel="nats per token; filled: decided", ylim=(0.6 - len(tested), 0.6))
    axis.locator_params(axis="x", nbins=6)  # the labels of the contrasts leave little room
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return save(fig, path)


def _point(
    axis: Axes, y: float, finding: Finding, e: Effect, marker: str, color: str, label: str | None = None
) -> None:
    """An effect with its interval, filled where it is decided."""
    error = [[e.mean - e.low], [e.high - e.mean]] if e.n > 2 else None
    face = color if finding.verdict in (SUPPORTED, CONTRADICTED) else "white"
    axis.errorbar(e.mean, y, xerr=error, fmt=marker, color=color, capsize=3, markerfacecolor=face, label=label)


def _wrapped(text: str) -> str:
    """The text on at most two lines, broken at the comma nearest to its middle."""
    commas = [index for index, char in enumerate(text) if char == "," and index > len("loss,")]
    if len(text) < 45 or not commas:
        return text
    middle = min(commas, key=lambda index: abs(index - len(text) / 2))
    return f"{text[: middle + 1]}\n{text[middle + 1 :].strip()}"


def _measured(seconds: StepSeconds) -> str:
    """How the seconds were measured."""
    return (
        f"CPU time: processor time of a train step, median of {seconds.steps}, all arms in turns, on "
        f"{markdown_text(seconds.hardware)}, commit `{seconds.commit}`."
    )


def _loss_by_cost(path: Path, found: Table, seconds: StepSeconds | None) -> str:
    """Held-out loss along the longest runs against training FLOPs, and against processor time where it was measured,
    means over seeds; empty without curves."""
    steps, color = found.suite.longest, colors(found)
    fig = Figure(figsize=(11.5 if seconds else 7.2, 4.2))
    panels = fig.subplots(1, 2 if seconds else 1, squeeze=False)[0]
    for name in found.variants:
        curves = [found.curve(name, steps, seed, "loss", PRIMARY) for seed in found.seeds(steps, name)]
        curves = [dict(curve) for curve in curves if len(curve) > 1]
        shared = sorted(set.intersection(*map(set, curves))) if curves else []
        if not shared:
            continue
        means = [sum(curve[step] for curve in curves) / len(curves) for step in shared]
        costs = [found.suite.costs(name, steps)["flops"] / steps / 1e12]
        if seconds and name in seconds.arms:
            costs.append(seconds.arms[name][1] / 60)
        for axis, each in zip(panels, costs, strict=False):
            label = f"{name} (n = {len(curves)})"
            axis.plot([step * each for step in shared], means, marker=".", color=color[name], label=label)
    if not panels[0].lines:
        return ""
    panels[0].set(
        xlabel="training FLOPs of the model, in trillions, drops not subtracted", ylabel="held-out loss, nats"
    )
    if seconds:
        panels[1].set(xlabel="processor time of the training steps, minutes")
    for axis in panels:
        axis.grid(alpha=0.3)
    legend_beside(*panels)
    return save(fig, path)
