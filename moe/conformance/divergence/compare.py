"""Two traces beside bounds of their rounding: which choices differ, whether rounding suffices, what is wrong first."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from moe.config import ConfigError
from moe.conformance.divergence.bounds import Rounding, bound_each, bound_pairs
from moe.conformance.divergence.ranking import Ranking, highest
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


def compare(
    one: Trace, other: Trace, roundings: tuple[Rounding, Rounding], ranking: Ranking | None = None
) -> Divergence:
    """Compare what two runs chose for the same tokens, when the same experts were applied in both.

    Args:
        one: a trace with logits, under the second trace's experts or its own.
        other: under the same experts; may have its choices alone.
        roundings: of the first run and of the second.
        ranking: how tokens choose; default: the K highest.

    Raises:
        ConfigError: the traces have other shapes or tokens.
    """
    if one.router_logits is None or one.expert_index.shape != other.expert_index.shape:
        raise ConfigError(
            f"choices {other.expert_index.shape} beside {one.expert_index.shape}: need equal layers and K"
        )
    if one.tokens is not None and other.tokens is not None and (one.tokens != other.tokens).any():
        raise ConfigError("the two runs read other tokens")
    ranking = ranking or Ranking()
    real = one.chosen.any(-1) & other.chosen.any(-1)
    differ = _differing(one, other, real, roundings, ranking)
    wrong, size = _first_wrong(one, other, roundings, real)
    if not wrong:
        found = next((choice for choice in differ if choice.margin > choice.bound), None)
        if found is not None:
            wrong, size = f"the choice of layer {found.layer}", (found.margin, found.bound)
    k = one.expert_index.shape[-1]
    undecided = tuple(_undecided(one.ranked, k, real, rounding.ranked, ranking) for rounding in roundings)
    return Divergence(int(real.sum()), differ, wrong, size, (undecided[0], undecided[1]))


def _differing(
    one: Trace, other: Trace, real: np.ndarray, roundings: tuple[Rounding, Rounding], ranking: Ranking
) -> list[Choice]:
    """Every token whose sets of experts differ, with the pair of experts that is furthest apart; where other groups
    were kept, margin and bound are those of the pair of groups."""
    k = one.expert_index.shape[-1]
    first, second = one.ranked, other.scores if one.scores is not None else other.router_logits
    mine = ranking.choose(first, k)
    theirs = other.expert_index if second is None else ranking.choose(second, k)
    mean_squares = [np.mean(rounding.ranked**2, axis=(1, 2, 3)) for rounding in roundings]
    found = []
    for layer, token in np.argwhere((np.sort(mine, -1) != np.sort(theirs, -1)).any(-1) & real).tolist():
        row = np.asarray(first[layer, token], np.float64)
        again = None if second is None else np.asarray(second[layer, token], np.float64)
        errors = [rounding.ranked[layer, token] for rounding in roundings]
        experts = set(mine[layer, token].tolist()), set(theirs[layer, token].tolist())
        pair = lost, gained = _exchanged(row, *experts)
        groups, terms = _kept_groups(row, again, experts[1], ranking), 1
        if groups[0] != groups[1]:
            errors = [ranking.errors_of_sums(row, part) for part in errors]
            row, again = ranking.sums(row), None if again is None else ranking.sums(again)
            pair, terms = _exchanged(row, *groups), ranking.scores_per_group
        margin = row[pair[0]] - row[pair[1]] + (0.0 if again is None else again[pair[1]] - again[pair[0]])
        limits = [
            bound_pairs(part[pair[0]] - part[pair[1]], terms * mean_square[layer])
            for part, mean_square in zip(errors, mean_squares, strict=True)
        ]
        found.append(Choice(layer, token, lost, gained, float(margin), float(np.hypot(*limits))))
    return found


def _exchanged(row: np.ndarray, mine: set[int], theirs: set[int]) -> tuple[int, int]:
    """The best that only ``mine`` has, and the worst that only ``theirs`` has."""
    return max(mine - theirs, key=lambda i: row[i]), min(theirs - mine, key=lambda i: row[i])


def _kept_groups(
    row: np.ndarray, again: np.ndarray | None, experts: set[int], ranking: Ranking
) -> tuple[set[int], set[int]]:
    """The groups that a token kept in the two runs. Where only the second run's experts are known, those are kept in
    which they are, and the first run's best others."""
    kept = ranking.kept_groups(row).tolist()
    if again is not None:
        return set(kept), set(ranking.kept_groups(again).tolist())
    used = {expert // (len(row) // ranking.groups) for expert in experts}
    others = [group for group in kept if group not in used]
    return set(kept), used | set(others[: max(0, len(kept) - len(used))])


def _first_wrong(
    one: Trace, other: Trace, roundings: tuple[Rounding, Rounding], real: np.ndarray
) -> tuple[str, tuple[float, float]]:
    """The first of: parameters; each layer's router input, then its logits, then its scores."""
    if one.parameters is not None and other.parameters is not None and (one.parameters != other.parameters).any():
        return "the parameters", (0.0, 0.0)
    checks: list[tuple[str, np.ndarray, np.ndarray]] = []
    if one.router_input is not None and other.router_input is not None:
        moved = np.asarray(one.router_input, np.float64) - np.asarray(other.router_input, np.float64)
        bound = np.hypot(*(rounding.input_bound() for rounding in roundings))
        checks.append(("the router's input", np.linalg.norm(moved, axis=-1), bound))
    if one.router_logits is not None and other.router_logits is not None:
        bound = np.hypot(*(bound_each(rounding.logits) for rounding in roundings))
        checks.append(("the router's logits", *_largest(one.router_logits, other.router_logits, bound)))
    if one.scores is not None and other.scores is not None:
        bound = np.hypot(*(bound_each(rounding.ranked) for rounding in roundings))
        checks.append(("the scores", *_largest(one.scores, other.scores, bound)))
    for layer in range(len(one.expert_index)):
        for name, moved, bound in checks:
            ratio = np.where(real[layer] & (moved[layer] > 0), moved[layer] / np.maximum(bound[layer], 1e-300), 0.0)
            token = int(np.argmax(ratio))
            if not ratio[token] <= 1.0:
                return f"{name} of layer {layer}", (float(moved[layer, token]), float(bound[layer, token]))
    return "", (0.0, 0.0)


def _largest(one: np.ndarray, other: np.ndarray, bound: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[L,n] and [L,n]: each token's difference that is the largest beside its bound, of arrays [L,n,E], and that
    bound."""
    moved = np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64))
    expert = np.argmax(moved / np.maximum(bound, 1e-300), axis=-1)[..., None]
    return np.take_along_axis(moved, expert, -1)[..., 0], np.take_along_axis(bound, expert, -1)[..., 0]


def _undecided(scores: np.ndarray, k: int, real: np.ndarray, errors: np.ndarray, ranking: Ranking) -> float:
    """Share of tokens whose K-th and next scores, or last kept and next groups, are closer than rounding may move
    them."""
    scores = np.asarray(scores, np.float64)
    mean_square = np.mean(errors**2, axis=(1, 2, 3))[:, None]
    within = _is_close(ranking.limited(scores), k, errors, mean_square)
    if ranking.kept < ranking.groups:
        sums, moved = ranking.sums(scores), ranking.errors_of_sums(scores, errors)
        within |= _is_close(sums, ranking.kept, moved, ranking.scores_per_group * mean_square)
    return float(within[real].mean())


def _is_close(numbers: np.ndarray, k: int, errors: np.ndarray, mean_square: np.ndarray) -> np.ndarray:
    """[L,n]: whether the k-th highest of numbers [L,n,...] and the next are within the bound of their difference."""
    if k == numbers.shape[-1]:
        return np.zeros(numbers.shape[:-1], bool)
    order = highest(numbers, k + 1)[..., k - 1 :]
    values = np.take_along_axis(numbers, order, -1)
    pair = np.take_along_axis(errors, order[..., None], 2)
    return values[..., 0] - values[..., 1] <= bound_pairs(pair[:, :, 0] - pair[:, :, 1], mean_square)


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
