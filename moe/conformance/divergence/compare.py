"""Two traces beside bounds of their rounding: which choices differ, whether rounding suffices, what is wrong first."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from moe.config import ConfigError
from moe.conformance.divergence.bounds import Rounding
from moe.conformance.divergence.trace import Trace


@dataclasses.dataclass(frozen=True)
class Choice:
    """A choice that differs.

    Attributes:
        layer: MoE layer, from 0.
        token: number of the real token in the text.
        one, other: expert that only one of the two chose.
        margin: by how much the logit of ``one`` exceeds that of ``other`` in the first run; plus the reverse in the
            second run, where its logits are known.
        bound: of what rounding changes in it.
    """

    layer: int
    token: int
    one: int
    other: int
    margin: float
    bound: float

    def __str__(self) -> str:
        relation = "below" if self.margin <= self.bound else "above"
        verdict = "rounding" if self.margin <= self.bound else "not rounding"
        change = f"layer {self.layer}, token {self.token}: {self.one} → {self.other}"
        return f"{change}, margin {self.margin:.2g} {relation} the bound {self.bound:.2g}: {verdict}"


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Result of :func:`compare`.

    Attributes:
        choices: number of choices compared, L·n.
        differ: those that differ, the first layer first.
        wrong: first quantity that rounding does not explain, such as "the router's input of layer 7"; empty: none.
        size: its difference, and the bound that it exceeds.
        undecided: share of choices that the first run's rounding, and the second's, could change.
    """

    choices: int
    differ: list[Choice]
    wrong: str
    size: tuple[float, float]
    undecided: tuple[float, float]

    @property
    def is_rounding(self) -> bool:
        """Whether rounding suffices for all that differs."""
        return not self.wrong and all(choice.margin <= choice.bound for choice in self.differ)


def compare(one: Trace, other: Trace, roundings: tuple[Rounding, Rounding]) -> Divergence:
    """Compare what two runs chose for the same tokens, when the same experts were applied in both.

    Args:
        one: a trace with logits, under the second trace's experts or its own.
        other: under the same experts; may have its choices alone.
        roundings: of the first run and of the second.

    Raises:
        ConfigError: the traces have other shapes or tokens.
    """
    if one.router_logits is None or one.expert_index.shape != other.expert_index.shape:
        raise ConfigError(
            f"choices {other.expert_index.shape} beside {one.expert_index.shape}: need equal layers and K"
        )
    if one.tokens is not None and other.tokens is not None and (one.tokens != other.tokens).any():
        raise ConfigError("the two runs read other tokens")
    k = one.expert_index.shape[-1]
    mine = own_choice(one.router_logits, k)
    theirs = other.expert_index if other.router_logits is None else own_choice(other.router_logits, k)
    real = one.chosen.any(-1) & other.chosen.any(-1)
    differ = _differing(mine, theirs, real, one, other, roundings)
    wrong, size = _first_wrong(one, other, roundings, real)
    if not wrong:
        found = next((choice for choice in differ if choice.margin > choice.bound), None)
        if found is not None:
            wrong, size = f"the choice of layer {found.layer}", (found.margin, found.bound)
    undecided = tuple(_undecided(one.router_logits, k, real, rounding) for rounding in roundings)
    return Divergence(int(real.sum()), differ, wrong, size, (undecided[0], undecided[1]))


def own_choice(logits: np.ndarray, k: int) -> np.ndarray:
    """[L,n,K]: the K highest logits, the lower expert first among equals."""
    return np.argsort(-np.asarray(logits, np.float64), axis=-1, kind="stable")[..., :k]


def _differing(
    mine: np.ndarray,
    theirs: np.ndarray,
    real: np.ndarray,
    one: Trace,
    other: Trace,
    roundings: tuple[Rounding, Rounding],
) -> list[Choice]:
    """Every token whose sets of experts differ, with the pair that is furthest apart."""
    places = np.argwhere((np.sort(mine, -1) != np.sort(theirs, -1)).any(-1) & real)
    logits = np.asarray(one.router_logits, np.float64)
    first, second = np.zeros(mine.shape[:2], int), np.zeros(mine.shape[:2], int)
    margins = np.zeros(mine.shape[:2])
    for layer, token in places:
        row, lost = logits[layer, token], set(mine[layer, token]) - set(theirs[layer, token])
        gained = set(theirs[layer, token]) - set(mine[layer, token])
        first[layer, token] = max(lost, key=lambda e: row[e])
        second[layer, token] = min(gained, key=lambda e: row[e])
        pair = first[layer, token], second[layer, token]
        margins[layer, token] = row[pair[0]] - row[pair[1]]
        if other.router_logits is not None:
            again = np.asarray(other.router_logits[layer, token], np.float64)
            margins[layer, token] += again[pair[1]] - again[pair[0]]
    bound = np.hypot(*(rounding.pair_bound(first, second) for rounding in roundings))
    return [
        Choice(i, token, int(first[i, token]), int(second[i, token]), float(margins[i, token]), float(bound[i, token]))
        for i, token in places.tolist()
    ]


def _first_wrong(
    one: Trace, other: Trace, roundings: tuple[Rounding, Rounding], real: np.ndarray
) -> tuple[str, tuple[float, float]]:
    """The first of: parameters; each layer's router input, then its logits."""
    if one.parameters is not None and other.parameters is not None and (one.parameters != other.parameters).any():
        return "the parameters", (0.0, 0.0)
    checks: list[tuple[str, np.ndarray, np.ndarray]] = []
    if one.router_input is not None and other.router_input is not None:
        moved = np.asarray(one.router_input, np.float64) - np.asarray(other.router_input, np.float64)
        bound = np.hypot(*(rounding.input_bound() for rounding in roundings))
        checks.append(("the router's input", np.linalg.norm(moved, axis=-1), bound))
    if other.router_logits is not None:
        moved = np.abs(np.asarray(one.router_logits, np.float64) - np.asarray(other.router_logits, np.float64))
        bound = np.hypot(*(rounding.logit_bound() for rounding in roundings))
        expert = np.argmax(moved / np.maximum(bound, 1e-300), axis=-1)[..., None]
        largest, limit = (np.take_along_axis(array, expert, -1)[..., 0] for array in (moved, bound))
        checks.append(("the router's logits", largest, limit))
    for layer in range(len(one.expert_index)):
        for name, moved, bound in checks:
            ratio = np.where(real[layer] & (moved[layer] > 0), moved[layer] / np.maximum(bound[layer], 1e-300), 0.0)
            token = int(np.argmax(ratio))
            if not ratio[token] <= 1.0:
                return f"{name} of layer {layer}", (float(moved[layer, token]), float(bound[layer, token]))
    return "", (0.0, 0.0)


def _undecided(logits: np.ndarray, k: int, real: np.ndarray, rounding: Rounding) -> float:
    """Share of tokens whose K-th and next logits are closer than rounding may move them."""
    logits = np.asarray(logits, np.float64)
    if k == logits.shape[-1]:
        return 0.0
    order = np.argsort(-logits, axis=-1, kind="stable")
    last, following = order[..., k - 1], order[..., k]
    margin = np.take_along_axis(logits, last[..., None], -1) - np.take_along_axis(logits, following[..., None], -1)
    within = margin[..., 0] <= rounding.pair_bound(last, following)
    return float(within[real].mean())


def summary(names: tuple[str, str], found: Divergence, dtypes: tuple[str, str]) -> dict[str, Any]:
    """Plain values, as JSON."""
    return {
        "one": names[0],
        "other": names[1],
        "rounding": found.is_rounding,
        "first_wrong": found.wrong,
        "difference": found.size[0],
        "bound": found.size[1],
        "choices": found.choices,
        "differ": len(found.differ),
        "undecided": dict(zip((f"one ({dtypes[0]})", f"other ({dtypes[1]})"), found.undecided, strict=True)),
        "differing": [dataclasses.asdict(choice) for choice in found.differ[:1000]],
    }


def page(names: tuple[str, str], found: Divergence, dtypes: tuple[str, str]) -> str:
    """Markdown."""
    total = found.choices
    lines = [f"# {names[0]} beside {names[1]}", ""]
    if found.differ:
        lines += [f"First: {found.differ[0]}.", "", f"{len(found.differ)} of {total:,} choices differ."]
    else:
        lines.append(f"None of {total:,} choices differs.")
    if found.is_rounding:
        lines += ["", "Rounding suffices for all differences."]
    else:
        sizes = f": {found.size[0]:.3g} above the bound {found.size[1]:.3g}" if found.size[1] else ""
        lines += ["", f"Not rounding; first wrong quantity: {found.wrong}{sizes}."]
    shares = [f"{100 * share:.3g} % in {name}" for share, name in zip(found.undecided, dtypes, strict=True)]
    lines += ["", f"Choices that rounding can change: {', '.join(dict.fromkeys(shares))}."]
    if found.differ:
        lines += ["", "| layer | token | one | other | margin | bound | |", "|---|---|---|---|---|---|---|"]
        for choice in found.differ[:50]:
            verdict = "rounding" if choice.margin <= choice.bound else "not rounding"
            numbers = f"{choice.margin:.3g} | {choice.bound:.3g} | {verdict}"
            lines.append(f"| {choice.layer} | {choice.token} | {choice.one} | {choice.other} | {numbers} |")
    return "\n".join(lines) + "\n"
