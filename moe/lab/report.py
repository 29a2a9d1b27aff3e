"""A suite's report: tables with intervals, curves with bands, and the claims it decides.

In: a :class:`moe.lab.suite.Suite` and its :class:`moe.lab.results.Results`, nothing else. Out: Markdown, and PNGs
beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files, never a window
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from moe.lab import statistics
from moe.lab.claims import CLAIMS, MARGIN, Claim, Finding, chance_of_drop
from moe.lab.results import PRIMARY, RESULTS, TIMES, Results
from moe.lab.statistics import effect
from moe.lab.suite import Comparison, Suite
from moe.routing.resolve import from_config_dict

ROUTING = (
    ("max_violation", "MaxVio"),
    ("router_entropy", "router entropy, nats"),
    ("dead_experts", "dead experts"),
    ("fraction_tokens_dropped", "dropped share"),
)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def write(directory: Path, suite: Suite, results: Results, command: str) -> None:
    """report.md and its pictures.

    Args:
        directory: where results.csv is.
        suite: with the comparisons.
        results: of whatever runs are done.
        command: that made them.
    """
    missing = [name for name in suite.variants if name not in results.variants]
    devices = sorted({row["devices"] for row in results.times.values()})
    base = from_config_dict(suite.base)
    tokens = base.train.batch_size * base.data.sequence_length
    parts = [
        f"# {suite.name}\n\n{suite.question}",
        f"Command: `{command}`. Hardware: {', '.join(devices) or 'not recorded'}. Seeds: "
        f"{', '.join(map(str, results.seeds))}. {base.train.num_steps:,} steps of {tokens:,} tokens, "
        f"{base.model.num_layers} layers of {base.model.d_model}; domains: {', '.join(results.domains())}.",
        "Losses are nats per token of held-out text at the last step, and unless a domain is named the mean over "
        f"{', '.join(suite.primary)}. Differences are paired by seed (same text in the "
        "same order), with a 95 % interval and a two-sided p by Student's t; they are not corrected for their number. "
        f"This page is made from `{RESULTS}` and `{TIMES}` alone.",
    ]
    if missing:
        parts.append(f"**Not run yet:** {', '.join(missing)}.")
    parts += ["## Arms", _arms(suite, results)]
    for name, comparison in suite.comparisons.items():
        arms = [arm for arm in (comparison.baseline, *comparison.variants) if arm in results.variants]
        if comparison.baseline in arms and len(arms) > 1:
            parts += [f"## {name[0].upper()}{name[1:]}", _comparison(results, comparison, arms)]
    parts += ["## Held-out loss per domain", _domains(results)]
    if routed := _routing(suite, results):
        parts += ["## Routing at the last step", routed]
    if probed := _probes(results):
        parts += ["## Probes of the trained models", probed]
    parts += ["## Claims", claims_table({suite.name: results}, [c for c in CLAIMS if c.suite == suite.name])]
    pictures = [
        _curves(directory / "loss.png", suite, results),
        _routing_curves(directory / "routing.png", results),
    ]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures if name]
    (directory / "report.md").write_text("\n\n".join(parts) + "\n")


def claims_page(directory: Path, found: dict[str, Results]) -> None:
    """claims.md: all twenty claims over the suites that have been run."""
    tested = [claim.test(found.get(claim.suite)) for claim in CLAIMS]
    counts = {verdict: sum(f.verdict == verdict for f in tested) for verdict in sorted({f.verdict for f in tested})}
    text = [
        "# Twenty claims",
        "Each rule was fixed in `moe/lab/claims.py` before the runs: an inequality holds if the whole 95 % interval of "
        f'the paired differences is on its side; "no worse" and "alike" allow {MARGIN} nats. '
        + "; ".join(f"{verdict}: {count}" for verdict, count in counts.items())
        + ". The models are tiny (see each suite's report) and say nothing of large ones.",
        claims_table(found, CLAIMS),
    ]
    (directory / "claims.md").write_text("\n\n".join(text) + "\n")


def claims_table(found: dict[str, Results], claims: Sequence[Claim]) -> str:
    """A row per claim: rule, our effects, the paper's figure, verdict."""

    def shown(finding: Finding) -> str:
        lines = [f"{part.what}: {part.effect}" for part in finding.parts]
        return "<br>".join(lines + ([finding.note] if finding.note else []))

    rows = []
    for claim in claims:
        finding = claim.test(found.get(claim.suite))
        rows.append(
            (
                str(claim.number),
                claim.text,
                claim.rule,
                shown(finding),
                claim.paper,
                f"**{finding.verdict}**",
                claim.suite,
            )
        )
    return table(("", "claim", "rule", "ours: effect [95 % interval]", "published", "verdict", "suite"), rows)


# --- Tables ----------------------------------------------------------------------------------------------------------
def _mean_sd(values: Sequence[float], digits: int = 4) -> str:
    kept = [value for value in values if math.isfinite(value)]
    if not kept:
        return "–"
    spread = f" ± {np.std(kept, ddof=1):.{digits}f}" if len(kept) > 1 else ""
    return f"{np.mean(kept):.{digits}f}{spread}"


def _arms(suite: Suite, results: Results) -> str:
    rows = []
    for name in results.variants:
        cost = {quantity: results.last(name, results.seeds[0], quantity) for quantity in suite.costs(name)}
        rate = [float(row["tokens_per_second"]) for (variant, _), row in results.times.items() if variant == name]
        rows.append(
            (
                name,
                suite.variants[name].note if name in suite.variants else "",
                f"{cost['total_parameters'] / 1e6:.2f} M",
                f"{cost['active_parameters'] / 1e6:.2f} M",
                f"{cost['flops']:.3g}",
                _mean_sd([results.last(name, seed, "loss", PRIMARY) for seed in results.seeds]),
                f"{np.median(rate):,.0f}" if rate else "–",
            )
        )
    header = ("arm", "", "parameters", "active", "training FLOPs", "loss, mean ± sd", "tokens/s (noisy)")
    return table(header, rows)


def _comparison(results: Results, comparison: Comparison, arms: Sequence[str]) -> str:
    timed = "wall_time" in comparison.equal
    if timed:
        losses, note = _at_equal_time(results, arms)
    else:
        losses = {arm: [results.last(arm, seed, "loss", PRIMARY) for seed in results.seeds] for arm in arms}
        note = f"Equal within {comparison.tolerance:.0%}: {', '.join(comparison.equal)}."
    base = np.asarray(losses[comparison.baseline])
    rows = []
    for arm in arms:
        row = [arm, _mean_sd(losses[arm])]
        row.append("baseline" if arm == comparison.baseline else str(effect(np.asarray(losses[arm]) - base)))
        if not timed:
            row += [_speed_up(results, comparison.baseline, arm)]
        rows.append(row)
    header = ["arm", "loss", f"difference to {comparison.baseline} [95 % interval]"]
    if not timed:
        header.append("speed-up in steps")
        note += (
            " Speed-up: the baseline's steps over the steps after which the arm has the baseline's last loss (Switch, "
        )
        note += "figure 5: 7.5 with 64 experts)."
    return note + "\n\n" + table(header, rows)


def _at_equal_time(results: Results, arms: Sequence[str]) -> tuple[dict[str, list[float]], str]:
    """Losses at the longest time by the clock that every run has reached."""
    timed = {
        (arm, seed): [
            (step * results.seconds_per_step(arm, seed), loss)
            for step, loss in results.curve(arm, seed, "loss", PRIMARY)
        ]
        for arm in arms
        for seed in results.seeds
    }
    ends = [curve[-1][0] for curve in timed.values() if curve]
    common = min(ends)
    losses = {
        arm: [statistics.at(timed[arm, seed], common) if timed[arm, seed] else math.nan for seed in results.seeds]
        for arm in arms
    }
    return losses, (
        f"Each run read at {common:.1f} s of training by its clock (the shortest run's end; the longest: "
        f"{max(ends):.1f} s), linear between evaluations. The machine was shared, so its clock is noisy."
    )


def _speed_up(results: Results, baseline: str, arm: str) -> str:
    ratios = []
    for seed in results.seeds:
        target, curve = results.curve(baseline, seed, "loss", PRIMARY), results.curve(arm, seed, "loss", PRIMARY)
        if target and curve:
            ratios.append(target[-1][0] / statistics.steps_to_reach(curve, target[-1][1]))
    return "–" if not ratios else "not reached" if min(ratios) == 0 else f"{_mean_sd(ratios, 2)}"


def _domains(results: Results) -> str:
    rows = []
    for name in results.variants:
        losses = [[results.last(name, seed, "loss", domain) for seed in results.seeds] for domain in results.domains()]
        rows.append((name, *map(_mean_sd, losses)))
    return table(("arm", *results.domains()), rows)


def _routing(suite: Suite, results: Results) -> str:
    rows = []
    for name in results.variants:
        layers = results.layers(name, "max_violation")
        if not layers or name not in suite.variants:
            continue
        config = suite.config(name)
        moe, tokens = config.model.moe, config.model.moe.group_size or config.data.sequence_length
        chance = chance_of_drop(tokens, moe.num_experts, moe.capacity_factor, moe.experts_per_token)
        trained = effect([results.over_layers(name, seed, "train_fraction_tokens_dropped") for seed in results.seeds])
        cells = []
        for quantity, _ in ROUTING[:3]:
            means = [np.mean([results.last(name, seed, quantity, layer=i) for seed in results.seeds]) for i in layers]
            cells.append(" / ".join(f"{mean:.2f}" for mean in means))
        rows.append((name, *cells, f"{trained.mean:.2%}", "–" if moe.dispatch == "dropless" else f"{chance:.2%}"))
    header = ("arm", *(f"{label}, per layer" for _, label in ROUTING[:3]), "dropped in training", "by chance")
    note = "Means over seeds. By chance: were every choice uniform and independent, at the training capacity factor."
    return f"{note}\n\n{table(header, rows)}" if rows else ""


def _probes(results: Results) -> str:
    rows = []
    for name in results.variants:
        for quantity in results.quantities(name):
            if "/" not in quantity:
                continue
            layers = results.layers(name, quantity) or [""]
            means = [[results.last(name, seed, quantity, layer=layer) for seed in results.seeds] for layer in layers]
            rows.append((name, quantity, " / ".join(_mean_sd(values) for values in means)))
    return table(("arm", "quantity", "mean ± sd over seeds (per MoE layer)"), rows) if rows else ""


# --- Pictures --------------------------------------------------------------------------------------------------------
def _band(axis: Axes, xs: Any, curves: np.ndarray, label: str, color: str) -> None:
    """Mean over seeds, and from the lowest to the highest."""
    axis.plot(xs, curves.mean(0), label=label, color=color, linewidth=1.6)
    axis.fill_between(xs, curves.min(0), curves.max(0), color=color, alpha=0.2, linewidth=0)


def _colors(results: Results) -> dict[str, str]:
    cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    return {name: cycle[i % len(cycle)] for i, name in enumerate(results.variants)}


def _curves(path: Path, suite: Suite, results: Results) -> str:
    """Held-out loss over steps, FLOPs and wall time."""
    scales: list[tuple[str, Callable[[str], float]]] = [
        ("step", lambda name: 1.0),
        ("training FLOPs", lambda name: suite.costs(name)["flops"] / suite.costs(name)["steps"]),
    ]
    if results.times:
        scales.append(
            (
                "seconds of training (mean over seeds, shared machine)",
                lambda name: float(np.nanmean([results.seconds_per_step(name, seed) for seed in results.seeds])),
            )
        )
    fig, axes = plt.subplots(1, len(scales), figsize=(5.2 * len(scales), 4.2), squeeze=False, sharey=True)
    colors = _colors(results)
    for axis, (label, scale) in zip(axes[0], scales, strict=True):
        for name in results.variants:
            curves = [curve for seed in results.seeds if (curve := results.curve(name, seed, "loss", PRIMARY))]
            if not curves or name not in suite.variants:
                continue
            steps = np.asarray([step for step, _ in curves[0]])
            _band(axis, steps * scale(name), np.asarray([[loss for _, loss in c] for c in curves]), name, colors[name])
        axis.set(xlabel=label, yscale="log")
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        ticks = np.arange(1, 11, 0.5)
        axis.set_yticks([tick for tick in ticks if axis.get_ylim()[0] <= tick <= axis.get_ylim()[1]])
        axis.grid(alpha=0.3)
    axes[0, 0].set(ylabel="held-out loss, nats per token", title=suite.name)
    axes[0, -1].legend(fontsize=8)
    return _save(fig, path)


def _routing_curves(path: Path, results: Results) -> str:
    """Mean over layers of what the routers do, over training."""
    sparse = [name for name in results.variants if results.layers(name, "max_violation")]
    if not sparse:
        return ""
    colors = _colors(results)
    fig, axes = plt.subplots(1, len(ROUTING), figsize=(4.4 * len(ROUTING), 3.8))
    for axis, (quantity, label) in zip(axes, ROUTING, strict=True):
        for name in sparse:
            layers = results.layers(name, quantity)
            per_seed = [
                [results.curve(name, seed, quantity, layer=layer) for layer in layers]
                for seed in results.seeds
                if results.curve(name, seed, quantity, layer=layers[0])
            ]
            # [seeds,layers,points] → [seeds,points]
            values = np.asarray([[[v for _, v in c] for c in curves] for curves in per_seed]).mean(1)
            _band(axis, [step for step, _ in per_seed[0][0]], values, name, colors[name])
        axis.set(xlabel="step", title=f"{label}, mean over layers")
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=8)
    return _save(fig, path)


def _save(fig: Figure, path: Path) -> str:
    fig.tight_layout()
    fig.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(fig)
    return path.name
