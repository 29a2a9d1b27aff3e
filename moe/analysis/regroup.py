"""Order of experts in which those that the same tokens choose stand together, as on the devices of an expert axis."""

from __future__ import annotations

import numpy as np

from moe.config import ConfigError, ModelConfig


def check(model: ModelConfig, groups: int) -> None:
    """Refuse groups that experts cannot be sorted into. Raises ConfigError."""
    size, own = model.moe.num_experts, getattr(model.moe.gate, "groups", 1)
    if not 2 <= groups < size or size % groups:
        raise ConfigError(
            f"--regroup={groups}: must divide model.moe.num_experts={size}, and be at least 2 and below it"
        )
    if own > 1:
        raise ConfigError(f"model.moe.gate.groups={own}: the gate chooses among groups of its own order")


def chosen_together(expert_index: np.ndarray, chosen: np.ndarray, num_experts: int) -> np.ndarray:
    """[L,E,E] number of tokens that chose both experts.

    Args:
        expert_index: [L,N,K] experts of tokens; those from ``num_experts`` on have no FFN and do not count.
        chosen: [L,N,K].
    """
    layers, tokens, _ = expert_index.shape
    counts = np.zeros((layers, num_experts, num_experts))
    for layer in range(layers):
        sends = np.zeros((tokens, max(num_experts, int(expert_index[layer].max()) + 1)))
        token, choice = np.nonzero(chosen[layer])
        sends[token, expert_index[layer][token, choice]] = 1
        counts[layer] = sends[:, :num_experts].T @ sends[:, :num_experts]
    return counts


def order(counts: np.ndarray, groups: int) -> np.ndarray:
    """[E] experts, those of a group behind each other: each group begins with the most used expert that is left, and
    takes the one that was most often chosen with those in it until it has E/groups."""
    size = len(counts)
    left, result = set(range(size)), []
    for _ in range(groups):
        group = [max(left, key=lambda expert: (counts[expert, expert], -expert))]
        left.remove(group[0])
        while len(group) < size // groups:
            group.append(max(left, key=lambda expert: (counts[group, expert].sum(), -expert)))
            left.remove(group[-1])
        result += sorted(group)
    return np.array(result)


def groups_of_tokens(expert_index: np.ndarray, chosen: np.ndarray, order: np.ndarray, groups: int) -> float:
    """Mean number of groups, of consecutive experts in an order, in which a token has experts: devices to send it to.

    Args:
        expert_index: [N,K] of one layer.
        chosen: [N,K].
        order: [E].
    """
    size = len(order)
    group = np.full(max(size, int(expert_index.max()) + 1), groups)
    group[order] = np.arange(size) // (size // groups)
    sent = np.zeros((len(expert_index), groups + 1), bool)
    token, choice = np.nonzero(chosen)
    sent[token, group[expert_index[token, choice]]] = True
    return float(sent[:, :groups].sum(1).mean())
