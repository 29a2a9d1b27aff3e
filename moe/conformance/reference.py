"""The oracle: equations of the papers in plain loops over tokens and experts.

Independent of ``moe``; :mod:`.reference_gates` has the equations of one token's choice and weights. Decisions (which
expert, which buffer position, dropped or not) are made one by one in NumPy; :func:`moe_output`, which is
differentiated, is the same loop over JAX vectors with the decisions as constants.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.conformance.reference_gates import (
    PLAIN,
    THRESHOLDS,
    Rule,
    assignment_weights,
    choose,
    hashed,
    noisy,
    probabilities,
    router_logits,
    softmax,
    tied_router,
    weights,
)

#: Added to mean squares by norms: the default of model.norm_eps.
NORM_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Decisions:
    """Expert and buffer position of every assignment.

    Attributes:
        expert: [G,S,K] int, the expert.
        chosen: [G,S,K] bool, accepted by the gate.
        position: [G,S,K] int, position in the expert's buffer of that group.
        kept: [G,S,K] bool, chosen and not dropped.
        original: [G,S,K] int, the gate's choice; differs from ``expert`` only after an overflow.
        pools: [G,E] bool, experts of the pool of each group, which is one document (EMO 2026); None: all.
    """

    expert: np.ndarray
    chosen: np.ndarray
    position: np.ndarray
    kept: np.ndarray
    original: np.ndarray
    pools: np.ndarray | None = None


def decide(gate: str, logits: np.ndarray, mask: np.ndarray, k: int, capacity: int, rule: Rule = PLAIN) -> Decisions:
    """Routes token by token, then fills buffers: all first choices in token order, then all second choices.

    Args:
        gate: a name in moe.config.registry.LAYERS whose tokens choose by their logits.
        logits: [G,S,E]; of noisy_topk with their noise.
        mask: [G,S] bool, real tokens.
        k: K.
        capacity: C, of one expert in one group.
        rule: of the gate.
    """
    groups, tokens, num_experts = logits.shape
    pools = pools_of(logits, mask, rule.pool) if rule.pool else None
    logits = logits if pools is None else np.where(pools[:, None], logits, -np.inf)
    expert = np.zeros((groups, tokens, k), int)
    chosen = np.zeros((groups, tokens, k), bool)
    position, kept = np.zeros_like(expert), np.zeros_like(chosen)
    for g in range(groups):
        for s in range(tokens):
            number = g * tokens + int(mask[g, :s].sum())
            expert[g, s] = _experts_of(gate, logits[g, s], k, rule, (g, s), number)
            chosen[g, s] = mask[g, s] & _sent(gate, logits[g, s], list(expert[g, s]), rule, (g, s))
        for e in range(num_experts if gate == "expert_choice" else 0):
            # Expert Choice 2022, equation 2: the expert takes its highest-scoring tokens.
            best = sorted(np.flatnonzero(mask[g]), key=lambda s: (-float(softmax(logits[g, s])[e]), s))[:capacity]
            chosen[g, :, e] = [s in best for s in range(tokens)]
    original = expert.copy()
    for g in range(groups):
        order = _filling_order(gate, logits[g], expert[g], chosen[g], rule, g)
        taken = [0] * num_experts
        for choice in range(k):
            for s in order:
                if chosen[g, s, choice]:
                    e = expert[g, s, choice]
                    position[g, s, choice] = taken[e]
                    kept[g, s, choice] = taken[e] < capacity or e >= num_experts - sum(rule.null)
                    taken[e] += 1
        if rule.overflow:
            taken = [min(count, capacity) for count in taken]
            further = [
                [e for e in choose("switch", probabilities(gate, logits[g, s]), num_experts) if e not in original[g, s]]
                for s in range(tokens)
            ]
            for choice in range(k):
                for s in range(tokens):
                    if chosen[g, s, choice] and not kept[g, s, choice]:
                        e = expert[g, s, choice] = further[s].pop(0)
                        position[g, s, choice] = taken[e]
                        kept[g, s, choice] = taken[e] < capacity
                        taken[e] += 1
    return Decisions(expert, chosen, position, kept, original, pools)


def pools_of(logits: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
    """[G,E] bool, the experts with the largest sums of probabilities over a group's tokens (EMO 2026)."""
    pools = np.zeros((logits.shape[0], logits.shape[2]), bool)
    for group, real in zip(range(len(logits)), mask, strict=True):
        sums = sum((softmax(logits[group, s]) for s in np.flatnonzero(real)), start=np.zeros(logits.shape[2]))
        pools[group, sorted(range(len(sums)), key=lambda e: (-sums[e], e))[:size]] = True
    return pools


def _experts_of(gate: str, logits: np.ndarray, k: int, rule: Rule, token: tuple[int, int], number: int) -> list[int]:
    """The experts that a token (group, position) names; ``number`` is g·S plus the real tokens before it in its group,
    which only balanced reads."""
    num_experts = len(logits)
    if gate in ("hash", "deepseek_v4_hash") and rule.token_ids is not None:
        return hashed(int(rule.token_ids[token]), num_experts, k)
    if gate == "balanced":
        return [(number * k + choice) % num_experts for choice in range(k)]
    if gate == "random" and rule.draws is not None:
        draws = rule.draws[token]
        return sorted(range(num_experts), key=lambda e: -draws[e])[:k]
    if gate == "switch_sampled" and rule.draws is not None:
        logits = logits + rule.draws[token]  # Switch 2021, appendix C, by the Gumbel-max trick
    return choose(gate, logits, k, rule)


def _sent(gate: str, logits: np.ndarray, experts: list[int], rule: Rule, token: tuple[int, int]) -> np.ndarray:
    """Whether each of these assignments of a token (group, position) is sent at all, [K] bool."""
    if gate == "remoe":
        return logits > 0
    if gate in THRESHOLDS:
        return softmax(logits) + rule.bias > 0
    sent = np.ones(len(experts), bool)
    if gate == "matryoshka" and rule.draws is not None:
        sent[int(rule.draws) :] = False  # M-MoE 2025: the first of K_l assignments
    if gate == "gshard" and rule.draws is not None:
        second = float(weights(gate, logits, experts)[1])
        sent[1] = 2 * second > rule.draws[token]
    if gate == "st_moe" and rule.draws is not None:
        # ST-MoE 2022, appendix D: sent with probability min(1, weight/0.2), the first always.
        sent[:] = [w > 0.2 * draw for w, draw in zip(weights(gate, logits, experts), rule.draws[token], strict=True)]
        sent[0] = True
    return sent


def _filling_order(
    gate: str, logits: np.ndarray, expert: np.ndarray, chosen: np.ndarray, rule: Rule, group: int
) -> list[int]:
    """The tokens of a group in the order in which they fill buffers."""
    order = list(range(len(logits)))
    if rule.policy == "probability":
        largest = [
            max(float(probabilities(gate, logits[s])[e]) * sent for e, sent in zip(expert[s], chosen[s], strict=True))
            for s in order
        ]
        order.sort(key=lambda s: (-largest[s], s))
    if rule.policy == "random" and rule.priorities is not None:
        priority = rule.priorities[group]
        order.sort(key=lambda s: (-priority[s], s))
    return order


def ffn(x: jax.Array, up: jax.Array, gate: jax.Array | None, down: jax.Array, activation: str) -> jax.Array:
    """One vector [D] through one FFN: down(act(gate x)·up x), or down(act(up x)) without a gate matrix."""
    act = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu, "gelu": jax.nn.gelu, "relu": jax.nn.relu}[activation]
    hidden = act(up.T @ x) if gate is None else act(gate.T @ x) * (up.T @ x)
    return down.T @ hidden


def null_expert(x: jax.Array, number: int, rule: Rule, arrays: Any) -> jax.Array:
    """Zero, copy or constant expert of one vector (MoE++ 2024, section 3.1), or a novice (MoNE 2025), by its number
    after the FFNs."""
    zero, copy, constant, _ = rule.null
    if number < zero + copy:
        return x * float(number >= zero)
    number -= zero + copy
    if number >= constant:
        return arrays["novices"][number - constant]
    vectors, mix = arrays["null_vectors"][number], arrays["null_mix"][number]
    alpha = softmax(mix.T @ x)
    return alpha[0] * x + alpha[1] * vectors


def moe_output(
    x: jax.Array,
    router: jax.Array,
    up: jax.Array,
    gate_matrix: jax.Array | None,
    down: jax.Array,
    *,
    gate: str,
    decisions: Decisions,
    activation: str = "swiglu",
    rule: Rule = PLAIN,
    noise: jax.Array | None = None,
    null: Mapping[str, jax.Array] | None = None,
    latent: tuple[jax.Array, ...] | None = None,
    router_parts: Mapping[str, jax.Array] = types.MappingProxyType({}),
) -> jax.Array:
    """y_t = sum of weight·expert(x_t) over the kept choices of t; differentiable in every array.

    Args:
        x: [G,S,D].
        router: [D,E].
        up, gate_matrix, down: [E,D,F], [E,D,F] or None, [E,F,D].
        gate: as in :func:`decide`.
        decisions: constants.
        activation: of the experts.
        rule: of the gate.
        noise: [D,E], W_noise of noisy_topk where the rule has its draws.
        null: null_vectors [n,D] and null_mix W [n,D,2] of the constant experts; novices [n,D].
        latent: [D,P] and [P,D], around the FFNs; and the scale [P] of an RMSNorm of their sum, if there is one.
        router_parts: further parameters of the router, see :func:`router_logits`.
    """
    rows = []
    if gate == "power_iteration":
        router = tied_router(router, up if gate_matrix is None else gate_matrix)
    for g in range(x.shape[0]):
        for s in range(x.shape[1]):
            named = [int(e) for e in decisions.original[g, s]]
            placed = [int(e) for e in decisions.expert[g, s]]
            logits = router_logits(gate, x[g, s], router, router_parts, rule)
            if decisions.pools is not None:
                logits = jnp.where(decisions.pools[g], logits, -jnp.inf)
            if noise is not None and rule.draws is not None:
                logits = noisy(logits, noise.T @ x[g, s], rule.draws[g, s])
            y = jnp.zeros_like(x[g, s])
            inner = x[g, s] if latent is None else latent[0].T @ x[g, s]
            combined = jnp.zeros_like(inner)  # of the FFNs
            for choice, weight in enumerate(assignment_weights(gate, logits, named, placed, rule)):
                if decisions.kept[g, s, choice]:
                    e = placed[choice]
                    if e >= len(up):
                        y = y + weight * null_expert(x[g, s], e - len(up), rule, null)
                        continue
                    matrix = None if gate_matrix is None else gate_matrix[e]
                    combined = combined + weight * ffn(inner, up[e], matrix, down[e], activation)
            rows.append(y + (combined if latent is None else project_up(combined, *latent[1:])))
    # G·S of [D] → [G,S,D]
    return jnp.stack(rows).reshape(x.shape)


def project_up(combined: jax.Array, up: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """The combined output of latent experts [P], normalised with the scale if there is one, → [D]."""
    if scale is None:
        return up.T @ combined
    root = jnp.sqrt(jnp.sum(combined**2) / len(combined) + NORM_EPSILON)
    return up.T @ (combined / root * scale)


def soft_output(
    x: jax.Array,
    router: jax.Array,
    up: jax.Array,
    gate_matrix: jax.Array | None,
    down: jax.Array,
    mask: np.ndarray,
    activation: str = "swiglu",
) -> jax.Array:
    """Soft MoE 2023, equations 1-3, slot by slot: x [G,S,D], router [D,E,P], mask [G,S]; the rest as moe_output."""
    _, num_experts, slots = router.shape
    y = []
    for g in range(x.shape[0]):
        real = [int(s) for s in np.flatnonzero(mask[g])]
        outputs = []
        for e in range(num_experts):
            for p in range(slots):
                mixed = jnp.zeros_like(x[g, 0])
                if real:
                    share = softmax(jnp.stack([x[g, s] @ router[:, e, p] for s in real]))
                    mixed = sum((share[i] * x[g, s] for i, s in enumerate(real)), start=mixed)
                matrix = None if gate_matrix is None else gate_matrix[e]
                outputs.append(ffn(mixed, up[e], matrix, down[e], activation))
        for s in range(x.shape[1]):
            combine = softmax(x[g, s] @ router.reshape(len(router), -1))
            mixed = sum(combine[i] * output for i, output in enumerate(outputs))
            y.append(mixed if s in real else jnp.zeros_like(x[g, s]))
    return jnp.stack(y).reshape(x.shape)
