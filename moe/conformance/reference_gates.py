"""The oracle's gates: logits, choice and weights of one token by the equations of the papers, in plain loops.

Independent of ``moe``. Functions of values that are differentiated take NumPy or JAX vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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
            normal: [G,S,E] of noisy_topk; standard Gumbel: [G,S,E] of switch_sampled; the integer K of matryoshka.
            None: none are drawn.
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
    """Scores of one token: the sigmoids of DeepSeek-V3, Kimi K3, Trinity and Kolibri, V4's sqrt(ln(1 + e^z)), the
    cosines of k_means, or the softmax."""
    xp = jnp if isinstance(logits, jax.Array) else np
    if gate in ("deepseek_v3", "quantile_balancing", "smebu", "kolibri"):
        return sigmoid(logits)
    if gate == "k_means":
        return logits
    return xp.sqrt(xp.log1p(xp.exp(logits))) if gate.startswith("deepseek_v4") else softmax(logits)


def choose(gate: str, logits: np.ndarray, k: int, rule: Rule = PLAIN) -> list[int]:
    """The experts of one token, logits [E], best first; the lower index first among equals.

    DeepSeek-V3 2024, section 2.1.2: by sigmoid + bias, from the groups with the highest sum of two such scores.
    DeepSeek-V2 2024, section 2.2.2: from the groups of the best experts.
    """
    num_experts = len(logits)
    if gate in ("dense_mixture", "expert_choice", *THRESHOLDS, "remoe"):
        return list(range(num_experts))
    biased = gate in ("deepseek_v3", "deepseek_v4", "quantile_balancing", "smebu", "k_means")
    scores, best = scores_of(gate, logits) + rule.bias if biased else logits, 2 if gate == "deepseek_v3" else 1
    if gate == "kolibri":
        scores = logits + rule.bias
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


def centroid_cosines(x: Any, centroids: Any) -> Any:
    """Cosines [E] of one token x [D] with the centroids [E,D] (Ahrac et al. 2026)."""
    xp = jnp if isinstance(x, jax.Array) else np
    return xp.stack([x @ centroid / xp.sqrt((x @ x) * (centroid @ centroid)) for centroid in centroids])


def zaya_logits(x: Any, router: Any, parts: Mapping[str, Any]) -> Any:
    """Logits [E+1] of one token x [D] in the lowest layer: the MLP of its projection (ZAYA1's released code)."""
    xp = jnp if isinstance(router, jax.Array) else np
    vector = parts["down"].T @ x + parts["down_bias"]
    hidden = vector / xp.sqrt(xp.mean(vector * vector) + 1e-5) * parts["norm.scale"]
    for name in ("first", "second"):
        z = parts[name].T @ hidden + parts[f"{name}_bias"]
        hidden = z * (1 + jax.scipy.special.erf(z / 2**0.5)) / 2
    return router.T @ hidden


def tied_router(router: Any, matrices: Any, length: float = 4.0) -> Any:
    """Columns [D,E] of a router tied to its experts: each is W·(Wᵀ·c) of the expert's matrix [D,F], at the length
    ``length``/√E (MPI 2026, equations 4 and 5; C′ = 4)."""
    xp = jnp if isinstance(router, jax.Array) else np
    powered = [matrix @ (matrix.T @ column) for column, matrix in zip(router.T, matrices, strict=True)]
    return xp.stack([length / len(powered) ** 0.5 * column / xp.sqrt(column @ column) for column in powered], axis=1)


def router_logits(gate: str, x: Any, router: Any, parts: Mapping[str, Any], rule: Rule = PLAIN) -> Any:
    """Logits of one token x [D] by the router of a gate, with the router's further arrays."""
    if gate == "zaya":
        logits = zaya_logits(x, router, parts)
    elif gate == "k_means":
        logits = centroid_cosines(x, parts["bias.centroids"])
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
