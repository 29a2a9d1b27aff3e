"""The page of the difference between two runs: Markdown, JSON and a figure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from moe.analysis.difference import Agreement, LossDifference
from moe.system.atomic_files import write_atomic, write_figure
from moe.system.escaping import FIGURE_TEXT, markdown_table, markdown_text

#: Number of tokens below which the figure leaves a group out.
_FEWEST = 200


@dataclasses.dataclass(frozen=True)
class Difference:
    """Findings of a comparison, as :func:`write` shows them.

    Attributes:
        names: of the two runs, with their steps.
        layers: numbers of the MoE layers.
        agreements: "" → agreement of the two runs in each layer; name → that of the first run with a control.
        losses: see :func:`moe.analysis.difference.loss_differences`.
        shuffles: exchanges of rows in each null.
        seed: of the exchanges.
    """

    names: tuple[str, str]
    layers: tuple[int, ...]
    agreements: Mapping[str, Sequence[Agreement]]
    losses: Mapping[str, Mapping[str, LossDifference]]
    shuffles: int
    seed: int


def markdown(found: Difference) -> str:
    """The page: what agrees, against which nulls, and where the losses differ."""
    one, other = map(markdown_text, found.names)
    own = found.agreements[""]
    total = found.losses["all"].get("all tokens")
    lines = [f"# {one} and {other}", ""]
    lines += [f"- {sentence}" for sentence in _conclusions(own, total, other)]
    lines += [
        "",
        "![agreement by layer, and differences of the loss](difference.png)",
        "",
        "## Agreement",
        "",
        "Experts are matched by the permutation under which most tokens of even rows have the same first expert; all "
        "shares are of odd rows. *Chance*: independent choices with the same loads. *Null*: whole rows of the other "
        f"run's choices exchanged, {found.shuffles} times (seed {found.seed}), with the one-sided p. *Margin*: the "
        "router's probability of its first expert minus that of its second, in quarters.",
        "",
        markdown_table(
            ("layer", "same first expert, %", "chance", "null", "p", "experts in common, %", "loads differ by, %",
             "same, by margin (smallest first), %"),
            [_agreement_row(layer, agreement) for layer, agreement in zip(found.layers, own, strict=True)],
        ),
    ]  # fmt: skip
    controls = {name: values for name, values in found.agreements.items() if name}
    if controls:
        rows = [
            (layer, _percent(own[i].first), *(_percent(of_layers[i].first) for of_layers in controls.values()))
            for i, layer in enumerate(found.layers)
        ]
        lines += ["", f"The first expert of {one} beside that of others, %, each matched in the same way:", ""]
        lines.append(markdown_table(("layer", other, *map(markdown_text, controls)), rows))
    lines += ["", f"## Loss of {other} minus that of {one}, nats per token", ""]
    lines.append("With 95 % intervals over rows of text; negative: the second run predicts better.")
    for grouping, values in found.losses.items():
        rows = [
            (markdown_text(name), f"{value.mean:+.4f}", f"{value.low:+.4f} to {value.high:+.4f}", f"{value.tokens:,}")
            for name, value in values.items()
        ]
        lines += ["", markdown_table((grouping, "difference", "interval", "tokens"), rows)] if rows else []
    return "\n".join(lines) + "\n"


def _conclusions(own: Sequence[Agreement], total: LossDifference | None, other: str) -> list[str]:
    first, chance = np.mean([each.first for each in own]), np.mean([each.chance for each in own])
    above = sum(each.p_value <= 0.05 for each in own)
    found = [
        f"{_percent(first)} % of tokens have the same first expert in both, over all layers; {_percent(chance)} % by "
        f"chance. It is above the null (p ≤ 0.05) in {above} of {len(own)} layers."
    ]
    if total is not None:
        sure = "which excludes 0" if total.low > 0 or total.high < 0 else "which includes 0"
        found.append(
            f"The loss of {other} differs by {total.mean:+.4f} nats per token, from {total.low:+.4f} to "
            f"{total.high:+.4f}, {sure}."
        )
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _agreement_row(layer: int, found: Agreement) -> tuple[Any, ...]:
    null = f"{_percent(found.null)} ± {_percent(found.null_std)}"
    margins = " ".join(map(_percent, found.by_margin))
    sets, loads = _percent(found.sets), _percent(found.load_distance)
    return layer, _percent(found.first), _percent(found.chance), null, f"{found.p_value:.3f}", sets, loads, margins


def figure(found: Difference) -> Figure:
    """Agreement by layer beside its nulls, and the differences of the loss with their intervals."""
    groups = [
        (f"{grouping}: {name}", value)
        for grouping, values in found.losses.items()
        for name, value in values.items()
        if value.tokens >= _FEWEST
    ]
    drawn = Figure(figsize=(11, max(5.5, 0.2 * len(groups) + 1)), layout="constrained")
    left, right = drawn.subplots(1, 2)
    own = found.agreements[""]
    for name, of_layers in found.agreements.items():
        shares, style = [100 * each.first for each in of_layers], "--" if name else "-"
        left.plot(found.layers, shares, style, marker="o", label=name or found.names[1])
    nulls, spreads = np.array([100 * each.null for each in own]), np.array([200 * each.null_std for each in own])
    label = "null, ± 2 deviations"
    left.errorbar(found.layers, nulls, yerr=spreads, color="0.5", linestyle=":", capsize=2, label=label)
    left.set(xlabel="layer", ylabel="same first expert, %", ylim=(0, None), xticks=found.layers)
    drawn.legend(*left.get_legend_handles_labels(), loc="outside lower left", fontsize=8)
    drawn.suptitle(f"{found.names[0]} beside others", fontsize=10)
    places = np.arange(len(groups))[::-1]
    means = np.array([value.mean for _, value in groups])
    ends = np.array([(value.mean - value.low, value.high - value.mean) for _, value in groups]).reshape(-1, 2)
    right.errorbar(means, places, xerr=ends.T, fmt="o", markersize=3, linewidth=1)
    right.axvline(0, color="0.5", linewidth=1)
    right.set_yticks(places, [name for name, _ in groups], fontsize=7)
    right.set(xlabel="loss of the second run minus the first's, nats per token")
    return drawn


def write(found: Difference, folder: epath.Path) -> list[str]:
    """Write difference.md, difference.json and difference.png; return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "difference.json", json.dumps(dataclasses.asdict(found), indent=1, allow_nan=False) + "\n")
    with matplotlib.rc_context(FIGURE_TEXT):
        write_figure(folder / "difference.png", figure(found), 110)
    write_atomic(folder / "difference.md", markdown(found))
    return ["difference.md", "difference.json", "difference.png"]


def settling(layers: Sequence[int], shares: Mapping[int, Sequence[float]], last: int) -> str:
    """A table of when a run's routing settled: step → share of tokens with the first expert of the last step."""
    rows = [(step, *map(_percent, of_layers)) for step, of_layers in shares.items()]
    return (
        f"Tokens whose first expert is that of step {last} already, %:\n\n"
        + markdown_table(("step", *(f"layer {layer}" for layer in layers)), rows)
    )  # fmt: skip
