"""Measures of routing: NumPy in, NumPy or numbers out, each with what chance alone would give.

In: arrays of :class:`moe.analysis.record.Records`. Everything random takes a ``numpy.random.Generator``.

- :func:`expert_load`, :func:`mean_entropy`: who gets how much.
- :func:`repetition`: consecutive tokens with a common expert (Mixtral 2024, Table 5).
- :func:`dependence`: how much a label (domain, token, syntax class) tells about the first expert.
- :func:`coactivation`: experts chosen together (OLMoE 2024, section 5.2).
- :func:`saturation`: share of the final experts chosen already at an earlier checkpoint (OLMoE 2024, section 5.1).
- :func:`top_tokens`: what each expert is fond of.

Letters: L MoE layers, n tokens, K choices, E experts, P pairs of consecutive tokens.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np


def expert_load(
    expert_index: np.ndarray, chosen: np.ndarray, domain: np.ndarray, num_domains: int, num_experts: int
) -> np.ndarray:
    """[L,domains,E] share of a domain's sent pairs that each expert gets; a row sums to 1 (0: nothing was sent).

    Args:
        expert_index: [L,n,K].
        chosen: [L,n,K] bool, pairs that are sent.
        domain: [n], from 0.
        num_domains: rows of the result.
        num_experts: E.
    """
    counts = np.zeros((len(expert_index), num_domains, num_experts))
    where = np.broadcast_to(domain[:, None], expert_index.shape[1:])
    for layer, (index, sent) in enumerate(zip(expert_index, chosen, strict=True)):
        np.add.at(counts[layer], (where[sent], index[sent]), 1)
    return counts / np.maximum(counts.sum(-1, keepdims=True), 1)


def mean_entropy(router_probs: np.ndarray) -> np.ndarray:
    """[L,n,E] → [L] mean entropy of the router's distribution over its maximum ln E: 1 undecided, 0 certain."""
    p = np.maximum(router_probs, 1e-30)
    return -(p * np.log(p)).sum(-1).mean(-1) / math.log(router_probs.shape[-1])


# --- Repetition ------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Repetition:
    """Share of consecutive tokens with an expert in common, and the same by chance.

    Attributes:
        observed: share of the pairs.
        uniform: chance if every set of experts were equally likely.
        load: chance if tokens drew their sets independently with the frequencies that they have here.
        shuffled_mean: mean of the share over shuffles of the tokens; its expectation is ``load`` but for O(1/n).
        shuffled_std: standard deviation over shuffles.
        p_value: one-sided, (1 + shuffles with at least the observed share) / (1 + shuffles).
        pairs: P.
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
    """Mixtral 2024, Table 5: whether token i and token i + 1 have one of their m experts in common.

    Args:
        experts: [n,m] experts of the tokens of one domain in reading order; m = 1: first choices ("First choice");
            m = 2: first and second ("First or second choice").
        consecutive: [P] each i whose successor is i + 1.
        num_experts: E.
        shuffles: permutations of the n tokens.
        rng: draws them.

    Raises:
        ValueError: m is neither 1 nor 2, or there is no pair.
    """
    m = experts.shape[1]
    if m not in (1, 2) or not len(consecutive):
        raise ValueError(f"repetition of {m} choices over {len(consecutive)} pairs: needs 1 or 2 choices, and a pair")

    def share(sets: np.ndarray) -> float:
        now, then = sets[consecutive], sets[consecutive + 1]
        return float((now[:, :, None] == then[:, None, :]).any((1, 2)).mean())

    shuffled = [share(experts[rng.permutation(len(experts))]) for _ in range(shuffles)]
    observed = share(experts)
    return Repetition(
        observed,
        uniform_repetition(num_experts, m),
        load_repetition(experts, num_experts),
        *_mean_std(shuffled),
        _p_value(observed, shuffled),
        len(consecutive),
    )


def uniform_repetition(num_experts: int, choices: int) -> float:
    """1 − C(E−m,m)/C(E,m): two independent uniform sets of m of E meet. 1/E for m = 1; 13/28 for m = 2 of 8."""
    return 1 - math.comb(num_experts - choices, choices) / math.comb(num_experts, choices)


def load_repetition(experts: np.ndarray, num_experts: int) -> float:
    """Chance that two independent tokens with these frequencies have an expert in common. experts: [n,m], m ≤ 2.

    m = 1: Σ q_a². m = 2, with q_ab the share of the set {a,b} and l_a of all sets with a: Σ q_ab (l_a + l_b − q_ab).
    """
    if experts.shape[1] == 1:
        shares = np.bincount(experts[:, 0], minlength=num_experts) / len(experts)
        return float((shares**2).sum())
    sets = np.zeros((num_experts, num_experts))
    np.add.at(sets, (experts.min(1), experts.max(1)), 1 / len(experts))
    member = sets.sum(0) + sets.sum(1)
    return float((sets * (member[:, None] + member[None, :] - sets)).sum())


# --- Specialisation --------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Dependence:
    """Mutual information of two discrete variables, and the same after permutations. Entropies in nats.

    The plug-in estimate is biased upward, by about (|x| − 1)(|y| − 1) / 2n: with many rare values (token ids) by much.
    The null has the same bias, so observed − null is what is compared.

    Attributes:
        information: I(x;y).
        x_entropy: H(x), of the experts.
        y_entropy: H(y), of the label.
        null_mean: mean of I over permutations.
        null_std: standard deviation of I over permutations.
        p_value: one-sided, (1 + permutations with at least the observed I) / (1 + permutations).
        samples: n.
        values: how many different labels there are.
    """

    information: float
    x_entropy: float
    y_entropy: float
    null_mean: float
    null_std: float
    p_value: float
    samples: int
    values: int

    def _over(self, information: float, entropy: float) -> float:
        return information / entropy if entropy > 0 else 0.0

    @property
    def nmi(self) -> float:
        """2 I / (H(x) + H(y)), in [0,1]."""
        return self._over(self.information, (self.x_entropy + self.y_entropy) / 2)

    @property
    def nmi_null(self) -> float:
        """The mean of ``nmi`` over permutations (of units of equal size, which change no entropy)."""
        return self._over(self.null_mean, (self.x_entropy + self.y_entropy) / 2)

    @property
    def nmi_null_std(self) -> float:
        """The standard deviation of ``nmi`` over permutations."""
        return self._over(self.null_std, (self.x_entropy + self.y_entropy) / 2)

    @property
    def nmi_debiased(self) -> float:
        """nmi − nmi_null."""
        return self.nmi - self.nmi_null

    @property
    def explained(self) -> float:
        """(I − null) / H(x): share of the expert's entropy that the label accounts for.

        Its denominator is the same for every label, so that it compares labels of few and of many values; nmi is
        low for any label whose entropy is far from H(x).
        """
        return self._over(self.information - self.null_mean, self.x_entropy)


def dependence(
    x: np.ndarray,
    y: np.ndarray,
    *,
    shuffles: int,
    rng: np.random.Generator,
    units: np.ndarray | None = None,
) -> Dependence:
    """How much the label y tells about x, against permutations of the labels.

    Args:
        x: [n] non-negative integers: first experts.
        y: [n] non-negative integers: labels.
        shuffles: permutations.
        rng: draws them.
        units: [n] what is exchangeable under the null where tokens are not: a domain belongs to a whole row, so its
            label is permuted over rows (all tokens of a unit have one label). None: tokens.

    Raises:
        ValueError: two tokens of a unit have different labels.
    """
    x, y = (np.unique(values, return_inverse=True)[1] for values in (x, y))
    if units is None:
        number, labels = np.arange(len(y)), y
    else:
        _, first, number = np.unique(units, return_index=True, return_inverse=True)
        labels = y[first]
        if not np.array_equal(labels[number], y):
            raise ValueError("dependence: all tokens of a unit must have the same label")
    null, observed = [], mutual_information(x, y)
    for _ in range(shuffles):
        null.append(mutual_information(x, rng.permutation(labels)[number]))
    return Dependence(
        observed,
        _entropy(np.bincount(x)),
        _entropy(np.bincount(y)),
        *_mean_std(null),
        _p_value(observed, null),
        len(x),
        len(np.unique(y)),
    )


def mutual_information(x: np.ndarray, y: np.ndarray) -> float:
    """I(x;y) in nats of [n] non-negative integers, from their joint frequencies: Σ p(x,y) ln p(x,y) / (p(x) p(y))."""
    width = int(y.max()) + 1
    joint = np.bincount(x.astype(np.int64) * width + y)
    information = _entropy(np.bincount(x)) + _entropy(np.bincount(y)) - _entropy(joint)
    return max(information, 0.0)


def frequent(labels: np.ndarray, at_least: int) -> np.ndarray:
    """[n] bool: labels that occur that often among these n."""
    _, number, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return counts[number] >= at_least


def _entropy(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def _mean_std(values: list[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _p_value(observed: float, null: list[float]) -> float:
    return (1 + sum(value >= observed for value in null)) / (1 + len(null))


# --- Choices together, and over time ---------------------------------------------------------------------------------
def membership(expert_index: np.ndarray, chosen: np.ndarray, num_experts: int) -> np.ndarray:
    """[...,K] → [...,E] bool: whether an expert is among those chosen. A token names no expert twice."""
    member = np.zeros((*expert_index.shape[:-1], num_experts), bool)
    np.put_along_axis(member, expert_index, chosen, axis=-1)
    return member


def coactivation(expert_index: np.ndarray, chosen: np.ndarray, num_experts: int) -> np.ndarray:
    """[L,E,E] int64: tokens that chose both experts; on the diagonal, tokens that chose the one.

    Divided by the diagonal of its row it is the share of an expert's tokens that another one shares (OLMoE 2024,
    section 5.2).
    """
    counts = np.zeros((len(expert_index), num_experts, num_experts), np.int64)
    for layer, (index, sent) in enumerate(zip(expert_index, chosen, strict=True)):
        member = membership(index, sent, num_experts).astype(np.float64)  # BLAS; counts are exact below 2^53
        counts[layer] = np.rint(member.T @ member)
    return counts


def saturation(earlier: np.ndarray, final: np.ndarray) -> np.ndarray:
    """[L,n,E] bool memberships → [L] mean over tokens of |earlier ∩ final| / |final| (OLMoE 2024, section 5.1).

    Chance is K/E. For k = 1 give the membership of first choices. Tokens that the final router sends nowhere are left
    out.
    """
    size = final.sum(-1)
    shares = (earlier & final).sum(-1) / np.maximum(size, 1)
    return np.array([layer[sent].mean() for layer, sent in zip(shares, size > 0, strict=True)])


@dataclasses.dataclass(frozen=True)
class TopToken:
    """A token that prefers an expert: ``count`` of its ``total`` occurrences have it as first choice.

    ``lift`` is (count / total) over the expert's share of all first choices.
    """

    token: int
    count: int
    total: int
    lift: float


def top_tokens(
    first_choice: np.ndarray, tokens: np.ndarray, num_experts: int, *, at_least: int, number: int
) -> list[list[TopToken]]:
    """For each of E experts the ``number`` tokens of highest lift, then count, among those of ``at_least`` occurrences.

    Args:
        first_choice: [n] of one layer.
        tokens: [n] ids.
        num_experts: E.
        at_least: a token's occurrences; rarer ones have high lifts by chance.
        number: how many to list.
    """
    ids, position, totals = np.unique(tokens, return_inverse=True, return_counts=True)
    counts = np.zeros((num_experts, len(ids)), np.int64)
    np.add.at(counts, (first_choice, position), 1)
    expert_share = counts.sum(1) / len(tokens)
    result = []
    for count, share in zip(counts, expert_share, strict=True):
        lift = count / totals / max(share, 1e-30)
        eligible = np.flatnonzero((totals >= at_least) & (count > 0))
        best = eligible[np.lexsort((ids[eligible], -count[eligible], -lift[eligible]))][:number]
        result.append([TopToken(int(ids[i]), int(count[i]), int(totals[i]), float(lift[i])) for i in best])
    return result
