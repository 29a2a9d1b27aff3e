"""A suite's report: verdict and effects first, then claims, comparisons, cost and routing. Made from the records alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from moe.lab import law, results, statistics
from moe.lab.claims.registration import Claim
from moe.lab.costs import executed_flops
from moe.lab.expressions import parse
from moe.lab.records import PRIMARY, RECORDS, Record
from moe.lab.report import figures
from moe.lab.report.claims_page import claims_section
from moe.lab.report.figures import loss_effect
from moe.lab.report.markdown import loss_cell, mean_sd, table
from moe.lab.statistics import Effect
from moe.lab.suite import Comparison, Suite
from moe.lab.table import Table


def write(directory: Path, suite: Suite, records: Iterable[Record], claims: Sequence[Claim], digest: str, command: str):
    """Write results.csv, report.md and its pictures.

    Args:
        directory: folder of the suite.
        suite: with its comparisons.
        records: of whatever runs are finished.
        claims: all registered claims.
        digest: SHA-256 of the file of claims.
        command: that made the records.
    """
    records = list(records)
    results.write(directory, records)
    found = Table(suite, records)
    own = [claim for claim in claims if claim.suite == suite.name]
    parts = [f"# {suite.name}", suite.question, *_headline(found)]
    main = next(iter(suite.comparisons.items()), None)
    pictures: list[str] = []
    if main:
        arms = _arms(found, main[1])
        pictures = _pictures(directory, found, main[1], arms, _published(own, main[1].baseline))
    parts += [f"![{Path(name).stem}]({name})" for name in pictures[:2]]
    if own:
        parts += ["## Claims", claims_section(own, {suite.name: found})]
    for index, (name, comparison) in enumerate(suite.comparisons.items()):
        if _arms(found, comparison):
            note = _COMPARISON_NOTE if index == 0 else ""
            parts += [f"## {name[0].upper()}{name[1:]}", _comparison(found, comparison, note)]
    parts += [f"![{Path(name).stem}]({name})" for name in pictures[2:]]
    if suite.experts:
        parts += ["## Law of experts and tokens", _law(found)]
    if suite.sweep is not None:
        parts += ["## Learning rates", _sweep(directory, found)]
    parts += ["## Cost", _costs(found), "## Held-out loss per domain", _domains(found)]
    if routed := _routing(found):
        picture = figures.routing(directory / "routing.png", found)
        parts += ["## Routing at the last step of the longest runs", routed, f"![routing]({picture})"]
    if probed := _probes(found):
        parts += ["## Probes of the trained models", probed]
    parts += ["## Where the numbers come from", _provenance(found, command, digest if own else "")]
    (directory / "report.md").write_text("\n\n".join(part for part in parts if part) + "\n")


def _arms(found: Table, comparison: Comparison) -> list[str]:
    """Arms of a comparison that share at least one run with the baseline."""
    return [arm for arm in comparison.variants if any(found.seeds(s, arm, comparison.baseline) for s in found.horizons)]


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
    names = [figures.forest(directory / "effects.png", found, comparison, arms, published)]
    if len(found.horizons) > 1:
        names.append(figures.by_horizon(directory / "horizons.png", found, comparison, arms))
    return [*names, *filter(None, [figures.curve_differences(directory / "curves.png", found, comparison, arms)])]


# --- Verdict ---------------------------------------------------------------------------------------------------------
def _headline(found: Table) -> list[str]:
    """What the first comparison says at the longest horizon, in sentences; then what is missing."""
    suite, lines = found.suite, []
    if not found.horizons:
        return ["**No run is finished yet.**"]
    compared = list(suite.comparisons.values())[:1]
    reached = max(
        (s for c in compared for arm in _arms(found, c) for s in found.horizons if found.seeds(s, arm, c.baseline)),
        default=found.horizons[-1],
    )
    for comparison in compared:
        for arm in _arms(found, comparison):
            lines.append(f"- {_sentence(found, arm, comparison.baseline, reached)}")
    if lines:
        tokens = reached * suite.tokens_per_step
        lines.insert(0, f"**After {tokens / 1e6:.2g} million tokens ({reached:,} steps):**\n")
    parts = ["\n".join(lines)]
    if reached < suite.longest:
        parts.append(
            f"The longest horizon, {suite.longest:,} steps, has no comparison yet: what these horizons show is **below the "
            "crossing** that the suite looks for, and no evidence against a claim about longer training."
        )
    if len(suite.seeds) < 3:
        parts.append("**A trial:** two seeds show the size of an effect, not whether it is there.")
    if missing := _missing(found):
        parts.append(f"**Not complete.** {missing}")
    return parts


def _sentence(found: Table, arm: str, baseline: str, reached: int) -> str:
    steps = max(s for s in found.horizons if found.seeds(s, arm, baseline))
    e = loss_effect(found, arm, baseline, steps)
    where = "" if steps == reached else f" after {steps:,} steps"
    if not math.isfinite(e.mean):
        counts = {name: len(found.diverged(name, steps)) for name in (arm, baseline)}
        return f"{arm}{where}: diverged in {counts[arm]} runs, {baseline} in {counts[baseline]}, of {e.n} seeds."
    if e.n < 2:
        return f"{arm}{where}: {e.mean:+.4f} nats against {baseline} on one seed, which decides nothing."
    side = "better than" if e.high < 0 else "worse than" if e.low > 0 else "not told apart from"
    detectable = statistics.smallest_detectable(e.sd, e.n)
    text = f"{arm}{where} is {side} {baseline}: {e.mean:+.4f} nats [{e.low:+.4f}, {e.high:+.4f}], "
    text += f"n = {e.n}, p = {e.p:.2g}, smallest detectable effect {detectable:.4f}."
    return text + _crossing(found, arm, baseline)


def _crossing(found: Table, arm: str, baseline: str) -> str:
    """The sentence about where an arm gets ahead; empty without two horizons."""
    points = [(s, loss_effect(found, arm, baseline, s)) for s in found.horizons]
    points = [(s * found.suite.tokens_per_step, e) for s, e in points if math.isfinite(e.mean)]
    if len(points) < 2:
        return ""
    crossing = statistics.crossing(*zip(*points, strict=True))
    if crossing.tokens == 0:
        return " It is ahead at every horizon."
    if math.isnan(crossing.tokens):
        return " It is behind at every horizon."
    end = "beyond the longest horizon" if math.isinf(crossing.high) else f"{crossing.high / 1e6:.2f}"
    return f" It gets ahead at about {crossing.tokens / 1e6:.2f} million tokens [{crossing.low / 1e6:.2f}, {end}]."


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
    return f"Finished runs, of {len(suite.seeds)} seeds each, where seeds are missing: {'; '.join(texts)}."


# --- Tables ----------------------------------------------------------------------------------------------------------
_COMPARISON_NOTE = (
    "Losses are nats per token; differences are paired by seed, negative is better. Pooled: least squares on arm and seed "
    "with one residual variance. Rows × seeds: bootstrap over held-out rows and, from three seeds on, over seeds, for "
    "which it is too narrow by a factor of about √(1 − 1/n). Steps to its loss: median share of the baseline's steps "
    "after which the arm has the baseline's last loss, with its exact interval; > 1 if not reached; only along the "
    "longest runs."
)


def _comparison(found: Table, comparison: Comparison, note: str) -> str:
    """Per horizon: loss, paired effect, pooled effect, adjusted p, bootstrap over rows and seeds."""
    base, blocks = comparison.baseline, []
    for steps in reversed(found.horizons):
        arms = [arm for arm in comparison.variants if found.seeds(steps, arm, base)]
        if not arms:
            continue
        effects = {arm: loss_effect(found, arm, base, steps) for arm in arms}
        decided = [arm for arm in arms if effects[arm].n > 1]
        adjusted = dict(zip(decided, statistics.holm([effects[arm].p for arm in decided]), strict=True))
        pooled = statistics.pooled(_losses(found, [base, *arms], steps), base)
        rows: list[tuple[str, ...]] = [(base, loss_cell(found, base, steps), "baseline", "", "", "", "", "")]
        for arm in arms:
            rows.append(_comparison_row(found, arm, base, steps, effects[arm], adjusted.get(arm), pooled.get(arm)))
        tokens = steps * found.suite.tokens_per_step / 1e6
        header = (
            "arm", "loss", f"less {base} [95 %]", "p", "p, Holm", "pooled model [95 %]", "rows × seeds [95 %]",
            "steps to its loss",
        )  # fmt: skip
        blocks.append(f"**{steps:,} steps, {tokens:.2g} million tokens**\n\n{table(header, rows)}")
    equal = f"Held equal within {comparison.tolerance:.0%}: {', '.join(comparison.equal) or 'nothing'}."
    return "\n\n".join([f"{equal} {note}".strip(), *blocks])


def _comparison_row(
    found: Table, arm: str, base: str, steps: int, e: Effect, adjusted: float | None, pooled: Effect | None
) -> tuple[str, ...]:
    differences, groups = found.row_differences(arm, base, steps)
    low, high = statistics.bootstrap(differences, groups) if len(differences) else (math.nan, math.nan)
    fixed = ", rows alone" if len(differences) < statistics.FEW_SEEDS else ""
    diverged = len(found.diverged(arm, steps)) + len(found.diverged(base, steps))
    return (
        arm,
        loss_cell(found, arm, steps),
        f"{e}, smallest detectable {statistics.smallest_detectable(e.sd, e.n):.4f}" if e.n > 1 and not diverged else
        f"{diverged} diverged runs" if diverged else str(e),
        f"{e.p:.2g}" if e.n > 1 else "–",
        f"{adjusted:.2g}" if adjusted is not None else "–",
        f"{pooled.mean:+.4f} [{pooled.low:+.4f}, {pooled.high:+.4f}]" if pooled else "–",
        f"[{low:+.4f}, {high:+.4f}]{fixed}" if math.isfinite(low) else "–",
        _steps_to_loss(found, arm, base, steps),
    )  # fmt: skip


def _losses(found: Table, arms: Sequence[str], steps: int) -> dict[str, dict[int, float]]:
    return {arm: {s: found.record(arm, steps, s).primary_loss for s in found.seeds(steps, arm)} for arm in arms}


def _steps_to_loss(found: Table, arm: str, base: str, steps: int) -> str:
    shares = []
    for seed in found.seeds(steps, arm, base):
        target, curve = (found.curve(name, steps, seed, "loss", PRIMARY) for name in (base, arm))
        if target and len(curve) > 1:
            shares.append(statistics.steps_to_reach(curve, target[-1][1]) / steps)
    if not shares:
        return "–"
    c = statistics.censored_median(shares)

    def shown(value: float) -> str:
        return "> 1" if math.isinf(value) else f"{value:.2f}"

    interval = f" [{shown(c.low)}, {shown(c.high)}], {c.coverage:.0%}" if c.n > 1 else ""
    return shown(c.median) + interval


def _law(found: Table) -> str:
    """The fitted law, its residuals, or what it lacks."""
    losses = {}
    for name, experts in found.suite.experts.items():
        for steps in found.horizons:
            values = [found.record(name, steps, seed).primary_loss for seed in found.seeds(steps, name)]
            if values and all(map(math.isfinite, values)):
                losses[experts, steps * found.suite.tokens_per_step] = float(np.mean(values))
    fitted = law.fit(losses) if losses else None
    if fitted is None:
        return "Not fitted: two numbers of experts at two horizons are needed."
    terms = zip(law.NAMES, fitted.coefficients, fitted.errors, strict=True)
    text = ", ".join(f"{name} = {value:.4g} ± {error:.2g}" for name, value, error in terms)
    rows = [
        (str(experts), f"{tokens / 1e6:.2g}M", f"{loss:.4f}", f"{fitted.loss(experts, tokens):.4f}",
         f"{fitted.residuals[experts, tokens]:+.4f}")
        for (experts, tokens), loss in losses.items()
    ]  # fmt: skip
    return (
        f"log L = d + a·log D + b·log E + c·log D·log E, least squares on means over seeds: {text} (standard errors); "
        f"residual standard deviation {fitted.sd:.4f}.\n\n"
        + table(("experts E", "tokens D", "loss", "law", "log loss − law"), rows)
    )


def _sweep(directory: Path, found: Table) -> str:
    """The curve, the choices, and which arms are not tuned."""
    sweep = found.suite.sweep
    assert sweep is not None
    if not any(choice.tried for choice in found.choices.values()):
        return f"**Not tuned:** the sweep has not been run. All arms use the base config's rate, {found.suite.learning_rate:g}."
    picture = figures.sweep(directory / "sweep.png", found)
    rows = []
    for name, choice in found.choices.items():
        tried = ", ".join(f"{rate:g}: {loss:.4f} ({steps:,})" for (steps, rate), loss in sorted(choice.tried.items()))
        rows.append((name, f"{choice.rate:g}", "tuned" if choice.tuned else "**not tuned**", tried or "–"))
    note = (
        f"Rates {', '.join(f'{rate:g}' for rate in sweep.learning_rates)} on reserved seeds "
        f"{', '.join(map(str, sweep.seeds))} for {sweep.horizon:,} steps; the best one and its neighbours again for "
        f"{found.suite.longest:,} steps. Until both are done an arm uses {found.suite.learning_rate:g} and is not tuned."
    )
    text = f"{note}\n\n{table(('arm', 'rate used', '', 'loss by rate (steps)'), rows)}"
    return f"{text}\n\n![sweep]({picture})" if picture else text


def _costs(found: Table) -> str:
    """Parameters, model FLOPs, and FLOPs executed at the longest horizon that the arm has."""
    rows = []
    for name in found.variants:
        steps = max(s for s in found.horizons if found.seeds(s, name))
        cost = found.suite.costs(name, steps)
        dropped = _dropped(found, name, steps)
        executed = executed_flops(found.suite.config(name, steps=steps), dropped)
        rows.append((
            name,
            found.suite.variants[name].note,
            f"{cost['total_parameters'] / 1e6:.2f}M",
            f"{cost['active_parameters'] / 1e6:.2f}M",
            f"{steps:,}",
            f"{cost['flops']:.3g}",
            f"{executed:.3g}",
            f"{dropped:.2%}",
        ))  # fmt: skip
    header = ("arm", "", "parameters", "active", "steps", "model FLOPs", "executed FLOPs", "dropped in training")
    return (
        "Executed FLOPs leave out the experts' work on assignments dropped in training; both count the router. No "
        f"wall-clock time is compared: the runs were not timed in turns on an idle machine.\n\n{table(header, rows)}"
    )


def _dropped(found: Table, name: str, steps: int) -> float:
    """Share of assignments dropped over the whole training, mean over layers and seeds."""
    quantity = "train_fraction_tokens_dropped"
    curves = [
        found.curve(name, steps, seed, quantity, "", layer)
        for seed in found.seeds(steps, name)
        for layer in found.layers(name, quantity)
    ]
    return float(np.mean([v for curve in curves for _, v in curve])) if any(curves) else 0.0


def _domains(found: Table) -> str:
    """Loss per domain at the longest horizon that the arm has."""
    domains = list(dict.fromkeys(d for record in found.used for d in record.row_domains))
    rows = []
    for name in found.variants:
        steps = max(s for s in found.horizons if found.seeds(s, name))
        cells = []
        for domain in domains:
            curves = [found.curve(name, steps, s, "loss", domain) for s in found.seeds(steps, name)]
            cells.append(mean_sd([curve[-1][1] for curve in curves if curve]))
        rows.append((name, f"{steps:,}", *cells))
    return table(("arm", "steps", *domains), rows)


def _routing(found: Table) -> str:
    rows, steps = [], found.horizons[-1] if found.horizons else 0
    for name in found.variants:
        layers, seeds = found.layers(name, "max_violation"), found.seeds(steps, name)
        if not layers or not seeds:
            continue
        cells = []
        for quantity in ("max_violation", "router_entropy", "dead_experts", "train_fraction_tokens_dropped"):
            curves = [[found.curve(name, steps, s, quantity, "", layer) for s in seeds] for layer in layers]
            means = [np.mean([c[-1][1] for c in of_layer if c] or [math.nan]) for of_layer in curves]
            cells.append(" / ".join(f"{mean:.2f}" for mean in means))
        rows.append((name, str(len(seeds)), *cells))
    header = ("arm", "n", "MaxVio", "router entropy, nats", "dead experts", "dropped in training")
    return f"Per MoE layer, means over seeds.\n\n{table(header, rows)}" if rows else ""


def _probes(found: Table) -> str:
    rows = []
    for name in found.variants:
        records = [record for record in found.used if record.variant == name and record.probes]
        names = sorted({quantity.partition("@")[0] for record in records for quantity in record.probes})
        for quantity in names:
            layers = found.layers(name, quantity) or [""]
            keys = [f"{quantity}@{layer}" if layer else quantity for layer in layers]
            cells = [mean_sd([r.probes[key] for r in records if key in r.probes]) for key in keys]
            rows.append((name, quantity, str(len(records)), " / ".join(cells)))
    return table(("arm", "quantity", "n", "mean ± sd over seeds, per MoE layer"), rows) if rows else ""


def _provenance(found: Table, command: str, digest: str) -> str:
    records, base = found.records, found.suite.config(next(iter(found.suite.variants)))
    commits, hardware = (sorted({getattr(r, field) for r in records}) for field in ("commit", "hardware"))
    data = sorted({f"{name} {version}" for r in records for name, version in r.data.items()})
    lines = [
        f"Command: `{command}`",
        f"Commit: {', '.join(f'`{commit}`' for commit in commits) or 'none'}",
        f"Hardware: {'; '.join(hardware) or 'none'}",
        f"Model: {base.model.num_layers} layers of {base.model.d_model}; {found.suite.tokens_per_step:,} tokens a step",
        f"Text: {', '.join(data) or 'none'}; primary: {', '.join(found.suite.primary_domains)}; up to "
        f"{found.suite.heldout_rows} held-out rows per domain, mixed over domains in every batch",
        f"Runs: {len(records)} in `{RECORDS}/`, of which {len(found.used)} are compared; "
        f"{sum(record.seconds for record in records) / 3600:.1f} hours",
        "Every number is made from these records; `results.csv` holds all but the row losses as one long table",
    ]
    if digest:
        lines.append(f"Claims file: SHA-256 `{digest}`; each run stores the hash of its claims at its start")
    return "\n".join(f"- {line}." for line in lines)
