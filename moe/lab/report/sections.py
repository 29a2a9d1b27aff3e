"""Sections of a suite's report, each a note and a Markdown table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe.lab import inference, law, schedule
from moe.lab.costs import executed_flops
from moe.lab.inference import Effect
from moe.lab.records import OWN, PRIMARY
from moe.lab.report import figures
from moe.lab.report.figures import effect_of, loss_effect
from moe.lab.report.markdown import loss_cell, mean_sd, share_cell, share_note
from moe.lab.suite import MAX_DROP_DIFFERENCE, Comparison
from moe.lab.table import Table
from moe.system.escaping import markdown_table, markdown_text

COMPARISON_NOTE = (
    "Losses are in nats per token on held-out text, evaluated without drops; differences are paired by seed, and "
    "negative is better. All of this is exploratory: verdicts are in the section on claims. Pooled model: least "
    "squares on arm and seed with one residual variance. Rows × seeds: bootstrap over held-out rows and, with at least "
    "three seeds, over seeds; over seeds it is too narrow by a factor of about √(1 − 1/n). Training loss: difference "
    "over the last tenth of the training batches, at the capacities of training. At own capacity: difference with each "
    "arm evaluated at its own capacity. Steps to baseline's loss: share of the steps after which the arm reaches the "
    "baseline's final loss: median, its exact interval and that interval's coverage; > 1: not reached; only for the "
    "longest runs."
)


def comparison_section(found: Table, comparison: Comparison, note: str) -> str:
    """Per horizon: loss, paired effect, pooled effect, adjusted p, bootstrap over rows and seeds."""
    base, blocks = comparison.baseline, []
    for steps in reversed(found.horizons):
        arms = [arm for arm in comparison.variants if found.seeds(steps, arm, base)]
        if not arms:
            continue
        effects = {arm: loss_effect(found, arm, base, steps) for arm in arms}
        decided = [arm for arm in arms if effects[arm].n > 1]
        adjusted = dict(zip(decided, inference.holm([effects[arm].p for arm in decided]), strict=True))
        losses = {arm: found.losses(arm, steps) for arm in [base, *arms]}
        pooled = inference.pooled(losses, base)
        whole = losses.get(comparison.whole)
        rows: list[tuple[str, ...]] = [(base, loss_cell(found, base, steps), "baseline", *[""] * (7 + bool(whole)))]
        for arm in arms:
            row = _comparison_row(found, arm, base, steps, effects[arm], adjusted.get(arm), pooled.get(arm))
            rows.append((*row, share_cell(losses[arm], losses[base], whole)) if whole else row)
        tokens = steps * found.suite.tokens_per_step / 1e6
        header = (
            "arm", "loss", f"difference from {base} [95 %]", "p", "p, Holm", "pooled model [95 %]",
            "rows × seeds [95 %]", "training loss [95 %]", "at own capacity [95 %]", "steps to baseline's loss",
            *([f"share of {comparison.whole}'s gain [95 %]"] if whole else []),
        )  # fmt: skip
        warning = _comparability(found, [base, *arms], steps)
        blocks.append(f"**{steps:,} steps, {tokens:.3g} million tokens**{warning}\n\n{markdown_table(header, rows)}")
    held = ", ".join(comparison.equal).replace("_", " ").replace("flops", "FLOPs")
    equal = f"Held equal within {comparison.tolerance:.0%}: {held or 'nothing'}."
    share = share_note(base, comparison.whole) if comparison.whole else ""
    about = " ".join(filter(None, (equal, note, share)))
    return "\n\n".join([about, *blocks])


def _comparison_row(
    found: Table, arm: str, base: str, steps: int, e: Effect, adjusted: float | None, pooled: Effect | None
) -> tuple[str, ...]:
    differences, groups = found.row_differences(arm, base, steps)
    low, high = inference.bootstrap(differences, groups) if len(differences) else (math.nan, math.nan)
    fixed = ", rows alone" if len(differences) < inference.FEW_SEEDS else ""
    diverged = len(found.diverged(arm, steps)) + len(found.diverged(base, steps))
    return (
        arm,
        loss_cell(found, arm, steps),
        f"{e}, smallest detectable {inference.smallest_detectable(e.sd, e.n):.4f}" if e.n > 1 and not diverged else
        f"diverged runs: {diverged}" if diverged else str(e),
        f"{e.p:.2g}" if e.n > 1 else "–",
        f"{adjusted:.2g}" if adjusted is not None else "–",
        f"{pooled.mean:+.4f} [{pooled.low:+.4f}, {pooled.high:+.4f}]" if pooled else "–",
        f"[{low:+.4f}, {high:+.4f}]{fixed}" if math.isfinite(low) else "–",
        _interval(effect_of(found, arm, base, steps, "last_tenth_loss")),
        _interval(effect_of(found, arm, base, steps, "own_loss")),
        _steps_to_loss(found, arm, base, steps),
    )  # fmt: skip


def _interval(e: Effect) -> str:
    if not math.isfinite(e.mean):
        return "–"
    return f"{e.mean:+.4f} [{e.low:+.4f}, {e.high:+.4f}]" if e.n > 1 else f"{e.mean:+.4f}"


def _comparability(found: Table, arms: Sequence[str], steps: int) -> str:
    """Warnings on differences in training or measurement that favour an arm; empty without any."""
    texts = []
    shares = {arm: found.dropped(arm, steps) for arm in arms}
    if max(shares.values()) - min(shares.values()) > MAX_DROP_DIFFERENCE:
        listed = ", ".join(f"{arm} {share:.1%}" for arm, share in shares.items())
        why = found.suite.dropping_differs
        texts.append(
            f"Dropped in training: {listed}. {'Compared nevertheless: ' + markdown_text(why) if why else _UNEQUAL}."
        )
    own = [a for a in arms if any(found.record(a, steps, s).evaluated == OWN for s in found.seeds(steps, a))]
    if own:
        texts.append(f"Evaluated at their own capacity, since their gates have no dropless form: {', '.join(own)}.")
    return "".join(f"\n\n{text}" for text in texts)


_UNEQUAL = "**Not comparable: the shares differ by more than the suite allows**"


def share_of_steps(found: Table, arm: str, base: str, steps: int) -> inference.Censored | None:
    """Share of the steps after which an arm reaches the baseline's final loss, over seeds; None without curves."""
    shares = []
    for seed in found.seeds(steps, arm, base):
        target, curve = (found.curve(name, steps, seed, "loss", PRIMARY) for name in (base, arm))
        if target and seed in found.diverged(arm, steps):
            shares.append(math.inf)
        elif target and len(curve) > 1:
            shares.append(inference.steps_to_reach(curve, target[-1][1]) / steps)
    return inference.censored_median(shares) if shares else None


def _steps_to_loss(found: Table, arm: str, base: str, steps: int) -> str:
    c = share_of_steps(found, arm, base, steps)
    if c is None:
        return "–"

    def shown(value: float) -> str:
        return "> 1" if math.isinf(value) else f"{value:.2f}"

    interval = f" [{shown(c.low)}, {shown(c.high)}], {c.coverage:.0%}" if c.n > 1 else ""
    return shown(c.median) + interval


def law_section(found: Table) -> str:
    """The fitted law and its residuals, or why it was not fitted."""
    by_seed: dict[int, dict[tuple[int, int], float]] = {}
    for name, experts in found.suite.experts.items():
        for steps in found.horizons:
            point = experts, found.suite.sizes.get(name, steps * found.suite.tokens_per_step)
            for seed in found.seeds(steps, name):
                by_seed.setdefault(seed, {})[point] = found.record(name, steps, seed).primary_loss
    points = {point for losses in by_seed.values() for point in losses}
    of_point = {point: [losses[point] for losses in by_seed.values() if point in losses] for point in sorted(points)}
    losses = {point: float(np.mean(values)) for point, values in of_point.items() if all(map(math.isfinite, values))}
    fitted = law.fit(losses) if losses else None
    if fitted is None or len(fitted.names) < 2:
        return "Not fitted: at least two numbers of experts are needed."
    whole = [of_seed for of_seed in by_seed.values() if of_seed.keys() == losses.keys()]
    over_seeds = law.intervals(whole)
    scale, sign = ("parameters", "N") if found.suite.sizes else ("tokens", "D")
    terms = {"d": "d", "a": f"a·log {sign}", "b": "b·log E", "c": f"c·log {sign}·log E"}
    triples = zip(fitted.names, fitted.coefficients, fitted.errors, strict=True)
    text = ", ".join(f"{name} = {value:.4g} ± {error:.2g}" for name, value, error in triples)
    ends = ", ".join(f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in over_seeds.items())
    rows = [
        (str(experts), f"{size / 1e6:.3g}M", f"{loss:.4f}", f"{loss - fitted.residuals[experts, size]:.4f}",
         f"{fitted.residuals[experts, size]:+.4f}")
        for (experts, size), loss in losses.items()
    ]  # fmt: skip
    return (
        f"L = L∞ + exp({' + '.join(terms[name] for name in fitted.names)}), least squares on means over seeds: L∞ = "
        f"{fitted.floor:.4f}, {text} (standard errors at this L∞); residual standard deviation {fitted.sd:.4f}. "
        + (f"95 % intervals over {len(whole)} seeds, with L∞ fitted each time: {ends}.\n\n" if ends else "\n\n")
        + markdown_table(("experts E", f"{scale} {sign}", "loss", "law", "loss − law"), rows)
    )


def sweep_section(directory: Path, found: Table) -> str:
    """The curve, the choices, and which arms are not tuned."""
    sweep = found.suite.sweep
    if sweep is None or not any(choice.tried for choice in found.choices.values()):
        why = "the suite has no sweep" if sweep is None else "the sweep has not been run"
        return f"**Not tuned:** {why}. All arms use the base config's rate, {found.suite.learning_rate:g}."
    picture = figures.sweep(directory / "sweep.png", found)
    rows = []
    for (name, steps), choice in found.choices.items():
        cells = [f"{choice.tried[rate]:.4f}" if rate in choice.tried else "not run" for rate in sweep.learning_rates]
        rows.append((name, f"{steps:,}", f"{choice.rate:g}", _tuning(choice), *cells))
    note = (
        f"Loss at each rate on the reserved seeds {', '.join(map(str, sweep.seeds))}, swept separately at each "
        f"horizon: the base config's {found.suite.learning_rate:g} first, then its neighbours, until the best rate has "
        "a worse one on both sides. An arm whose sweep is incomplete uses the best rate tried."
    )
    rates = [f"{rate:g}" for rate in sweep.learning_rates]
    text = f"{note}\n\n{markdown_table(('arm', 'steps', 'rate used', 'status', *rates), rows)}"
    return f"{text}\n\n![sweep]({picture})" if picture else text


def _tuning(choice: schedule.Choice) -> str:
    if not choice.tuned:
        return "**not tuned**"
    return "tuned, **at the edge of the rates**" if choice.at_edge else "tuned"


def costs_section(found: Table) -> str:
    """Parameters, model FLOPs, and FLOPs executed at the horizon for which the arm has the most seeds."""
    rows = []
    for name in found.variants:
        steps = found.fullest(name)
        cost = found.suite.costs(name, steps)
        before = sum(_executed(found, parent, steps) for parent in schedule.family(found.suite, name))
        rows.append((
            name,
            markdown_text(found.suite.variants[name].note),
            f"{cost['total_parameters'] / 1e6:.2f}M",
            f"{cost['active_parameters'] / 1e6:.2f}M",
            f"{steps:,}",
            f"{cost['flops']:.3g}",
            f"{_executed(found, name, steps):.3g}",
            f"{before:.3g}" if before else "–",
            f"{found.dropped(name, steps):.1%}",
        ))  # fmt: skip
    header = (
        "arm", "description", "parameters", "active parameters", "steps", "model FLOPs", "executed FLOPs",
        "parents' FLOPs", "dropped in training",
    )  # fmt: skip
    return (
        "Executed FLOPs leave out the experts' work on assignments dropped in training; both count the router. "
        "Parents' FLOPs: executed to train the arms that an arm starts from or is taught by. No wall-clock time is "
        f"compared: the runs were not timed in turns on an idle machine.\n\n{markdown_table(header, rows)}"
    )


def _executed(found: Table, name: str, steps: int) -> float:
    return executed_flops(found.suite.config(name, steps=steps), found.dropped(name, steps))


def domains_section(found: Table) -> str:
    """Loss per domain at the horizon for which the arm has the most seeds."""
    domains = _domains(found)
    rows = []
    for name in found.variants:
        steps = found.fullest(name)
        cells = []
        for domain in domains:
            curves = [found.curve(name, steps, s, "loss", domain) for s in found.seeds(steps, name)]
            cells.append(mean_sd([curve[-1][1] for curve in curves if curve]))
        rows.append((name, f"{steps:,}", *cells))
    return markdown_table(("arm", "steps", *domains), rows)


def _domains(found: Table) -> list[str]:
    return list(dict.fromkeys(d for record in found.used for d in record.row_domains))


def domain_effects_section(found: Table, comparison: Comparison) -> str:
    """Each arm's difference to the baseline per domain, unseen text included; empty without a pair of arms."""
    base = comparison.baseline
    domains = _domains(found)
    rows = []
    for arm in comparison.variants:
        if steps := found.longest(arm, base):
            cells = [_interval(effect_of(found, arm, base, steps, "loss", domain)) for domain in domains]
            rows.append((arm, f"{steps:,}", str(len(found.seeds(steps, arm, base))), *cells))
    header = ("arm", "steps", "n", *(f"{domain}, difference from {base} [95 %]" for domain in domains))
    return markdown_table(header, rows) if rows else ""


def routing_section(found: Table) -> str:
    """Routing statistics per MoE layer at the horizon with the most seeds; empty without sparse arms."""
    rows = []
    for name in found.variants:
        steps, layers = found.fullest(name), found.layers(name, "max_violation")
        if not layers:
            continue
        seeds = found.seeds(steps, name)
        moe = found.suite.config(name, steps=steps).model.moe
        largest = math.log(moe.num_experts + moe.null_experts)
        cells = []
        for quantity in ("max_violation", "router_entropy", "dead_experts"):
            curves = [[found.curve(name, steps, s, quantity, "", layer) for s in seeds] for layer in layers]
            means = [np.mean([c[-1][1] for c in of_layer if c] or [math.nan]) for of_layer in curves]
            if quantity == "router_entropy":
                means = [mean / largest for mean in means]
            cells.append(" / ".join(f"{mean:.2f}" for mean in means))
        dropped = " / ".join(f"{found.dropped(name, steps, layer):.1%}" for layer in layers)
        rows.append((name, f"{steps:,}", str(len(seeds)), *cells, dropped))
    header = ("arm", "steps", "n", "MaxVio", "router entropy / ln E", "dead experts", "dropped in training")
    note = (
        "Per MoE layer, separated by slashes; means over seeds, on held-out text. MaxVio: largest load over the mean, "
        "minus 1. Dropped assignments: mean over the whole of training."
    )
    return f"{note}\n\n{markdown_table(header, rows)}" if rows else ""


def probes_section(found: Table) -> str:
    """All probes that were measured; empty without any."""
    rows = []
    for name in found.variants:
        records = [record for record in found.used if record.variant == name and record.probes]
        names = sorted({quantity.partition("@")[0] for record in records for quantity in record.probes})
        for quantity in names:
            layers = found.layers(name, quantity) or [""]
            keys = [f"{quantity}@{layer}" if layer else quantity for layer in layers]
            cells = [mean_sd([r.probes[key] for r in records if key in r.probes]) for key in keys]
            rows.append((name, quantity, str(len(records)), " / ".join(cells)))
    return markdown_table(("arm", "quantity", "n", "mean ± sd over seeds, per MoE layer"), rows) if rows else ""
