"""Share of consecutive tokens with an expert in common (Mixtral 2024, Table 5), and its chance values."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from moe.analysis.permutation import permutation_test


@dataclasses.dataclass(frozen=True)
class Repetition:
    """Share of consecutive tokens with an expert in common, and the same by chance.

    Attributes:
        observed: share of the pairs of consecutive tokens.
        uniform: chance if all sets of experts were equally likely.
        load: chance if tokens drew their sets independently with the observed frequencies.
        shuffled_mean: mean share after shuffling the tokens; its expectation is ``load`` up to O(1/n).
        shuffled_std: standard deviation over shuffles.
        p_value: one-sided, from the shuffles.
        pairs: number of pairs of consecutive tokens.
    """

    observed: float
    uniform: float
    load: float
    shuffled_mean: float
    shuffled_std: float
    p_value: float
    pairs: int


def repetition(
    experts: np.ndarray, consecutive: np.ndarray, num_experts: int, *, shuffles: int, rng: np.random.Generator
) -> Repetition:
    """Measures how often tokens i and i + 1 have one of their first m experts in common (Mixtral 2024, Table 5).

    Args:
        experts: [n,m] experts of the tokens of one domain in reading order; m = 1: first choice; m = 2: first or second
            choice.
        consecutive: indices i for which i + 1 is the next token of the same document.
        num_experts: E.
        shuffles: permutations of the n tokens.
        rng: random generator of the permutations.

    Raises:
        ValueError: m is neither 1 nor 2, or `consecutive` is empty.
    """
    m = experts.shape[1]
    if m not in (1, 2) or not len(consecutive):
        raise ValueError(f"repetition of {m} choices over {len(consecutive)} pairs: needs 1 or 2 choices, and a pair")

    def share(order: np.ndarray) -> float:
        return shared_experts(experts[order], consecutive)

    test = permutation_test(np.arange(len(experts)), share, permutations=shuffles, rng=rng)
    return Repetition(
        observed=test.observed,
        uniform=uniform_repetition(num_experts, m),
        load=load_repetition(experts, num_experts),
        shuffled_mean=test.mean,
        shuffled_std=test.std,
        p_value=test.p_value,
        pairs=len(consecutive),
    )


@dataclasses.dataclass(frozen=True)
class TokenNull:
    """Repetition after exchanging expert sets among the occurrences of each token.

    The exchange keeps the text and how often each token goes to each expert. Excess over it is therefore not explained
    by the repetition of tokens in the text, but by context.

    Attributes:
        token_mean: mean share over shuffles.
        token_std: standard deviation over shuffles.
        token_p_value: one-sided, (1 + shuffles with at least the observed share) / (1 + shuffles).
    """

    token_mean: float
    token_std: float
    token_p_value: float


def token_null(
    experts: np.ndarray, tokens: np.ndarray, consecutive: np.ndarray, *, shuffles: int, rng: np.random.Generator
) -> TokenNull:
    """Shuffles expert sets within each token's occurrences; see :func:`repetition` for the arguments. tokens: [n]."""
    positions = np.argsort(tokens, kind="stable")
    null = np.empty(shuffles)
    for i in range(shuffles):
        shuffled = np.empty_like(experts)
        shuffled[positions] = experts[np.lexsort((rng.random(len(tokens)), tokens))]
        null[i] = shared_experts(shuffled, consecutive)
    reached = int((null >= shared_experts(experts, consecutive)).sum())
    std = float(np.std(null, ddof=1)) if shuffles > 1 else 0.0
    return TokenNull(float(null.mean()), std, (1 + reached) / (1 + shuffles))


def shared_experts(experts: np.ndarray, consecutive: np.ndarray) -> float:
    """Share of the i in `consecutive` whose sets experts[i] and experts[i + 1] overlap. experts: [n,m]."""
    now, then = experts[consecutive], experts[consecutive + 1]
    return float((now[:, :, None] == then[:, None, :]).any((1, 2)).mean())


def uniform_repetition(num_experts: int, choices: int) -> float:
    """Chance that two uniform sets of m of E experts overlap, 1 − C(E−m,m)/C(E,m): 1/E for m = 1."""
    return 1 - math.comb(num_experts - choices, choices) / math.comb(num_experts, choices)


def load_repetition(experts: np.ndarray, num_experts: int) -> float:
    """Chance that two independent draws from the observed sets overlap. experts: [n,m], m ≤ 2.

    m = 1: Σ q_a². m = 2: Σ q_ab (l_a + l_b − q_ab), with q_ab the share of the set {a,b} and l_a of the sets with a.
    """
    if experts.shape[1] == 1:
        shares = np.bincount(experts[:, 0], minlength=num_experts) / len(experts)
        return float((shares**2).sum())
    sets = np.zeros((num_experts, num_experts))
    np.add.at(sets, (experts.min(1), experts.max(1)), 1 / len(experts))
    member = sets.sum(0) + sets.sum(1)
    return float((sets * (member[:, None] + member[None, :] - sets)).sum())
