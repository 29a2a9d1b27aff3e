"""The routing rules of the papers, one pure function each: router logits to assignments, in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.routing.interface import GateInputs, GateOutput
from moe.routing.selection import limit_to_groups, normalised_weights, pick, rank, top_k

#: Score functions by name. The last one is DeepSeek-V4's; its square root has no finite slope at 0.
SCORES = {
    "softmax": functools.partial(jax.nn.softmax, axis=-1),
    "sigmoid": jax.nn.sigmoid,
    "sqrt_softplus": lambda logits: jnp.sqrt(jnp.maximum(jax.nn.softplus(logits), 1e-30)),
}


def dense_mixture(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """All experts, weighted by the softmax: y = Σ_e p_e E_e(x) (Jacobs et al. 1991, equation 1)."""
    del inputs
    return GateOutput(_every_expert(router_logits), jax.nn.softmax(router_logits, axis=-1))


def top_k_scores(
    router_logits: Float[Array, "G S E"], inputs: GateInputs, preference: Float[Array, "G S E"] | None = None
) -> GateOutput:
    """Top-k of scores + selection bias within the kept groups, weighted by the scores: every top-k gate.

    Scores, bias, groups, renormalisation and scale are fields of :class:`GateInputs`. With the softmax: Switch (2021,
    equation 2), DeepSeekMoE (2024, equations 9-11; groups: DeepSeek-V2 2024, section 2.2.2); renormalised, that is
    Mixtral's softmax over the top k logits (2024, section 2.1). With the sigmoid: DeepSeek-V3 (2024, equations 12-16).

    Args:
        router_logits: of all experts.
        inputs: its ``selection_bias`` decides nothing but the choice.
        preference: ranks the experts instead of the scores.
    """
    scores = SCORES[inputs.score_function](router_logits)
    ranked = scores if preference is None else preference
    if inputs.selection_bias is not None:
        ranked = ranked + inputs.selection_bias
    k, needed = inputs.experts_per_token, None
    if inputs.train and inputs.bias_update == "quantile":
        # An expert is chosen if score + bias is above the best ranked expert that is not.
        values, expert_index = top_k(ranked, k + 1)
        expert_index, needed = expert_index[..., :k], jax.lax.stop_gradient(values[..., k:] - scores)
    else:
        _, expert_index = top_k(limit_to_groups(ranked, inputs), k)
    return _weighted(router_logits, inputs, expert_index)._replace(needed_bias=needed)


def _weighted(
    router_logits: Float[Array, "G S E"], inputs: GateInputs, expert_index: Int[Array, "G S K"]
) -> GateOutput:
    """Weights of experts (or of the recorded ones) by their scores; ``probs`` are the scores over their sum."""
    expert_index = expert_index if inputs.expert_index is None else inputs.expert_index
    scores = SCORES[inputs.score_function](router_logits)
    probs = None if inputs.score_function == "softmax" else scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
    return GateOutput(expert_index, normalised_weights(pick(scores, expert_index), inputs), probs=probs)


def noisy_topk(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """softmax(KeepTopK(H, k)), H = x·W_g + N(0,1)·softplus(x·W_noise) (Shazeer 2017, equations 3-5).

    With noise, ``smooth_load`` is P(x,i), the probability that expert i stays chosen when only its own noise is drawn
    again (equations 8 and 9). Without a key, H = x·W_g.
    """
    k, num_experts = inputs.experts_per_token, router_logits.shape[-1]
    if inputs.rng is None or inputs.noise_logits is None:
        return top_k_scores(router_logits, inputs)
    # If softplus underflows to 0, the quotient below and its gradient are NaN.
    deviation = jnp.maximum(jax.nn.softplus(inputs.noise_logits), 1e-9)
    noisy = router_logits + jax.random.normal(inputs.rng, router_logits.shape) * deviation
    if k == num_experts:
        return top_k_scores(noisy, inputs)
    # The threshold of a chosen expert is the (K+1)-th value, of any other the K-th; with K = E there is none.
    top_logits, _ = top_k(noisy, k + 1)
    chosen = noisy >= top_logits[..., k - 1 : k]
    threshold = jnp.where(chosen, top_logits[..., k : k + 1], top_logits[..., k - 1 : k])
    smooth_load = jax.scipy.stats.norm.cdf((router_logits - threshold) / deviation)
    return top_k_scores(noisy, inputs)._replace(smooth_load=smooth_load)


def sampled(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """K experts sampled from the softmax without replacement and weighted by it (Switch 2021, appendix C, "sample
    softmax").

    The sample is the top-k of logits + Gumbel noise (Gumbel-max trick), limited to groups. Without a key, the top-k.
    """
    noise = 0.0 if inputs.rng is None else jax.random.gumbel(inputs.rng, router_logits.shape)
    return top_k_scores(router_logits, inputs, router_logits + noise)


def gshard(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """Top-2, renormalised; the second assignment is sent if 2·g2 > U(0,1) (GShard 2020, algorithm 1).

    Without a key it is always sent. The first weight does not change when the second assignment is not sent.
    """
    output = top_k_scores(router_logits, inputs)
    if inputs.rng is None:
        return output
    sent = 2.0 * _shares(output.weights)[..., 1] > jax.random.uniform(inputs.rng, output.weights.shape[:-1])
    return output._replace(accepted=jnp.ones_like(output.expert_index, bool).at[..., 1].set(sent))


#: Renormalised weight from which an assignment is always sent; value of the paper's code (ST-MoE 2022, appendix D).
ST_MOE_THRESHOLD = 0.2


def st_moe(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """Top-k, renormalised; assignments after the first are sent with probability min(1, weight / 0.2) (ST-MoE 2022,
    appendix D). Without a key all are sent."""
    output = top_k_scores(router_logits, inputs)
    if inputs.rng is None:
        return output
    sent = _shares(output.weights) > ST_MOE_THRESHOLD * jax.random.uniform(inputs.rng, output.weights.shape)
    return output._replace(accepted=sent.at[..., 0].set(True))


def _shares(weights: Float[Array, "G S K"]) -> Float[Array, "G S K"]:
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def relu(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """Every expert with a positive logit, weighted by it: ReLU(x·W_g) (ReMoE 2024, section 3.1).

    K is the mean number of experts that the adaptive penalty aims at.
    """
    del inputs
    weights = jax.nn.relu(router_logits)
    probs = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return GateOutput(_every_expert(router_logits), weights, weights > 0, probs)


def expert_choice(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """Each expert takes the C tokens with its highest softmax probability (Expert Choice 2022, equations 1 and 2).

    A token may be taken by any number of experts, so the output has K = E, column e being expert e.
    """
    _, tokens, num_experts = router_logits.shape
    capacity = inputs.expert_capacity or -(-inputs.experts_per_token * tokens // num_experts)
    probs = jax.nn.softmax(router_logits, axis=-1)
    # Padding ranks last: [G,S,E] → [G,E,S], ranked over S → [G,S,E]
    eligible = jnp.where(inputs.mask[..., None], jax.lax.stop_gradient(probs), -1.0)
    taken = jnp.swapaxes(rank(jnp.swapaxes(eligible, 1, 2)), 1, 2) < capacity
    return GateOutput(_every_expert(router_logits), probs, taken)


def expert_threshold(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """Expert choice in training; outside, a token goes to every expert whose threshold its probability exceeds, so that
    no token depends on another (Expert Threshold Routing 2026, the cut-offs' moving average).

    The selection bias is minus the thresholds.
    """
    output = expert_choice(router_logits, inputs)
    if inputs.train:
        return output._replace(needed_bias=-jax.lax.stop_gradient(output.weights))
    bias = 0.0 if inputs.selection_bias is None else inputs.selection_bias
    return output._replace(accepted=output.weights + bias > 0)


def _every_expert(router_logits: Float[Array, "G S E"]) -> Int[Array, "G S E"]:
    return jnp.broadcast_to(jnp.arange(router_logits.shape[-1]), router_logits.shape)


def hash_tokens(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """K experts by a hash of the token id, weighted equally (Hash Layers 2021, section 3).

    The hash is murmur3's finalizer over (id, expert); an id goes to the experts with its K highest hashes.
    """
    return _equal_weights(_hashed_experts(router_logits, inputs))


def hash_scored(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """K experts by a hash of the token id, weighted by their scores, as in the first layers of DeepSeek-V4.

    Deviation: V4's released weights hold a table from token ids to experts; how it was made is not published.
    """
    return _weighted(router_logits, inputs, _hashed_experts(router_logits, inputs))


def _hashed_experts(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> Int[Array, "G S K"]:
    if inputs.token_ids is None:
        raise ValueError("a gate that routes by token id needs token_ids")
    return top_k(_hashes(inputs.token_ids, router_logits.shape[-1]), inputs.experts_per_token)[1]


def _hashes(numbers: Int[Array, "G S"], num_experts: int) -> Float[Array, "G S E"]:
    """A hash of (number, expert) for every expert, from 0 to 2^24."""
    keys = numbers[..., None].astype(jnp.uint32) * num_experts + jnp.arange(num_experts, dtype=jnp.uint32)
    h = keys + jnp.uint32(0x9E3779B9)
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        h = (h ^ (h >> 16)) * jnp.uint32(factor)
    # float32 represents 24 bits exactly.
    return ((h ^ (h >> 16)) >> 8).astype(jnp.float32)


def random_experts(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """K experts drawn uniformly for each token, weighted equally: a baseline.

    Without a key the draw is always the same; when generating, it is a hash of each token's position.
    """
    if inputs.rng is None and inputs.positions is not None:
        scores = _hashes(inputs.positions, router_logits.shape[-1])
    else:
        rng = jax.random.key(0) if inputs.rng is None else inputs.rng
        scores = jax.random.uniform(rng, router_logits.shape)
    _, expert_index = top_k(scores, inputs.experts_per_token)
    return _equal_weights(expert_index)


def balanced(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """K experts per real token, round-robin within a group, or by position when generating: equal loads for benchmarks.

    Weights are those of a top-k gate, so the router is computed and trained but does not choose.
    """
    groups, tokens, num_experts = router_logits.shape
    k = inputs.experts_per_token
    token_number = inputs.positions
    if token_number is None:
        token_number = jnp.cumsum(inputs.mask, axis=1) - 1 + tokens * jnp.arange(groups)[:, None]  # [G,S]
    expert_index = (token_number[..., None] * k + jnp.arange(k)) % num_experts
    return _weighted(router_logits, inputs, expert_index)


def _equal_weights(expert_index: Int[Array, "G S K"]) -> GateOutput:
    return GateOutput(expert_index, jnp.full(expert_index.shape, 1.0 / expert_index.shape[-1], jnp.float32))
