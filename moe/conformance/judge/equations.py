"""The equations of a top-k MoE layer, in float64, for any weights and inputs; independent of this package's layers.

Choices, capacity and drops are decided token by token in NumPy. The output and the losses are computed in JAX with
those decisions as constants, and differentiated.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .rule import Activation, Layer, Rule, Score, Variant

_EXACT_GELU = functools.partial(jax.nn.gelu, approximate=False)
#: JAX's GELU is the approximation by tanh; PyTorch's is exact, by erf.
ACTIVATIONS = {
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
    "geglu_exact": _EXACT_GELU,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "gelu": jax.nn.gelu,
    "gelu_exact": _EXACT_GELU,
}


@dataclasses.dataclass(frozen=True)
class Decisions:
    """Discrete results of routing.

    Attributes:
        expert_index: [G,S,K], first choice first.
        kept: [G,S,K] bool, of a token that is computed and not dropped.
    """

    expert_index: np.ndarray
    kept: np.ndarray


def capacity(rule: Rule, variant: Variant, tokens: int, num_experts: int) -> int:
    """C of one expert in a group of S tokens; 0: none."""
    if not rule.capacity_factor:
        return 0
    exact = rule.capacity_factor * (1 if variant.capacity_without_k else rule.k) * tokens / num_experts
    return max(1, math.ceil(exact - 1e-9) if variant.rounding == "up" else math.floor(exact + 1e-9))


def decide(rule: Rule, variant: Variant, layer: Layer) -> Decisions:
    """Choose experts token by token, then fill the buffers: all first choices, then all second choices."""
    logits = layer.router_logits(variant)
    scores = np.asarray(_scores(rule.score, jnp.asarray(logits)))
    bias = layer.bias if layer.bias is not None and variant.bias_in_choice else 0.0
    ranked = (logits if variant.bias_on_logits else scores) + bias
    groups, tokens, num_experts = scores.shape
    index = np.zeros((groups, tokens, rule.k), int)
    for g, s in np.ndindex(groups, tokens):
        index[g, s] = _choose(rule, variant, ranked[g, s])
    real = layer.mask | variant.routes_padding
    kept = np.broadcast_to(real[..., None], index.shape).copy()
    limit = capacity(rule, variant, tokens, num_experts)
    for g in range(groups if limit else 0):
        taken = np.zeros(num_experts, int)
        pairs = [(s, c) for c in range(rule.k) for s in range(tokens)]
        for s, choice in sorted(pairs) if variant.token_order else pairs:
            if real[g, s]:
                expert = index[g, s, choice]
                kept[g, s, choice] = taken[expert] < limit
                taken[expert] += 1
    return Decisions(index, kept if variant.computes_padding else kept & layer.mask[..., None])


def _choose(rule: Rule, variant: Variant, ranked: np.ndarray) -> list[int]:
    """The K best experts of one token among its best groups, the lower index first among equals."""
    size = len(ranked) // rule.groups
    members = [range(g * size, (g + 1) * size) for g in range(rule.groups)]
    worth = [sum(sorted((ranked[e] for e in group), reverse=True)[: rule.scores_per_group]) for group in members]
    best = sorted(range(rule.groups), key=lambda g: (-worth[g], g))[: rule.kept_groups]
    if variant.zero_outside_groups:
        kept = {e for g in best for e in members[g]}
        return sorted(range(len(ranked)), key=lambda e: (-ranked[e] if e in kept else 0.0, e))[: rule.k]
    return sorted((e for g in best for e in members[g]), key=lambda e: (-ranked[e], e))[: rule.k]


def _scores(score: Score, logits: jax.Array) -> jax.Array:
    if score == "softmax":
        return jax.nn.softmax(logits, axis=-1)
    return jax.nn.sigmoid(logits) if score == "sigmoid" else jnp.sqrt(jax.nn.softplus(logits))


def compute(rule: Rule, variant: Variant, layer: Layer) -> dict[str, np.ndarray]:
    """Compute every quantity in which a layer of this rule can be compared.

    Returns:
        ``expert_index`` and ``kept`` [G,S,K], ``combine`` [G,S,E] (0 where an expert is not applied), ``outputs``
        [G,S,E,D] (every expert on every token), ``y`` [G,S,D], ``balance_loss`` (1 at perfect balance), ``z_loss``
        and, with a cotangent, ``grad_x``, ``grad_router``, ``grad_up``, ``grad_gate`` and ``grad_down``.
    """
    with jax.enable_x64(True):
        decisions = decide(rule, variant, layer)
        arrays = {name: jnp.asarray(array) for name, array in layer.weights.items()}
        cotangent = layer.cotangent

        def objective(arrays: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
            results = forward(rule, variant, layer, decisions, arrays)
            total = rule.balance_weight * results["balance_loss"] + rule.z_weight * results["z_loss"]
            return total + (0.0 if cotangent is None else jnp.sum(results["y"] * cotangent)), results

        if cotangent is None:
            gradients, results = {}, objective(arrays)[1]
        else:
            gradients, results = jax.grad(objective, has_aux=True)(arrays)
        results |= {f"grad_{name}": gradient for name, gradient in gradients.items()}
        results |= {"expert_index": decisions.expert_index, "kept": decisions.kept}
        return {name: np.asarray(value) for name, value in results.items()}


def forward(
    rule: Rule, variant: Variant, layer: Layer, decisions: Decisions, arrays: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Output and losses, differentiable in ``arrays``."""
    num_experts = layer.num_experts
    logits = weighing = jnp.asarray(layer.router_logits(variant))
    if layer.logits is None:
        x = jax.lax.stop_gradient(arrays["x"]) if variant.detached_input else arrays["x"]
        router = jax.lax.stop_gradient(arrays["router"]) if variant.detached_router else arrays["router"]
        bias = arrays.get("router_bias", 0.0)
        logits, weighing = (
            _with_gradient(logits, x @ arrays["router"] + bias),
            _with_gradient(logits, x @ router + bias),
        )
    scores = _scores(rule.score, logits)
    one_hot = jax.nn.one_hot(decisions.expert_index, num_experts, dtype=scores.dtype)  # [G,S,K,E]
    source = weighing if variant.logits_as_weights else _scores(rule.score, weighing)
    source = source + (0.0 if layer.bias is None or not variant.bias_in_weights else layer.bias)
    weights = _weights(rule, variant, jnp.einsum("gske,gse->gsk", one_hot, source), decisions.kept)
    combine = jnp.einsum("gsk,gske->gse", weights * decisions.kept, one_hot)
    combine = jnp.roll(combine, variant.expert_shift, axis=-1)
    outputs = _experts(rule, variant, arrays, jnp.ones_like(combine))
    if variant.weighs_input:
        y = jnp.einsum("gse,gsed->gsd", (combine != 0) * 1.0, _experts(rule, variant, arrays, combine))
    else:
        y = jnp.einsum("gse,gsed->gsd", combine, outputs)
    losses = _losses(rule, variant, layer, decisions, logits, scores, combine, one_hot)
    return {"y": y, "combine": combine, "outputs": outputs, **losses}


def _with_gradient(value: jax.Array, exact: jax.Array) -> jax.Array:
    """The value with the gradient of the exact product, since rounding has no gradient."""
    return value + exact - jax.lax.stop_gradient(exact)


def _weights(rule: Rule, variant: Variant, chosen: jax.Array, kept: np.ndarray) -> jax.Array:
    """[G,S,K] weights of the chosen scores."""
    if rule.renormalise or variant.renormalises_kept:
        counted = chosen * kept if variant.renormalises_kept else chosen
        total = jnp.sum(counted, axis=-1, keepdims=True)
        total = jnp.where(total == 0, 1.0, total)
        chosen = chosen / (jax.lax.stop_gradient(total) if variant.router_gradient.startswith("constant") else total)
    return rule.scale * (jax.lax.stop_gradient(chosen) if variant.router_gradient == "none" else chosen)


def _experts(rule: Rule, variant: Variant, arrays: Mapping[str, Any], factor: jax.Array) -> jax.Array:
    """[G,S,E,D]: every expert on factor [G,S,E] times x."""
    rows = factor[..., None] * arrays["x"][:, :, None]
    up = jnp.einsum("gsed,edf->gsef", rows, arrays["up"]) + arrays.get("up_bias", 0.0)
    if "gate" not in arrays:
        hidden = ACTIVATIONS[rule.activation](up)
    else:
        gate = jnp.einsum("gsed,edf->gsef", rows, arrays["gate"]) + arrays.get("gate_bias", 0.0)
        hidden = _gated(rule.activation, up, gate) if variant.swapped else _gated(rule.activation, gate, up)
    return jnp.einsum("gsef,efd->gsed", hidden, arrays["down"]) + arrays.get("down_bias", 0.0)


def _gated(activation: Activation, gate: jax.Array, up: jax.Array) -> jax.Array:
    """act(gate) · up; gpt-oss (OpenAI 2025, released code): gate · σ(1.702 gate) · (up + 1) of values clamped at 7."""
    if activation == "gpt_oss":
        gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
        return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1.0)
    return ACTIVATIONS[activation](gate) * up


def _losses(
    rule: Rule,
    variant: Variant,
    layer: Layer,
    decisions: Decisions,
    logits: jax.Array,
    scores: jax.Array,
    combine: jax.Array,
    one_hot: jax.Array,
) -> dict[str, jax.Array]:
    """E · Σ f_e P_e with f the share of the assignments (Switch 2021, equations 4-6), and the mean squared
    logsumexp (ST-MoE 2022, equation 5)."""
    num_experts = layer.num_experts
    real = (jnp.ones_like(layer.mask) if variant.balance_padding else jnp.asarray(layer.mask)).reshape(-1) * 1.0
    counted = {"all": one_hot.sum(2), "first": one_hot[:, :, 0], "kept": (one_hot * decisions.kept[..., None]).sum(2)}
    counts = counted[variant.balance_counts].reshape(-1, num_experts) * real[:, None]
    probs = combine if variant.balance_probs == "weights" else scores / scores.sum(-1, keepdims=True)
    if variant.balance_softmax:
        probs = logits
        for _ in range(variant.balance_softmax):
            probs = jax.nn.softmax(probs, axis=-1)
        counts = jax.nn.one_hot(jax.lax.top_k(logits, rule.k)[1], num_experts, dtype=probs.dtype).sum(2)
        counts = counts.reshape(-1, num_experts) * real[:, None]
    probs = probs.reshape(-1, num_experts) * real[:, None]

    def balance(counts: jax.Array, probs: jax.Array, real: jax.Array) -> jax.Array:
        tokens = jnp.maximum(real.sum(), 1.0)
        per_token = 1 if variant.balance_counts == "first" else rule.k
        return num_experts * jnp.sum(counts.sum(0) / (per_token * tokens) * probs.sum(0) / tokens)

    shards = variant.balance_shards
    parts = [jnp.reshape(array, (shards, -1, *array.shape[1:])) for array in (counts, probs, real)]
    squares = jax.nn.logsumexp(scores if variant.z_of_scores else logits, axis=-1).reshape(-1) ** 2
    return {
        "balance_loss": jnp.mean(jax.vmap(balance)(*parts)),
        "z_loss": jnp.sum(squares * real) / jnp.maximum(real.sum(), 1.0),
    }
