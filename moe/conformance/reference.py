"""The oracle: equations of the papers in plain loops over tokens, experts and queries.

Independent of ``moe``. Decisions (which expert, which buffer position, dropped or not) are made one by one in NumPy;
:func:`moe_output`, which is differentiated, is the same loop over JAX vectors with the decisions as constants.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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


def softmax(z: Any) -> Any:
    """exp(z_i) / sum_j exp(z_j) of a vector."""
    xp = jnp if isinstance(z, jax.Array) else np
    powers = xp.exp(z - xp.max(z))
    return powers / powers.sum()


@dataclasses.dataclass(frozen=True)
class Rule:
    """Inputs of a gate other than the logits.

    Attributes:
        groups, kept_groups: number of groups of experts, and of those that a token may choose from.
        renormalise: divide the chosen weights by their sum, where the gate leaves that open.
        scale: of the weights.
        bias: [E], added to DeepSeek-V3's scores for the choice only.
        policy: order of tokens: position, probability (largest weight first) or random (largest priority first).
        overflow: an overflowing assignment is retried once on the token's next-best expert, after all others.
        token_ids: [G,S], for the gate hash.
        draws: the gate's random numbers, uniform: [G,S] of gshard, [G,S,K] of st_moe, [G,S,E] of random; standard
            normal: [G,S,E] of noisy_topk; standard Gumbel: [G,S,E] of switch_sampled. None: none are drawn.
        priorities: [G,S], of the policy random.
        null: numbers of zero, copy, constant and novice experts: the router's last columns, without a capacity.
        pool: number of experts in a group's pool, of the gate emo; 0: all.
        softcap: c, of logits c·tanh(logits / c); 0: none.
    """

    groups: int = 1
    kept_groups: int = 1
    renormalise: bool = False
    scale: float = 1.0
    bias: np.ndarray | float = 0.0
    policy: str = "position"
    overflow: bool = False
    token_ids: np.ndarray | None = None
    draws: np.ndarray | None = None
    priorities: np.ndarray | None = None
    null: tuple[int, int, int, int] = (0, 0, 0, 0)
    pool: int = 0
    softcap: float = 0.0


PLAIN = Rule()
#: Gates whose tokens go, outside training, to every expert whose threshold their probability exceeds.
THRESHOLDS = ("expert_threshold", "running_thresholds")


def hashed(token_id: int, num_experts: int, k: int) -> list[int]:
    """Experts of a token id, those of the highest hashes: murmur3's finalizer, but with every shift by 16, over
    id·E + e + 2^32/golden ratio."""
    hashes = []
    for expert in range(num_experts):
        h = (token_id * num_experts + expert + 0x9E3779B9) % 2**32
        for factor in (0x85EBCA6B, 0xC2B2AE35):
            h = (h ^ (h >> 16)) * factor % 2**32
        hashes.append((h ^ (h >> 16)) >> 8)
    return sorted(range(num_experts), key=lambda expert: (-hashes[expert], expert))[:k]


def sigmoid(z: Any) -> Any:
    """1/(1 + exp(−z))."""
    xp = jnp if isinstance(z, jax.Array) else np
    return 1.0 / (1.0 + xp.exp(-z))


def scores_of(gate: str, logits: Any) -> Any:
    """Scores of one token: the sigmoids of DeepSeek-V3, Kimi K3 and Trinity, DeepSeek-V4's sqrt(ln(1 + e^z)), or the
    softmax."""
    xp = jnp if isinstance(logits, jax.Array) else np
    if gate in ("deepseek_v3", "quantile_balancing", "smebu"):
        return sigmoid(logits)
    return xp.sqrt(xp.log1p(xp.exp(logits))) if gate.startswith("deepseek_v4") else softmax(logits)


def choose(gate: str, logits: np.ndarray, k: int, rule: Rule = PLAIN) -> list[int]:
    """The experts of one token, logits [E], best first; the lower index first among equals.

    DeepSeek-V3 2024, section 2.1.2: by sigmoid + bias, from the groups with the highest sum of two such scores.
    DeepSeek-V2 2024, section 2.2.2: from the groups of the best experts.
    """
    num_experts = len(logits)
    if gate in ("dense_mixture", "expert_choice", *THRESHOLDS, "remoe"):
        return list(range(num_experts))
    biased = gate in ("deepseek_v3", "deepseek_v4", "quantile_balancing", "smebu")
    scores, best = scores_of(gate, logits) + rule.bias if biased else logits, 2 if gate == "deepseek_v3" else 1
    if gate == "zaya":  # the last one, which returns 0, starts with a bias of -1
        scores = scores_of(gate, logits) - (np.arange(num_experts) == num_experts - 1)
    size = num_experts // rule.groups
    by_group = [list(range(g * size, (g + 1) * size)) for g in range(rule.groups)]
    worth = [sum(sorted((scores[e] for e in members), reverse=True)[:best]) for members in by_group]
    kept = sorted(range(rule.groups), key=lambda group: (-worth[group], group))[: rule.kept_groups]
    candidates = [expert for group in kept for expert in by_group[group]]
    return sorted(candidates, key=lambda expert: (-scores[expert], expert))[:k]


def probabilities(gate: str, logits: Any) -> Any:
    """Probabilities for balancing losses and overflow: the softmax, or scores over their sum (DeepSeek-V3,
    equation 19)."""
    scores = scores_of(gate, logits)
    return scores / scores.sum()


def weights(gate: str, logits: Any, experts: list[int], rule: Rule = PLAIN) -> list[Any]:
    """Combine weights of these experts for one token.

    Jacobs et al. 1991, equation 1, and Switch, equation 2: the softmax over all experts. GShard, algorithm 1, and
    ST-MoE: renormalised over the chosen. Mixtral, section 2.1, and Shazeer 2017, equation 3: softmax over the chosen
    logits. DeepSeek-V3, equations 12 and 13: the sigmoids over their sum, scaled. ReMoE, section 3.1: ReLU.
    """
    if gate == "remoe":
        return [logits[expert] * (logits[expert] > 0) for expert in experts]
    if gate == "sparse_mixer":
        return sparse_mixer(logits, experts)
    if gate in ("hash", "random"):
        return [1 / len(experts)] * len(experts)
    if gate in ("mixtral", "noisy_topk", "balanced"):
        xp = jnp if isinstance(logits, jax.Array) else np
        powers = [xp.exp(logits[expert] - xp.max(logits)) for expert in experts]
        return [power / sum(powers) for power in powers]
    scores = scores_of(gate, logits)
    chosen = [scores[expert] for expert in experts]
    if gate in ("gshard", "st_moe") or rule.renormalise:
        chosen = [score / sum(chosen) for score in chosen]
    return [rule.scale * score for score in chosen]


#: Half the relative distance below the highest logit within which SparseMixer weighs experts.
_MIXER_TOLERANCE = 0.01


def sparse_mixer(logits: Any, experts: list[int]) -> list[Any]:
    """Weights of the experts of one token, chosen one after the other (Phi-3.5-MoE's released code, in evaluation)."""
    xp = jnp if isinstance(logits, jax.Array) else np
    left, result = list(range(len(logits))), []
    for expert in experts:
        best = max(logits[e] for e in left)
        near = [e for e in left if not (best - logits[e]) / max(abs(logits[e]), best) > 2 * _MIXER_TOLERANCE]
        powers = {e: xp.exp(logits[e] - best) for e in near}
        result.append(powers[expert] / sum(powers.values()))
        left.remove(expert)
    return result


def cosine_logits(x: Any, router: Any, project: Any, log_scale: Any) -> Any:
    """Logits [E] of one token x [D]: cosines of its projection with the columns of the router [P,E], over τ = exp of
    −log_scale (X-MoE 2022, equations 5 and 6)."""
    xp = jnp if isinstance(router, jax.Array) else np
    inner = project.T @ x
    cosines = [inner @ column / xp.sqrt((inner @ inner) * (column @ column)) for column in router.T]
    return xp.stack(cosines) * xp.exp(log_scale[0])


def zaya_logits(x: Any, router: Any, parts: Mapping[str, Any]) -> Any:
    """Logits [E+1] of one token x [D] in the lowest layer: the MLP of its projection (ZAYA1's released code)."""
    xp = jnp if isinstance(router, jax.Array) else np
    vector = parts["down"].T @ x + parts["down_bias"]
    hidden = vector / xp.sqrt(xp.mean(vector * vector) + 1e-5) * parts["norm.scale"]
    for name in ("first", "second"):
        z = parts[name].T @ hidden + parts[f"{name}_bias"]
        hidden = z * (1 + jax.scipy.special.erf(z / 2**0.5)) / 2
    return router.T @ hidden


def router_logits(gate: str, x: Any, router: Any, parts: Mapping[str, Any], rule: Rule = PLAIN) -> Any:
    """Logits of one token x [D] by the router of a gate, with the router's further parameters."""
    if gate == "zaya":
        logits = zaya_logits(x, router, parts)
    else:
        logits = cosine_logits(x, router, parts["project"], parts["log_scale"]) if gate == "cosine" else router.T @ x
    xp = jnp if isinstance(router, jax.Array) else np
    return rule.softcap * xp.tanh(logits / rule.softcap) if rule.softcap else logits


def noisy(logits: Any, noise_logits: Any, draws: Any) -> Any:
    """Noisy logits [E] of one token: x·W_g + N(0,1)·softplus(x·W_noise) (Shazeer 2017, equation 4)."""
    xp = jnp if isinstance(logits, jax.Array) else np
    return logits + draws * xp.log1p(xp.exp(noise_logits))


def assignment_weights(gate: str, logits: Any, named: list[int], placed: list[int], rule: Rule = PLAIN) -> list[Any]:
    """:func:`weights` of the experts that a token chose, times p(placed)/p(named) where an assignment overflowed."""
    result = weights(gate, logits, named, rule)
    probs = probabilities(gate, logits)
    return [
        weight if here == there else weight * probs[there] / probs[here]
        for weight, here, there in zip(result, named, placed, strict=True)
    ]


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
    latent: tuple[jax.Array, jax.Array] | None = None,
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
        latent: [D,P] and [P,D], around the FFNs.
        router_parts: further parameters of the router, see :func:`router_logits`.
    """
    rows = []
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
            for choice, weight in enumerate(assignment_weights(gate, logits, named, placed, rule)):
                if decisions.kept[g, s, choice]:
                    e = placed[choice]
                    if e >= len(up):
                        y = y + weight * null_expert(x[g, s], e - len(up), rule, null)
                        continue
                    matrix = None if gate_matrix is None else gate_matrix[e]
                    inner = x[g, s] if latent is None else latent[0].T @ x[g, s]
                    output = ffn(inner, up[e], matrix, down[e], activation)
                    y = y + weight * (output if latent is None else latent[1].T @ output)
            rows.append(y)
    # G·S of [D] → [G,S,D]
    return jnp.stack(rows).reshape(x.shape)


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
