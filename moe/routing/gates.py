"""The routing rules of the papers: each is a frozen dataclass with the fields that it reads, and runs in float32."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.routing.balancing_rules import BalancingRule, Penalty, Threshold
from moe.routing.interface import (
    Gate,
    GateInputs,
    GateOutput,
    RouterKind,
    Scored,
    Selecting,
    normalised,
    pick,
    rank,
    top_k,
)
from moe.system.fields import require, setting


def require_weights_that_differ(k: int, renormalise: bool) -> None:
    """Refuse to divide a token's only weight by itself."""
    always_one = "the only weight is then always 1 and the router gets no gradient; use False or a k above 1"
    require(k > 1 or not renormalise, "model.moe.gate.k=1, renormalise", renormalise, always_one)


# --- Top-k of scores --------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(Selecting):
    """Top-k of the scores.

    With the softmax: Switch (2021, equation 2), DeepSeekMoE (2024, equations 9-11; groups: DeepSeek-V2 2024, section
    2.2.2); renormalised, that is Mixtral's softmax over the top k logits (2024, section 2.1). With the sigmoid and a
    bias: DeepSeek-V3 (2024, equations 12-16).
    """

    k: int = setting(2, least=1)  # K, experts per token

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weights_that_differ(self.k, self.renormalise)

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Select by score, bias and groups."""
        return self.select(router_logits, inputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyTopK(TopK):
    """softmax(KeepTopK(H, k)), H = x·W_g + N(0,1)·softplus(x·W_noise) (Shazeer 2017, equations 3-5)."""

    router: ClassVar[RouterKind] = "noisy"

    k: int = setting(4, least=1)
    renormalise: bool = True

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """With noise, ``smooth_load`` is P(x,i), the probability that expert i stays chosen when only its own noise is
        drawn again (equations 8 and 9). Without a key, H = x·W_g."""
        k, num_experts = self.k, router_logits.shape[-1]
        if inputs.rng is None or inputs.noise_logits is None:
            return self.select(router_logits, inputs)
        # If softplus underflows to 0, the quotient below and its gradient are NaN.
        deviation = jnp.maximum(jax.nn.softplus(inputs.noise_logits), 1e-9)
        noisy = router_logits + jax.random.normal(inputs.rng, router_logits.shape) * deviation
        output = self.select(noisy, inputs)
        output = output._replace(probs=normalised(self.scores(noisy)))
        if k == num_experts:
            return output
        # The threshold of a chosen expert is the (K+1)-th value, of any other the K-th; with K = E there is none.
        top_logits, _ = top_k(noisy, k + 1)
        chosen = noisy >= top_logits[..., k - 1 : k]
        threshold = jnp.where(chosen, top_logits[..., k : k + 1], top_logits[..., k - 1 : k])
        smooth_load = jax.scipy.stats.norm.cdf((router_logits - threshold) / deviation)
        return output._replace(smooth_load=smooth_load)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledTopK(TopK):
    """K experts sampled from the softmax without replacement and weighted by it (Switch 2021, appendix C, "sample
    softmax")."""

    biases_logits: ClassVar[bool] = True

    k: int = setting(1, least=1)

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Top-k of logits + Gumbel noise (Gumbel-max trick), limited to groups. Without a key, the top-k."""
        noise = 0.0 if inputs.rng is None else jax.random.gumbel(inputs.rng, router_logits.shape)
        return self.select(router_logits, inputs, router_logits + noise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GShard(Selecting):
    """Top-2, renormalised; the second assignment is sent if 2·g2 > U(0,1) (GShard 2020, algorithm 1)."""

    k: ClassVar[int] = 2

    renormalise: bool = True

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Without a key the second assignment is always sent. If it is not sent, the first weight stays the same."""
        output = self.select(router_logits, inputs)
        if inputs.rng is None:
            return output
        sent = 2.0 * _shares(output.weights)[..., 1] > jax.random.uniform(inputs.rng, output.weights.shape[:-1])
        return output._replace(accepted=jnp.ones_like(output.expert_index, bool).at[..., 1].set(sent))


@dataclasses.dataclass(frozen=True, kw_only=True)
class STMoE(TopK):
    """Top-k, renormalised; assignments after the first are sent with probability min(1, weight / 0.2) (ST-MoE 2022,
    appendix D)."""

    #: Renormalised weight from which an assignment is always sent; value of the paper's code.
    threshold: ClassVar[float] = 0.2

    renormalise: bool = True

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Without a key all are sent."""
        output = self.select(router_logits, inputs)
        if inputs.rng is None:
            return output
        sent = _shares(output.weights) > self.threshold * jax.random.uniform(inputs.rng, output.weights.shape)
        return output._replace(accepted=sent.at[..., 0].set(True))


def _shares(weights: Float[Array, "G S K"]) -> Float[Array, "G S K"]:
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseMixer(Gate):
    """Two experts, chosen one after the other, each weighted by a softmax over the experts near the best remaining one
    (SparseMixer-v2: GRIN 2024, section 2.2 and Phi-3.5-MoE's released code)."""

    k: ClassVar[int] = 2
    reweighs: ClassVar[bool] = True

    #: r; an expert is near if its logit is at most 2r·max(|logit|, best logit) below the best
    tolerance: float = setting(0.01, least=0, most=1e6)

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Sample from the near experts; without a key take the best."""
        left = router_logits
        index = []
        weights = []
        keys = (None, None) if inputs.rng is None else jax.random.split(inputs.rng)
        for i, key in enumerate(keys):
            near = jnp.where(self._is_far(router_logits, left), -jnp.inf, left)
            probs, draws = jax.nn.softmax(near, axis=-1), None if key is None else jax.random.split(key)
            noise = 0.0 if draws is None else jax.random.gumbel(draws[0], near.shape)
            expert = top_k(near + noise, 1)[1] if inputs.expert_index is None else inputs.expert_index[..., i : i + 1]
            weight = pick(probs, expert)
            if draws is not None:
                whole = (expert == top_k(near, 1)[1]) | (jax.random.uniform(draws[1], weight.shape) > 0.75)
                # Heun's third-order method: the gradient is the probability's, the value sometimes a third of it.
                weight = weight + jax.lax.stop_gradient(jnp.where(whole, 0.0, -2 / 3) * weight)
            left = jnp.where(expert == jnp.arange(near.shape[-1]), -jnp.inf, left)
            index, weights = [*index, expert], [*weights, weight]
        return GateOutput(jnp.concatenate(index, axis=-1), jnp.concatenate(weights, axis=-1))

    def _is_far(self, router_logits: Float[Array, "G S E"], left: Float[Array, "G S E"]) -> Bool[Array, "G S E"]:
        logits, best = jax.lax.stop_gradient((router_logits, jnp.max(left, axis=-1, keepdims=True)))
        return (best - logits) / jnp.maximum(jnp.abs(logits), best) > 2 * self.tolerance


# --- Every expert -----------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseMixture(Gate):
    """All experts, weighted by the softmax: y = Σ_e p_e E_e(x) (Jacobs et al. 1991, equation 1)."""

    lists_all: ClassVar[bool] = True
    reweighs: ClassVar[bool] = True

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Weigh all experts."""
        index = every_expert(router_logits, inputs)
        return GateOutput(index, pick(jax.nn.softmax(router_logits, axis=-1), index))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftMoE(Gate):
    """Every slot of every expert is a mix of all tokens (Soft MoE 2023, equations 1-3). The layer does the mixing; the
    rule computes the weights that the layer reports."""

    layer: ClassVar[str] = "moe.layers.soft_moe:SoftMoE"
    looks_ahead: ClassVar[bool] = True
    lists_all: ClassVar[bool] = True

    slots: int = setting(1, least=1, most=2**16)  # of every expert

    @property
    def slots_per_expert(self) -> int:
        """The slots."""
        return self.slots

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Weigh all experts by the softmax."""
        return GateOutput(every_expert(router_logits, inputs), jax.nn.softmax(router_logits, axis=-1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReLU(Gate):
    """Every expert with a positive logit, weighted by it: ReLU(x·W_g) (ReMoE 2024, section 3.1)."""

    lists_all: ClassVar[bool] = True
    reweighs: ClassVar[bool] = True

    k: int = setting(1, least=1)  # mean number of experts that the adaptive penalty aims at
    penalty_rate: float = setting(0.2, least=0, most=1e6)  # the penalty is multiplied by (1 + rate)^±1 a step

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Weigh by the logits above 0."""
        positive, index = jax.nn.relu(router_logits), every_expert(router_logits, inputs)
        weights = pick(positive, index)
        return GateOutput(index, weights, weights > 0, normalised(positive))

    @property
    def balancing(self) -> BalancingRule:
        """The rule of the sparsity penalty's strength."""
        return Penalty(self.penalty_rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertChoice(Gate):
    """Each expert takes the C tokens with its highest softmax probability (Expert Choice 2022, equations 1 and 2).

    A token may be taken by any number of experts, so the output has a column for each expert.
    """

    looks_ahead: ClassVar[bool] = True
    experts_choose: ClassVar[bool] = True
    lists_all: ClassVar[bool] = True
    reweighs: ClassVar[bool] = True

    k: int = setting(2, least=1)  # experts per token on average: C = capacity factor · K·S/E

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Rank the tokens of each expert."""
        _, tokens, num_experts = router_logits.shape
        capacity = inputs.expert_capacity or -(-self.k * tokens // num_experts)
        probs = jax.nn.softmax(router_logits, axis=-1)
        # Padding ranks last: [G,S,E] → [G,E,S], ranked over S → [G,S,E]
        eligible = jnp.where(inputs.mask[..., None], jax.lax.stop_gradient(probs), -1.0)
        taken = jnp.swapaxes(rank(jnp.swapaxes(eligible, 1, 2)), 1, 2) < capacity
        index = every_expert(router_logits, inputs)
        return GateOutput(index, pick(probs, index), jnp.take_along_axis(taken, index, axis=-1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertThreshold(ExpertChoice):
    """Expert choice in training; otherwise a token goes to every expert whose threshold its probability exceeds, so no
    token depends on another (Expert Threshold Routing 2026; thresholds are moving averages of the cut-offs)."""

    threshold_rate: float = setting(0.05, least=0, most=1e6)  # of the moving average; not from a paper

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Apply the thresholds; the selection bias holds them negated."""
        output = super().route(router_logits, inputs)
        if inputs.train:
            return output._replace(needed_bias=-jax.lax.stop_gradient(jax.nn.softmax(router_logits, axis=-1)))
        if inputs.selection_bias is None:
            return output._replace(accepted=output.weights > 0)
        bias = jnp.broadcast_to(inputs.selection_bias, router_logits.shape)
        return output._replace(accepted=output.weights + pick(bias, output.expert_index) > 0)

    @property
    def balancing(self) -> BalancingRule:
        """The rule of the thresholds."""
        return Threshold(self.threshold_rate)


def every_expert(router_logits: Float[Array, "G S E"], inputs: GateInputs) -> Int[Array, "G S E"]:
    """All experts of a token, in the recorded order if there is one."""
    if inputs.expert_index is not None:
        return inputs.expert_index
    return jnp.broadcast_to(jnp.arange(router_logits.shape[-1]), router_logits.shape)


# --- Without a choice by logits ---------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Hash(Gate):
    """K experts by a hash of the token id, weighted equally (Hash Layers 2021, section 3).

    The hash is murmur3's finalizer, but with every shift by 16, over (id, expert); an id goes to the experts with its K
    highest hashes.
    """

    router: ClassVar[RouterKind] = "none"
    reweighs: ClassVar[bool] = True

    k: int = setting(1, least=1)

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Look up the experts of each id."""
        return _equal_weights(_hashed_experts(router_logits, inputs, self.k))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredHash(Scored):
    """K experts by a hash of the token id, weighted by their scores, as in the first layers of DeepSeek-V4.

    Deviation: V4's released weights hold a table from token ids to experts; how it was made is not published.
    """

    chooses: ClassVar[bool] = False

    k: int = setting(6, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weights_that_differ(self.k, self.renormalise)

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Look up the experts of each id and weigh them."""
        return self.weigh(router_logits, inputs, _hashed_experts(router_logits, inputs, self.k))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(Gate):
    """K experts drawn uniformly for each token, weighted equally: a baseline."""

    router: ClassVar[RouterKind] = "none"
    reweighs: ClassVar[bool] = True

    k: int = setting(1, least=1)

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Without a key the draw is always the same; when generating, it is a hash of each token's position."""
        if inputs.rng is None and inputs.positions is not None:
            scores = _hashes(inputs.positions, router_logits.shape[-1])
        else:
            rng = jax.random.key(0) if inputs.rng is None else inputs.rng
            scores = jax.random.uniform(rng, router_logits.shape)
        return _equal_weights(top_k(scores, self.k)[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balanced(Scored):
    """K experts per real token, round-robin within a group, or by position when generating: equal loads for benchmarks.

    Weights are those of a top-k gate, so the router is computed and trained but does not choose. With k=1 a
    renormalised weight is always 1, and the router gets no gradient; this gate, unlike others, accepts that.
    """

    chooses: ClassVar[bool] = False

    k: int = setting(1, least=1)
    renormalise: bool = True

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Assign experts round-robin."""
        groups, tokens, num_experts = router_logits.shape
        token_number = inputs.positions
        if token_number is None:
            token_number = jnp.cumsum(inputs.mask, axis=1) - 1 + tokens * jnp.arange(groups)[:, None]  # [G,S]
        expert_index = (token_number[..., None] * self.k + jnp.arange(self.k)) % num_experts
        return self.weigh(router_logits, inputs, expert_index)


def _hashed_experts(router_logits: Float[Array, "G S E"], inputs: GateInputs, k: int) -> Int[Array, "G S K"]:
    if inputs.token_ids is None:
        raise ValueError("a gate that routes by token id needs token_ids")
    return top_k(_hashes(inputs.token_ids, router_logits.shape[-1]), k)[1]


def _hashes(numbers: Int[Array, "G S"], num_experts: int) -> Float[Array, "G S E"]:
    """A hash of (number, expert) for every expert, from 0 to 2^24."""
    keys = numbers[..., None].astype(jnp.uint32) * num_experts + jnp.arange(num_experts, dtype=jnp.uint32)
    h = keys + jnp.uint32(0x9E3779B9)
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        h = (h ^ (h >> 16)) * jnp.uint32(factor)
    # float32 represents 24 bits exactly.
    return ((h ^ (h >> 16)) >> 8).astype(jnp.float32)


def _equal_weights(expert_index: Int[Array, "G S K"]) -> GateOutput:
    return GateOutput(expert_index, jnp.full(expert_index.shape, 1.0 / expert_index.shape[-1], jnp.float32))
