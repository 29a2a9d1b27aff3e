"""The difference between the routing, and the losses, of two models on the same tokens.

Experts have no order, so those of one model are first matched with those of the other by the permutation under which
most tokens have the same first expert (Hungarian method). It is found on even rows of the text; odd rows are measured.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy import optimize, stats

from moe.analysis import lexical, measures
from moe.analysis.record import Records
from moe.config import ConfigError
from moe.training.batches import Batch, forward, place
from moe.training.losses import token_cross_entropy
from moe.training.step import Program

#: Number of groups of tokens by router margin, by position in the document, and by frequency of the token.
QUARTERS = 4


class TokenLosses:
    """Losses of every token under one model, for any variables; compiled at the first call."""

    def __init__(self, program: Program):
        self._mesh = program.mesh

        @jax.jit
        def losses(variables: dict[str, Any], batch: Batch) -> jax.Array:
            model = program.model(variables)
            return token_cross_entropy(forward(model, batch).hidden, model.output_matrix(), batch["targets"])

        self._losses = losses

    def __call__(
        self, variables: dict[str, Any], batches: Mapping[str, Sequence[Mapping[str, np.ndarray]]]
    ) -> np.ndarray:
        """−log p(target) of every real token, [n] float32 in the order of :class:`Records`; NaN without a target."""
        found = []
        for batch in (batch for of_domain in batches.values() for batch in of_domain):
            with jax.set_mesh(self._mesh):
                nll = np.asarray(self._losses(variables, place(dict(batch), self._mesh)))
            nll = np.where(batch["targets"] >= 0, nll, np.nan)
            found.append(nll[batch["segment_ids"] > 0])
        return np.concatenate(found)


def places(batches: Mapping[str, Sequence[Mapping[str, np.ndarray]]]) -> tuple[np.ndarray, np.ndarray]:
    """Domain number of every real token, and its row number over all domains: two [n] in the order of Records."""
    domains = []
    rows = []
    first = 0
    for number, of_domain in enumerate(batches.values()):
        for batch in of_domain:
            lengths = (batch["segment_ids"] > 0).sum(axis=1)
            rows.append(np.repeat(first + np.arange(len(lengths)), lengths))
            domains.append(np.full(lengths.sum(), number))
            first += len(lengths)
    return np.concatenate(domains), np.concatenate(rows)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement of two models' routing of the same tokens in one layer, on odd rows.

    Attributes:
        first: share of tokens with the same first expert.
        sets: share of a token's experts in the first model that the other chose too, mean over tokens that it sends
            to an expert.
        chance: ``first`` for independent choices with these loads.
        null: mean of ``first`` where whole rows of the other model's choices are exchanged.
        null_std: its standard deviation.
        p_value: one-sided, of ``first`` against that null.
        load_distance: half the sum of absolute differences of the two loads, in [0,1].
        by_margin: share of tokens with the same first expert, in quarters of the first model's margin between its
            first and second expert, the smallest first.
        permutation: for each expert of the first model, the matching expert of the other.
    """

    first: float
    sets: float
    chance: float
    null: float
    null_std: float
    p_value: float
    load_distance: float
    by_margin: list[float]
    permutation: list[int]


def check_same_tokens(one: Records, other: Records) -> None:
    """Refuse records that cannot be compared.

    Raises:
        ConfigError: the tokens, the numbers of MoE layers or the numbers of experts differ.
    """
    for what, first, second in (
        ("MoE layers", len(one.layers), len(other.layers)),
        ("experts, including those without an FFN", one.num_experts, other.num_experts),
    ):
        if first != second:
            raise ConfigError(f"cannot compare: one model has {first} {what}, the other {second}")
    if not np.array_equal(one.tokens, other.tokens):
        raise ConfigError("cannot compare: the models read different tokens; both need the same tokenizer and text")


def agreements(one: Records, other: Records, *, shuffles: int, seed: int) -> list[Agreement]:
    """The agreement of two models in each MoE layer.

    Args:
        one: records of the first model.
        other: of the other, on the same tokens.
        shuffles: exchanges of rows for the null.
        seed: of the exchanges.
    """
    check_same_tokens(one, other)
    return [_agreement(one, other, layer, shuffles, seed) for layer in range(len(one.layers))]


def same_layers(one: Records, other: Records, found: Sequence[Agreement]) -> np.ndarray:
    """Number of layers in which a token has the same first expert in both, [n]."""
    renamed = [np.asarray(each.permutation)[first] for each, first in zip(found, one.first_choice, strict=True)]
    return np.sum(np.stack(renamed) == other.first_choice, axis=0)


def _agreement(one: Records, other: Records, layer: int, shuffles: int, seed: int) -> Agreement:
    size, even = one.num_experts, one.row % 2 == 0
    if even.all() or not even.any():
        raise ConfigError("cannot compare: the text has a single row; give more --tokens")
    first, second = one.first_choice[layer], other.first_choice[layer]
    _, permutation = optimize.linear_sum_assignment(_counts(first[even], second[even], size), maximize=True)
    renamed = permutation[first[~even]]
    seen = second[~even]
    row = one.row[~even]
    loads = [np.bincount(choices, minlength=size) / len(choices) for choices in (renamed, seen)]
    same = renamed == seen
    rng = np.random.default_rng(seed)
    null = np.array([np.mean(renamed == seen[_exchanged(row, rng)]) for _ in range(shuffles)])
    mine = measures.membership(permutation[one.expert_index[layer]][~even], one.chosen[layer][~even], size)
    theirs = measures.membership(other.expert_index[layer][~even], other.chosen[layer][~even], size)
    sent = mine.any(-1)
    shared = (mine & theirs)[sent].sum(-1) / mine[sent].sum(-1)
    ordered = np.sort(one.router_probs[layer][~even], axis=-1)
    margin = ordered[:, -1] - (ordered[:, -2] if size > 1 else 0)
    by_margin = np.array_split(same[np.argsort(margin, kind="stable")], QUARTERS)
    return Agreement(
        first=float(same.mean()),
        sets=float(shared.mean()) if sent.any() else 0.0,
        chance=float(loads[0] @ loads[1]),
        null=float(null.mean()),
        null_std=float(null.std(ddof=1)) if shuffles > 1 else 0.0,
        p_value=float((1 + np.sum(null >= same.mean())) / (1 + shuffles)),
        load_distance=float(np.abs(loads[0] - loads[1]).sum() / 2),
        by_margin=[float(part.mean()) for part in by_margin if len(part)],
        permutation=permutation.tolist(),
    )


def _counts(first: np.ndarray, second: np.ndarray, size: int) -> np.ndarray:
    """Number of tokens by first expert of either model, [E,E]."""
    return np.bincount(first * size + second, minlength=size * size).reshape(size, size)


def _exchanged(row: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Token indices after whole rows were permuted and the result rotated by a random offset."""
    rows = np.split(np.arange(len(row)), np.flatnonzero(np.diff(row)) + 1)
    order = np.concatenate([rows[number] for number in rng.permutation(len(rows))])
    return np.roll(order, rng.integers(len(order)))


@dataclasses.dataclass(frozen=True)
class LossDifference:
    """Mean loss of the other model less that of the first over a group of tokens, nats.

    Attributes:
        mean: over tokens.
        low: lower end of the 95 % interval over rows, since tokens of a row are not independent.
        high: upper end.
        tokens: number with a target.
    """

    mean: float
    low: float
    high: float
    tokens: int


def loss_difference(difference: np.ndarray, row: np.ndarray) -> LossDifference | None:
    """The mean difference with its interval; None for fewer than two rows with targets.

    Args:
        difference: [n] nats; NaN without a target.
        row: [n] number of the token's row.
    """
    known = ~np.isnan(difference)
    numbers, index = np.unique(row[known], return_inverse=True)
    if len(numbers) < 2:
        return None
    sums, counts = np.bincount(index, weights=difference[known]), np.bincount(index)
    mean = sums.sum() / counts.sum()
    # Standard error of a ratio of sums over rows, from the residual of each row.
    error = np.sqrt(len(numbers) / (len(numbers) - 1) * np.sum((sums - mean * counts) ** 2)) / counts.sum()
    half = stats.t.ppf(0.975, len(numbers) - 1) * error
    return LossDifference(float(mean), float(mean - half), float(mean + half), int(counts.sum()))


def loss_differences(
    one: Records, first: np.ndarray, second: np.ndarray, same: np.ndarray, piece: Callable[[int], str]
) -> dict[str, dict[str, LossDifference]]:
    """Where two models' losses differ: grouping → group → difference.

    Args:
        one: records of either model.
        first: [n] losses of the first model (:class:`TokenLosses`).
        second: [n] of the other.
        same: [n] number of layers in which the token has the same first expert.
        piece: token id → its text.
    """
    classes = lexical.lexical_classes(one.tokens, piece)
    _, index, occurrences = np.unique(one.tokens, return_inverse=True, return_counts=True)
    layers = len(one.layers)
    groups: dict[str, dict[str, np.ndarray]] = {
        "all": {"all tokens": np.ones(len(one.tokens), bool)},
        "domain": {name: one.domain == number for number, name in enumerate(one.domains)},
        "token class": {name: classes == number for number, name in enumerate(lexical.CLASSES)},
        "position in the document": _quarters(one.positions),
        "occurrences of the token": _quarters(occurrences[index]),
        "layers with the same first expert": {
            f"{number} of {layers}": same == number for number in range(layers + 1)
        },
    }  # fmt: skip
    compare = functools.partial(loss_difference, row=one.row)
    found = {
        grouping: {name: compare(np.where(inside, second - first, np.nan)) for name, inside in of_grouping.items()}
        for grouping, of_grouping in groups.items()
    }
    return {
        grouping: {name: value for name, value in values.items() if value is not None}
        for grouping, values in found.items()
    }


def _quarters(values: np.ndarray) -> dict[str, np.ndarray]:
    """Tokens by quarter of an integer value; equal values stay in one group."""
    bounds = np.unique(np.quantile(values, np.linspace(0, 1, QUARTERS + 1)[1:-1], method="inverted_cdf"))
    number = np.searchsorted(bounds, values, side="left")
    return {
        f"{values[number == i].min()} to {values[number == i].max()}": number == i
        for i in range(len(bounds) + 1)
        if (number == i).any()
    }
