"""The routing rules of the papers, one pure function each: router logits to assignments, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.routing.interface import GateInputs, GateOutput
from moe.routing.selection import limit_to_groups, normalised_weights, pick, rank, top_k


def dense_mixture(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """All experts, weighted by the softmax: y = Σ_e p_e E_e(x) (Jacobs et al. 1991, equation 1)."""
    del inputs
    expert_index = jnp.broadcast_to(jnp.arange(router_logits.shape[-1]), router_logits.shape)
    return GateOutput(expert_index, jax.nn.softmax(router_logits, axis=-1))


def noisy_topk(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """softmax(KeepTopK(H, k)), H = x·W_g + N(0,1)·softplus(x·W_noise) (Shazeer 2017, equations 3-5).

    With noise, ``smooth_load`` is P(x,i), the probability that expert i stays chosen when only its own noise is drawn
    again (equations 8 and 9). Without a key, H = x·W_g.
    """
    k, num_experts = inputs.experts_per_token, router_logits.shape[-1]
    if inputs.rng is None or inputs.noise_logits is None:
        top_logits, expert_index = top_k(router_logits, k)
        return GateOutput(expert_index, jax.nn.softmax(top_logits, axis=-1))
    # If softplus underflows to 0, the quotient below and its gradient are NaN.
    deviation = jnp.maximum(jax.nn.softplus(inputs.noise_logits), 1e-9)
    noisy = router_logits + jax.random.normal(inputs.rng, router_logits.shape) * deviation
    # The threshold of a chosen expert is the (K+1)-th value, of any other the K-th; with K = E there is none.
    top_logits, top_index = top_k(noisy, min(k + 1, num_experts))
    expert_index, smooth_load = top_index[..., :k], None
    if k < num_experts:
        chosen = noisy >= top_logits[..., k - 1 : k]
        threshold = jnp.where(chosen, top_logits[..., k : k + 1], top_logits[..., k - 1 : k])
        smooth_load = jax.scipy.stats.norm.cdf((router_logits - threshold) / deviation)
    return GateOutput(expert_index, jax.nn.softmax(top_logits[..., :k], axis=-1), smooth_load=smooth_load)


def softmax_top_k(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """Top-k of the full softmax, not renormalised by default, so that the router has a gradient at K = 1
    (Switch 2021, equation 2; DeepSeekMoE 2024, equations 9-11). Groups are ranked by their best expert (DeepSeek-V2
    2024, section 2.2.2)."""
    probs = jax.nn.softmax(router_logits, axis=-1)
    _, expert_index = top_k(limit_to_groups(probs, inputs, scores_per_group=1), inputs.experts_per_token)
    return GateOutput(expert_index, normalised_weights(pick(probs, expert_index), inputs))


def softmax_sampled(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """K experts sampled from the softmax without replacement and weighted by it (Switch 2021, appendix C, "sample
    softmax").

    The sample is the top-k of logits + Gumbel noise (Gumbel-max trick), limited to groups as in
    :func:`softmax_top_k`. Without a key, the top-k.
    """
    probs = jax.nn.softmax(router_logits, axis=-1)
    noise = 0.0 if inputs.rng is None else jax.random.gumbel(inputs.rng, router_logits.shape)
    _, expert_index = top_k(
        limit_to_groups(router_logits + noise, inputs, scores_per_group=1), inputs.experts_per_token
    )
    return GateOutput(expert_index, normalised_weights(pick(probs, expert_index), inputs))


def gshard(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """Top-2, renormalised; the second assignment is sent if 2·g2 > U(0,1) (GShard 2020, algorithm 1).

    Without a key it is always sent. The first weight does not change when the second assignment is not sent.
    """
    top_probs, expert_index = top_k(jax.nn.softmax(router_logits, axis=-1), inputs.experts_per_token)
    weights = top_probs / jnp.sum(top_probs, axis=-1, keepdims=True)
    accepted = None
    if inputs.rng is not None:
        sent = 2.0 * weights[..., 1] > jax.random.uniform(inputs.rng, weights.shape[:-1])
        accepted = jnp.ones_like(expert_index, bool).at[..., 1].set(sent)
    return GateOutput(expert_index, weights, accepted)


#: Renormalised weight from which an assignment is always sent; value of the paper's code (ST-MoE 2022, appendix D).
ST_MOE_THRESHOLD = 0.2


def st_moe(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """Top-k, renormalised; assignments after the first are sent with probability min(1, weight / 0.2) (ST-MoE 2022,
    appendix D). Without a key all are sent."""
    top_probs, expert_index = top_k(jax.nn.softmax(router_logits, axis=-1), inputs.experts_per_token)
    weights = top_probs / jnp.sum(top_probs, axis=-1, keepdims=True)
    accepted = None
    if inputs.rng is not None:
        sent = weights > ST_MOE_THRESHOLD * jax.random.uniform(inputs.rng, weights.shape)
        accepted = sent.at[..., 0].set(True)
    return GateOutput(expert_index, weights, accepted)


def mixtral(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """Top-k of the logits, weighted by the softmax over those k: Softmax(TopK(x·W_g)) (Mixtral 2024, section 2.1)."""
    top_logits, expert_index = top_k(router_logits, inputs.experts_per_token)
    return GateOutput(expert_index, jax.nn.softmax(top_logits, axis=-1))


def deepseek_v3(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """Top-k of s + b within the kept groups, s the sigmoid of the logits and b the selection bias, weighted by s,
    renormalised and scaled (DeepSeek-V3 2024, equations 12-16).

    Groups are ranked by the sum of their two highest s + b (section 2.1.2). ``probs`` are s/Σs, as in the
    sequence-wise balance loss (equation 19).
    """
    scores = jax.nn.sigmoid(router_logits)
    biased = scores if inputs.selection_bias is None else scores + inputs.selection_bias
    _, expert_index = top_k(limit_to_groups(biased, inputs, scores_per_group=2), inputs.experts_per_token)
    probs = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
    return GateOutput(expert_index, normalised_weights(pick(scores, expert_index), inputs), probs=probs)


def expert_choice(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """Each expert takes the C tokens with its highest softmax probability (Expert Choice 2022, equations 1 and 2).

    A token may be taken by any number of experts, so the output has K = E, column e being expert e.
    """
    groups, tokens, num_experts = router_logits.shape
    capacity = inputs.expert_capacity or -(-inputs.experts_per_token * tokens // num_experts)
    probs = jax.nn.softmax(router_logits, axis=-1)
    # Padding ranks last: [G,S,E] → [G,E,S], ranked over S → [G,S,E]
    eligible = jnp.where(inputs.mask[..., None], jax.lax.stop_gradient(probs), -1.0)
    taken = jnp.swapaxes(rank(jnp.swapaxes(eligible, 1, 2)), 1, 2) < capacity
    expert_index = jnp.broadcast_to(jnp.arange(num_experts), (groups, tokens, num_experts))
    return GateOutput(expert_index, probs, taken)


def hash_tokens(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
    """K experts by a hash of the token id, weighted equally (Hash Layers 2021, section 3).

    The hash is murmur3's finalizer over (id, expert); an id goes to the experts with its K highest hashes.
    """
    if inputs.token_ids is None:
        raise ValueError("the gate 'hash' routes by token id and needs token_ids")
    _, expert_index = top_k(_hashes(inputs.token_ids, router_logits.shape[-1]), inputs.experts_per_token)
    return _equal_weights(expert_index)


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

    Weights are the softmax over the chosen logits, so the router is computed and trained but does not choose.
    """
    groups, tokens, num_experts = router_logits.shape
    k = inputs.experts_per_token
    token_number = inputs.positions
    if token_number is None:
        token_number = jnp.cumsum(inputs.mask, axis=1) - 1 + tokens * jnp.arange(groups)[:, None]  # [G,S]
    expert_index = (token_number[..., None] * k + jnp.arange(k)) % num_experts
    return GateOutput(expert_index, jax.nn.softmax(pick(router_logits, expert_index), axis=-1))


def _equal_weights(expert_index: Int[Array, "G S K"]) -> GateOutput:
    return GateOutput(expert_index, jnp.full(expert_index.shape, 1.0 / expert_index.shape[-1], jnp.float32))
