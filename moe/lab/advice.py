"""Advice from published laws: a budget → width, experts, K, granularity, tokens and rate, each as a region."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moe.lab import law
from moe.lab import published_laws as laws
from moe.lab.inference import MOST_SEEDS, seeds_needed
from moe.system.escaping import markdown_table

#: Activation ratios K/E of the table.
ACTIVATIONS = (1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)
GRANULARITIES = (1, 2, 4, 8, 16)
#: Bytes of a parameter in training: float32 with a gradient and AdamW's two moments.
BYTES = 16


@dataclasses.dataclass(frozen=True)
class Budget:
    """Training FLOPs, with an interval.

    Attributes:
        low: smallest.
        middle: most likely.
        high: largest.
        why: how the budget follows from the flags.
    """

    low: float
    middle: float
    high: float
    why: str


@dataclasses.dataclass(frozen=True)
class Size:
    """A compute-optimal model by one law: the middle, and the region.

    Attributes:
        law: its paper.
        width: D (lowest, middle, highest), in multiples of 64.
        active: active parameters per token, without embeddings.
        tokens: training tokens (lowest, middle, highest).
        total: all parameters without embeddings; None where the law leaves the number of experts open.
        granularity: best, lowest and highest within the region; None where the law leaves it open.
        beyond: values outside the ranges that the law was fitted to; empty: none.
    """

    law: str
    width: tuple[int, int, int]
    active: float
    tokens: tuple[float, float, float]
    total: float | None
    granularity: tuple[int, int, int] | None
    beyond: str


def by_krajewski(budget: Budget, tolerance: float) -> Size:
    """Best width and granularity where the total FFN is 64 times the active one.

    The region has the widths whose loss is at most 1 + tolerance times the best one at the low, middle or high budget,
    and the granularities for which that holds at the middle budget and the best width.
    """
    regions = {compute: _grid(compute) for compute in (budget.low, budget.middle, budget.high)}
    losses = regions[budget.middle]
    grain, best = np.unravel_index(np.argmin(losses), losses.shape)
    inside = [np.flatnonzero((of <= of.min() * (1 + tolerance)).any(0)) for of in regions.values()]
    first, last = int(min(each[0] for each in inside)), int(max(each[-1] for each in inside))
    grains = [GRANULARITIES[i] for i in np.flatnonzero(losses[:, best] <= losses.min() * (1 + tolerance))]
    width, granularity = laws.WIDTHS[best], GRANULARITIES[int(grain)]
    total, active, flops = laws.krajewski_model(width, granularity)
    tokens = budget.middle / flops
    ends = sorted(
        compute / laws.krajewski_model(float(laws.WIDTHS[place]), granularity)[2]
        for compute, place in ((budget.low, last), (budget.high, first))
    )
    beyond = laws.KRAJEWSKI_RANGE.beyond(parameters=total, tokens=tokens, granularity=granularity)
    return Size(
        "Krajewski 2024", (laws.WIDTHS[first], width, laws.WIDTHS[last]), active, (ends[0], tokens, ends[1]), total,
        (granularity, min(grains), max(grains)), beyond,
    )  # fmt: skip


def _grid(compute: float) -> np.ndarray:
    """Loss of every granularity and width at this compute."""
    rows = []
    for grain in GRANULARITIES:
        models = [laws.krajewski_model(float(width), grain) for width in laws.WIDTHS]
        rows.append([laws.krajewski_loss(total, compute / flops, grain) for total, _, flops in models])
    return np.asarray(rows)


def by_ling(budget: Budget) -> Size:
    """Ling's compute-optimal split; the region follows from the budget's interval, since the paper states none."""
    splits = [laws.ling_allocation(compute) for compute in (budget.low, budget.middle, budget.high)]
    low, middle, high = (_width(flops) for flops, _ in splits)
    active = splits[1][0] / 6
    tokens = splits[0][1], splits[1][1], splits[2][1]
    beyond = laws.LING_RANGE.beyond(compute=budget.middle)
    return Size("Ling 2025", (low, middle, high), active, tokens, None, None, beyond)


def _width(flops: float) -> int:
    """D, in multiples of 64, of a model with D/64 layers and 72·D² FLOPs per layer and token."""
    return max(128, 64 * round((flops * 64 / 72) ** (1 / 3) / 64))


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """Gain and cost of an activation ratio.

    Attributes:
        activation: K/E.
        leverage: interval of Ling's efficiency leverage.
        gain: Clark's loss with E/K experts over that with one.
        total: parameters, without embeddings.
        memory: bytes needed in training as a share of the chips' memory; None without chips.
        beyond: values outside the ranges that the laws were fitted to.
    """

    activation: float
    leverage: tuple[float, float]
    gain: float
    total: float
    memory: float | None
    beyond: str


def sparsities(active: float, compute: float, granularity: float, memory: float | None) -> list[Sparsity]:
    """A row for each of :data:`ACTIVATIONS`; the FFN is two thirds of the active parameters."""
    rows = []
    for activation in ACTIVATIONS:
        total = active * (1 / 3 + 2 / 3 / activation)
        beyond = [
            laws.LING_RANGE.beyond(activation=activation, parameters=total, compute=compute),
            laws.CLARK_RANGE.beyond(parameters=active, experts=1 / activation),
        ]
        named = (f"{law}: {text}" for law, text in zip(("Ling", "Clark"), beyond, strict=True) if text)
        leverage = laws.ling_leverage(activation, granularity, compute)
        share = None if memory is None else BYTES * total / memory
        rows.append(
            Sparsity(activation, leverage, laws.clark_gain(active, 1 / activation), total, share, "; ".join(named))
        )
    return rows


@dataclasses.dataclass(frozen=True)
class Spread:
    """Measured standard deviation over seeds of the difference between two arms.

    Attributes:
        contrast: the arms.
        width: D of their models.
        steps: training steps of the runs.
        sd: nats per token.
        loss: mean loss of the first arm.
        hours: core-hours per seed, both arms together.
        seeds: number of seeds that it was measured on.
    """

    contrast: str
    width: int
    steps: int
    sd: float
    loss: float
    hours: float
    seeds: int


def spreads(
    losses: Mapping[tuple[str, int], Mapping[int, tuple[float, float]]], width: int, first: str
) -> list[Spread]:
    """Spreads of all arms against one.

    Args:
        losses: (arm, steps) → seed → (loss, hours).
        width: D.
        first: the arm that the others are compared with.
    """
    found = []
    for (arm, steps), of_arm in sorted(losses.items()):
        base = losses.get((first, steps), {})
        common = sorted(of_arm.keys() & base.keys())
        if arm == first or len(common) < 3:
            continue
        differences = [of_arm[seed][0] - base[seed][0] for seed in common]
        hours = float(np.mean([of_arm[seed][1] + base[seed][1] for seed in common]))
        loss = float(np.mean([base[seed][0] for seed in common]))
        sd = float(np.std(differences, ddof=1))
        found.append(Spread(f"{arm} − {first}", width, steps, sd, loss, hours, len(common)))
    return found


def lab_law(losses: Mapping[tuple[int, int], float], tokens: float) -> str:
    """Sentence on the lab's own law, and on how far the budget lies beyond its runs.

    Args:
        losses: (experts, tokens) → mean loss.
        tokens: tokens of the budget.
    """
    fitted = law.fit(losses)
    if fitted is None or set(fitted.names) != set(law.NAMES):
        return "The lab's records do not determine its law."
    d, a, b, c = fitted.coefficients
    most = max(count for _, count in losses)
    even = math.exp(-b / c) if c else math.inf
    helps = "above" if c < 0 else "below"
    counts = len({experts for experts, _ in losses})
    return (
        f"L = {fitted.floor:.2f} + exp({d:.2f} {a:+.3f} log D {b:+.3f} log E {c:+.4f} log D log E), from {len(losses)} "
        f"means of {counts} numbers of experts, with a residual of {fitted.sd:.3f} nats. By it more experts lower the "
        f"loss {helps} {even:.2g} tokens. Its runs end at {most:.2g}: {tokens:.2g} tokens are {tokens / most:.2g} "
        "times as many, so it says nothing about this budget beyond the direction."
    )


# --- The page ---------------------------------------------------------------------------------------------------------
def render(
    budget: Budget,
    *,
    tolerance: float,
    memory: float | None,
    measured: Sequence[Spread],
    gain: float,
    own: Mapping[tuple[int, int], float],
) -> str:
    """All tables, in Markdown.

    Args:
        budget: FLOPs.
        tolerance: relative rise of the loss that bounds a region.
        memory: bytes of all chips; None: not known.
        measured: spreads over seeds.
        gain: smallest gain that the seeds should detect, as a share of the loss.
        own: the lab's mean losses by (experts, tokens).
    """
    sizes = [by_ling(budget), by_krajewski(budget, tolerance)]
    ling, krajewski = sizes
    assert krajewski.granularity is not None
    # Ling counts 2·D over the hidden dim of an expert, Krajewski 4·D.
    grain = min(max(krajewski.granularity[0] / 2, 2), 12)
    middle = budget.middle
    lines = [
        f"Budget: {middle:.2g} FLOPs ({budget.low:.2g} to {budget.high:.2g}): {budget.why}", "",
        "## Width and tokens", "", _sizes(sizes, tolerance), "",
        "## Experts and K", "", _sparsities(sparsities(ling.active, middle, grain, memory), ling, grain), "",
        "## The lab's own law", "", lab_law(own, ling.tokens[1]), "",
        "## Rate and batch (Ling 2025, AdamW)", "",
        f"Learning rate {_span(laws.ling_rate, budget, '.2g')}; "
        f"tokens per step {_span(laws.ling_batch, budget, '.2g')}. "
        "The paper gives no interval; sweep from half to twice the rate at the size that you train."
        + (f" Extrapolates: {ling.beyond}." if ling.beyond else ""), "",
        f"## Seeds that detect a gain of {100 * gain:g} %", "", _seeds(measured, gain),
    ]  # fmt: skip
    return "\n".join(lines)


def _span(of: Callable[[float], float], budget: Budget, form: str) -> str:
    ends = sorted((of(budget.low), of(budget.high)))
    return f"{of(budget.middle):{form}} ({ends[0]:{form}} to {ends[1]:{form}})"


def _sizes(sizes: Sequence[Size], tolerance: float) -> str:
    rows = []
    for size in sizes:
        low, middle, high = size.width
        grain = "open" if size.granularity is None else "{} ({} to {})".format(*size.granularity)
        tokens = f"{size.tokens[1]:.2g} ({size.tokens[0]:.2g} to {size.tokens[2]:.2g})"
        width = f"{middle} ({low} to {high})"
        rows.append((size.law, width, f"{size.active:.2g}", tokens, grain, size.beyond or "no"))
    header = ("law", "width d (region)", "active parameters", "tokens (region)", "granularity, 4d/F", "extrapolates")
    note = (
        f"Krajewski's region: a loss within {100 * tolerance:g} % of the best, at either end of the budget, with 64 "
        "times the active FFN. The number of layers is d/64. Parameters are without embeddings."
    )
    return f"{markdown_table(header, rows)}\n\n{note}"


def _sparsities(rows: Sequence[Sparsity], size: Size, grain: float) -> str:
    table = []
    for row in rows:
        k = max(1, round(4 * grain / 3))  # 3 K F = 8 d, as many active parameters as the dense FFN
        experts = round(k / row.activation)
        fits = "–" if row.memory is None else f"{row.memory:.0%}" + ("" if row.memory < 0.8 else ": too much")
        leverage = f"{row.leverage[0]:.1f} to {row.leverage[1]:.1f}"
        gain = f"{100 * (row.gain - 1):+.1f} %"
        table.append((f"{experts} / {k}", f"{row.total:.2g}", fits, leverage, gain, row.beyond or "no"))
    header = (
        "E / K",
        "parameters",
        "share of the memory",
        "equivalent dense compute, times (Ling)",
        "loss change by E/K experts (Clark)",
        "extrapolates",
    )
    note = (
        f"At {size.active:.2g} active parameters and experts of F = 2d/{grain:g}; the memory is of float32 parameters, "
        "gradients and moments alone. Take the sparsest row that fits: by both laws the loss falls with E throughout "
        "their ranges. moe plan estimates its speed, and its memory with activations."
    )
    return f"{markdown_table(header, table)}\n\n{note}"


def _seeds(measured: Sequence[Spread], gain: float) -> str:
    if not measured:
        return "No records with three seeds of a pair of arms."
    rows = []
    for spread in measured:
        wanted = gain * spread.loss
        seeds = seeds_needed(spread.sd, wanted)
        counted = f"{seeds}" if seeds <= MOST_SEEDS else f"more than {MOST_SEEDS:,}"
        hours = f"{seeds * spread.hours:.1f}" if math.isfinite(spread.hours) else "–"
        names = spread.contrast, spread.width, f"{spread.steps:,}", f"{spread.sd:.4f} ({spread.seeds})"
        rows.append((*names, f"{wanted:.4f}", counted, hours))
    header = ("contrast", "d", "steps", "sd of a paired difference (seeds)", "gain, nats", "seeds", "core-hours")
    cheapest = min(measured, key=lambda spread: seeds_needed(spread.sd, gain * spread.loss) * spread.hours)
    note = (
        f"Paired t test, power 0.8 at 5 %. Cheapest here: width {cheapest.width}, {cheapest.steps:,} steps "
        f"({cheapest.contrast}). The spread is that of these runs; at other widths it extrapolates."
    )
    return f"{markdown_table(header, rows)}\n\n{note}"
