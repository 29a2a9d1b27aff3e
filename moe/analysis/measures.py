"""Load, entropy, co-activation, saturation and top tokens of recorded routing, as NumPy arrays."""

from __future__ import annotations

import dataclasses
import math

import numpy as np


def expert_load(
    expert_index: np.ndarray, chosen: np.ndarray, domain: np.ndarray, num_domains: int, num_experts: int
) -> np.ndarray:
    """Share of a domain's assignments per expert, [L,domains,E]; a row sums to 1, or to 0 without assignments.

    Args:
        expert_index: [L,n,K].
        chosen: [L,n,K] bool, False for an assignment that the gate declined.
        domain: [n] domain numbers.
        num_domains: number of domains.
        num_experts: E.
    """
    counts = np.zeros((len(expert_index), num_domains, num_experts))
    where = np.broadcast_to(domain[:, None], expert_index.shape[1:])
    for layer, (index, sent) in enumerate(zip(expert_index, chosen, strict=True)):
        np.add.at(counts[layer], (where[sent], index[sent]), 1)
    return counts / np.maximum(counts.sum(-1, keepdims=True), 1)


def mean_entropy(router_probs: np.ndarray) -> np.ndarray:
    """Mean entropy of router_probs [L,n,E] over ln E, [L]: 1 if uniform, 0 if certain or if there is one expert."""
    p = np.maximum(router_probs, 1e-30)
    return -(p * np.log(p)).sum(-1).mean(-1) / math.log(max(router_probs.shape[-1], 2))


def membership(expert_index: np.ndarray, chosen: np.ndarray, num_experts: int) -> np.ndarray:
    """Multi-hot form of assignments, [...,K] → [...,E] bool. A token has at most one assignment per expert."""
    member = np.zeros((*expert_index.shape[:-1], num_experts), bool)
    np.put_along_axis(member, expert_index, chosen, axis=-1)
    return member


def coactivation(expert_index: np.ndarray, chosen: np.ndarray, num_experts: int) -> np.ndarray:
    """Number of tokens that chose both experts, [L,E,E] int64; on the diagonal, tokens of the expert.

    A row divided by its diagonal entry is the share of an expert's tokens that also chose the other (OLMoE 2024,
    section 5.2).
    """
    counts = np.zeros((len(expert_index), num_experts, num_experts), np.int64)
    for layer, (index, sent) in enumerate(zip(expert_index, chosen, strict=True)):
        member = membership(index, sent, num_experts).astype(np.float64)  # BLAS; counts are exact below 2^53
        counts[layer] = np.rint(member.T @ member)
    return counts


def most_frequent_partner(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of an expert's tokens that also chose its most frequent partner, mean over used experts, [L]; and by load.

    Both are 0 in a layer that no token uses. The second array is the share expected from the loads alone: the other
    choices of an expert's tokens are drawn from the other experts in proportion to load; one that is drawn twice for a
    token, which is rare, counts twice.

    Args:
        counts: [L,E,E] from :func:`coactivation`.
    """
    observed, by_load = [], []
    for layer in counts.astype(float):
        tokens, others = np.diag(layer), layer - np.diag(np.diag(layer))
        used = tokens > 0
        more = others.sum(1)[used] / tokens[used]  # other choices of a token of each expert
        load = np.where(np.eye(len(tokens), dtype=bool), 0.0, tokens)[used]
        number = max(used.sum(), 1)
        observed.append((others.max(1)[used] / tokens[used]).sum() / number)
        by_load.append(np.minimum(more * load.max(1) / np.maximum(load.sum(1), 1), 1).sum() / number)
    return np.array(observed), np.array(by_load)


def saturation(earlier: np.ndarray, final: np.ndarray) -> np.ndarray:
    """Mean over tokens of |earlier ∩ final| / |final|, [L], from memberships [L,n,E] (OLMoE 2024, section 5.1).

    Chance is K/E. For k = 1 give the membership of first choices. Tokens without a final assignment are left out; 0 if
    there are no others.
    """
    size = final.sum(-1)
    shares = (earlier & final).sum(-1) / np.maximum(size, 1)
    return np.array([layer[sent].sum() / max(sent.sum(), 1) for layer, sent in zip(shares, size > 0, strict=True)])


@dataclasses.dataclass(frozen=True)
class TopToken:
    """A token with ``count`` of its ``total`` occurrences routed to the expert as first choice.

    ``lift`` is (count / total) divided by the expert's share of all first choices.
    """

    token: int
    count: int
    total: int
    lift: float


def top_tokens(
    first_choice: np.ndarray, tokens: np.ndarray, num_experts: int, *, at_least: int, number: int
) -> list[list[TopToken]]:
    """List for each expert the ``number`` tokens of highest lift, then highest count.

    Args:
        first_choice: [n] experts in one layer.
        tokens: [n] token ids.
        num_experts: E.
        at_least: minimum occurrences of a token; rarer ones have high lifts by chance.
        number: maximum length of a list.
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
