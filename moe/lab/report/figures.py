"""Pictures of a suite's report: effects, effects by horizon, learning curves as differences, sweep and routing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from moe.lab import inference
from moe.lab.expressions import Term
from moe.lab.suite import Comparison
from moe.lab.table import MissingError, Table
from moe.system.atomic_files import write_figure
from moe.system.escaping import FIGURE_TEXT

ROUTING = (
    ("max_violation", "MaxVio, held-out"),
    ("router_entropy", "router entropy / ln E, held-out"),
    ("train_fraction_tokens_dropped", "dropped in training"),
)
_MARKERS = "osD^vP*X<>"


def colors(table: Table) -> dict[str, str]:
    """A color per arm, the same in all pictures of a suite."""
    cycle = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
    return {name: cycle[i % len(cycle)] for i, name in enumerate(table.suite.variants)}


def loss_effect(table: Table, variant: str, baseline: str, steps: int) -> inference.Effect:
    """Difference of the primary loss at the last step, paired by seed."""
    ours, base = (table.losses(name, steps) for name in (variant, baseline))
    return inference.effect([loss - base[seed] for seed, loss in ours.items() if seed in base])


def effect_of(
    table: Table, variant: str, baseline: str, steps: int, quantity: str, domain: str = ""
) -> inference.Effect:
    """Difference of a quantity at the last step, paired by seed; undefined where a run lacks it.

    ``domain``: domain of a loss; empty: the mean over the primary ones.
    """
    if domain:
        pairs = [
            [table.curve(name, steps, seed, quantity, domain) for name in (variant, baseline)]
            for seed in table.seeds(steps, variant, baseline)
        ]
        return inference.effect([ours[-1][1] - base[-1][1] for ours, base in pairs if ours and base])
    try:
        values = table.values(steps, [Term(1.0, quantity, variant), Term(-1.0, quantity, baseline)])
    except MissingError:
        values = {}
    return inference.effect([*values.values()])


@matplotlib.rc_context(FIGURE_TEXT)
def forest(
    path: Path, table: Table, comparison: Comparison, arms: Sequence[str], published: Mapping[str, float]
) -> str:
    """Effect and interval of every arm at every horizon; one or two seeds as open markers without an interval.

    ``published``: arm → the paper's effect in the same unit and sign, drawn beside the suite's longest horizon.
    """
    horizons = [s for s in table.horizons if any(table.seeds(s, arm, comparison.baseline) for arm in arms)]
    fig = Figure(figsize=(7.2, 1.2 + 0.3 * len(arms) * len(horizons)))
    axis = fig.subplots()
    color = colors(table)
    ticks = []
    labels = []
    y = 0.0
    note = ""
    for arm in arms:
        for steps in horizons:
            e = loss_effect(table, arm, comparison.baseline, steps)
            if not e.n:
                continue
            if math.isfinite(e.mean):
                # With two seeds the interval is 13 standard errors to each side, which would hide all others.
                error = [[e.mean - e.low], [e.high - e.mean]] if e.n > 2 else None
                axis.errorbar(
                    e.mean, y, xerr=error, fmt="o", color=color[arm], capsize=3,
                    markerfacecolor=color[arm] if e.n > 2 else "white",
                )  # fmt: skip
            ticks.append(y)
            labels.append(f"{arm}, {_tokens(steps * table.suite.tokens_per_step)} tokens (n = {e.n})")
            if arm in published and steps == table.suite.longest:
                axis.plot(published[arm], y, "kx")
                note = "\n× published effect, at the paper's size"
            y -= 1
        y -= 0.6
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(ticks, labels, fontsize=8)
    axis.set_ylim(y + 0.6, 1.0)
    axis.set(xlabel=f"held-out loss minus that of {comparison.baseline}, nats per token (left: better){note}")
    axis.grid(axis="x", alpha=0.3)
    return save(fig, path)


@matplotlib.rc_context(FIGURE_TEXT)
def losses(path: Path, table: Table, arms: Sequence[str]) -> str:
    """Held-out loss of every seed and the mean of each arm, at the longest horizon that the arms share.

    Points of one seed are joined by a thin line: arms of a seed see the same text in the same order.
    """
    steps = table.longest(*arms) or max(table.longest(arm) for arm in arms)
    fig = Figure(figsize=(7.2, 1.2 + 0.4 * len(arms)))
    axis = fig.subplots()
    color = colors(table)
    finite = {arm: {s: loss for s, loss in table.losses(arm, steps).items() if math.isfinite(loss)} for arm in arms}
    for seed in sorted(set().union(*finite.values())):
        points = [(finite[arm][seed], -y) for y, arm in enumerate(arms) if seed in finite[arm]]
        axis.plot(*zip(*points, strict=True), color="0.8", linewidth=0.8, zorder=1)
    for y, arm in enumerate(arms):
        values = [*finite[arm].values()]
        axis.scatter(values, [-y] * len(values), s=16, color=color[arm], alpha=0.6, zorder=2)
        if values:
            axis.plot(np.mean(values), -y, marker="|", markersize=16, color=color[arm], zorder=3)
    labels = [f"{arm} (n = {len(table.seeds(steps, arm))})" for arm in arms]
    axis.set_yticks([-y for y in range(len(arms))], labels, fontsize=8)
    axis.set_ylim(0.6 - len(arms), 0.6)
    axis.set(xlabel=f"held-out loss at {steps:,} steps, nats per token; one point per seed, | mean")
    axis.grid(axis="x", alpha=0.3)
    return save(fig, path)


@matplotlib.rc_context(FIGURE_TEXT)
def by_horizon(path: Path, table: Table, comparison: Comparison, arms: Sequence[str]) -> str:
    """Paired difference at the end of each horizon against its tokens, with intervals."""
    fig = Figure(figsize=(7.2, 4.4))
    axis = fig.subplots()
    color = colors(table)
    for index, arm in enumerate(arms):
        points = [(s, loss_effect(table, arm, comparison.baseline, s)) for s in table.horizons]
        points = [(steps, e) for steps, e in points if math.isfinite(e.mean)]
        if not points:
            continue
        # Arms are set apart a little so that intervals at one horizon do not cover each other.
        shift = 1.03 ** (index - (len(arms) - 1) / 2)
        xs = [steps * table.suite.tokens_per_step * shift for steps, _ in points]
        half = [(e.high - e.low) / 2 if e.n > 2 else 0.0 for _, e in points]
        axis.errorbar(
            xs, [e.mean for _, e in points], yerr=half, color=color[arm], marker=_MARKERS[index % len(_MARKERS)],
            capsize=3, label=f"{arm} (n = {'/'.join(str(e.n) for _, e in points)})",
        )  # fmt: skip
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xticks([steps * table.suite.tokens_per_step for steps in table.horizons])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tokens(x)))
    axis.set(
        xlabel="training tokens, each point a run with a full schedule of its own",
        ylabel=f"loss minus that of {comparison.baseline}, nats",
    )
    axis.grid(alpha=0.3)
    legend_beside(axis)
    return save(fig, path)


@matplotlib.rc_context(FIGURE_TEXT)
def curve_differences(path: Path, table: Table, comparison: Comparison, arms: Sequence[str]) -> str:
    """Held-out loss along the longest runs less that of the baseline, with the interval over seeds as a band."""
    fig = Figure(figsize=(7.2, 4.4))
    axis = fig.subplots()
    color, drawn = colors(table), False
    steps = max((table.longest(arm, comparison.baseline) for arm in arms), default=0)
    for arm in arms:
        differences = table.over_training(steps, f"loss[{arm}] - loss[{comparison.baseline}]")
        if len(differences) < 2:
            continue
        drawn = True
        effects = [inference.effect(values) for values in differences.values()]
        xs = [step * table.suite.tokens_per_step for step in differences]
        axis.plot(xs, [e.mean for e in effects], color=color[arm], marker=".", label=f"{arm} (n = {effects[0].n})")
        if effects[0].n > 2:  # with two seeds the interval covers everything else
            axis.fill_between(xs, [e.low for e in effects], [e.high for e in effects], color=color[arm], alpha=0.15)
    if not drawn:
        return ""
    axis.axhline(0, color="black", linewidth=0.8)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tokens(x)))
    axis.set(
        xlabel=f"training tokens of the runs of {steps:,} steps",
        ylabel=f"loss minus that of {comparison.baseline}, nats",
    )
    axis.grid(alpha=0.3)
    legend_beside(axis)
    return save(fig, path)


@matplotlib.rc_context(FIGURE_TEXT)
def sweep(path: Path, table: Table) -> str:
    """Loss against learning rate, a panel per horizon, the chosen rate marked."""
    own = {name for name, variant in table.suite.variants.items() if not variant.rate_from}
    tried = {(name, steps): c for (name, steps), c in table.choices.items() if c.tried and name in own}
    if not tried:
        return ""
    horizons = sorted({steps for _, steps in tried})
    fig = Figure(figsize=(5.2 * len(horizons), 4))
    axes = fig.subplots(1, len(horizons), squeeze=False)
    color = colors(table)
    for axis, steps in zip(axes[0], horizons, strict=True):
        of_horizon = {name: choice for (name, horizon), choice in tried.items() if horizon == steps}
        for name, choice in of_horizon.items():
            axis.plot(*zip(*sorted(choice.tried.items()), strict=True), color=color[name], marker="o", label=name)
            if choice.tuned:
                axis.plot(choice.rate, choice.tried[choice.rate], color=color[name], marker="*", markersize=14)
        axis.set_xscale("log")
        _rate_ticks(axis, sorted({rate for choice in of_horizon.values() for rate in choice.tried}))
        axis.set(xlabel="peak learning rate", ylabel="held-out loss, nats", title=f"{steps:,} steps")
        axis.grid(alpha=0.3)
    legend_beside(*axes[0])
    return save(fig, path)


@matplotlib.rc_context(FIGURE_TEXT)
def routing(path: Path, table: Table) -> str:
    """Routers over training, mean over layers and seeds, at the longest of the arms' horizons with the most seeds."""
    sparse = [name for name in table.variants if table.layers(name, "max_violation")]
    steps = max((table.fullest(name) for name in sparse), default=0)
    sparse = [name for name in sparse if table.seeds(steps, name)]
    if not sparse:
        return ""
    panels = [(label, _mean_curves(table, sparse, steps, quantity)) for quantity, label in ROUTING]
    # Dropless arms drop nothing: such a panel shows nothing.
    panels = [(label, curves) for label, curves in panels if any(np.any(ys) for _, ys in curves.values())]
    fig = Figure(figsize=(4.6 * len(panels), 3.8))
    axes = fig.subplots(1, len(panels), squeeze=False)
    color = colors(table)
    for axis, (label, curves) in zip(axes[0], panels, strict=True):
        for name, (xs, ys) in curves.items():
            axis.plot(xs, ys, color=color[name], label=name)
        axis.set(xlabel=f"step of {steps:,}", title=label)
        axis.grid(alpha=0.3)
    legend_beside(*axes[0])
    return save(fig, path)


_LABELS = {"token": "token", "lexical_matched": "lexical class", "domain_matched": "domain"}


def specialisation(path: Path, table: Table, variant: str) -> str:
    """Explained share of the first expert's entropy, by layer: for trained routers, untrained routers and a hash."""
    steps = table.longest(variant)
    layers = table.layers(variant, "specialisation/explained_token")
    fig = Figure(figsize=(6.4, 4.0))
    axis = fig.subplots()
    for color, (label, title) in enumerate(_LABELS.items()):
        for prefix, style, name in (("", "-", ""), ("untrained_", "--", ", untrained"), ("hash_", ":", ", hash")):
            quantity = f"specialisation/{prefix}explained_{label}"
            try:
                of_layers = [[*table.values(steps, [Term(1.0, quantity, variant, layers=n)]).values()] for n in layers]
            except MissingError:
                continue
            effects = [inference.effect(values) for values in of_layers]
            xs, means = [int(layer) for layer in layers], [e.mean for e in effects]
            if not prefix and effects[0].n > 2:
                half = [e.high - e.mean for e in effects]
                axis.errorbar(xs, means, yerr=half, color=f"C{color}", marker="o", capsize=3, label=title)
            else:
                axis.plot(xs, means, style, color=f"C{color}", marker="" if prefix else "o", label=title + name)
    if not axis.has_data():
        return ""
    axis.set_xticks([int(layer) for layer in layers])
    axis.set(xlabel=f"MoE layer of {variant}", ylabel="share of the first expert's entropy explained")
    axis.grid(alpha=0.3)
    legend_beside(axis)
    return save(fig, path)


@matplotlib.rc_context(FIGURE_TEXT)
def masked(path: Path, table: Table) -> str:
    """Cost of masking each token's most probable experts, by their share of all (DeepSeekMoE 2024, figure 4)."""
    fig = Figure(figsize=(6.4, 4.0))
    axis = fig.subplots()
    color, prefix = colors(table), "mask_top/loss_"
    for name in table.variants:
        probed = {probe for record in table.used if record.variant == name for probe in record.probes}
        shares = sorted(float(probe.removeprefix(prefix)) for probe in probed if probe.startswith(f"{prefix}0."))
        if not shares:
            continue
        steps = table.longest(name)
        effects = [
            inference.effect([*table.values(steps, f"{prefix}{share}[{name}] - {prefix}full[{name}]").values()])
            for share in shares
        ]
        half = [e.high - e.mean if e.n > 2 else 0.0 for e in effects]
        label = f"{name} (n = {effects[0].n})"
        axis.errorbar(
            shares, [e.mean for e in effects], yerr=half, color=color[name], marker="o", capsize=3, label=label
        )
    if not axis.has_data():
        return ""
    axis.set(xlabel="share of the experts that is masked", ylabel="held-out loss minus that without a mask, nats")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return save(fig, path)


def _mean_curves(
    table: Table, variants: Sequence[str], steps: int, quantity: str
) -> dict[str, tuple[list[int], np.ndarray]]:
    """Arm → (steps, mean over layers and seeds); the entropy as a share of its maximum."""
    found = {}
    for name in variants:
        moe = table.suite.config(name, steps=steps).model.moe
        unit = math.log(moe.num_experts + moe.null_experts) if quantity == "router_entropy" else 1.0
        curves = [
            table.curve(name, steps, seed, quantity, "", layer)
            for seed in table.seeds(steps, name)
            for layer in table.layers(name, quantity)
        ]
        if curves := [curve for curve in curves if curve]:
            found[name] = (
                [step for step, _ in curves[0]],
                np.mean([[v / unit for _, v in curve] for curve in curves], 0),
            )
    return found


def legend_beside(*panels: Axes) -> None:
    """A legend of what all panels show, to the right of the last one, where it covers no curve."""
    pairs = [zip(*panel.get_legend_handles_labels(), strict=True) for panel in panels]
    shown = {label: handle for pair in pairs for handle, label in pair}
    panels[-1].legend(list(shown.values()), list(shown), fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))


def _rate_ticks(axis: Axes, rates: Sequence[float]) -> None:
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.xaxis.set_minor_locator(NullLocator())


def _tokens(count: float) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count / 1e3:.0f}k" if count >= 1e3 else f"{count:.0f}"


def save(fig: Figure, path: Path) -> str:
    """Write a picture and return its name."""
    fig.set_layout_engine("tight")
    write_figure(path, fig, 110, metadata={"Software": None})
    return path.name
