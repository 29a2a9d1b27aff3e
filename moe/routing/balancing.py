"""Balancing losses, router z-loss, and routing metrics of one layer.

All values are float32, exclude padding, and are taken over all tokens of the (micro)batch, so they do not depend on the
mesh; :func:`over_step` takes the load-balancing loss over all microbatches of a step.
docs/gates.md compares the normalisation of the losses with other libraries.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from moe.routing.interface import ROUTES, BalanceCounts, quantile, top_k
from moe.routing.routing import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NeededBias:
    """Selection biases that the tokens of a layer need, for a quantile over all microbatches of a step.

    Attributes:
        values: [G,S,E] float32, see :class:`moe.routing.gate_values.GateOutput`; infinite for tokens that are not
            routed.
        share: [] of the tokens that an expert takes at balance.
    """

    values: Array
    share: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BalanceSums:
    """Sums over tokens that add up over microbatches, and the selection bias that they call for; not logged.

    Attributes:
        counts: [E] assignments that f of the load-balancing loss counts, without a gradient.
        probs: [E] sum of the router probabilities.
        tokens: [] real tokens.
        assignments: [] chosen assignments.
        bias_target: [E] selection bias that would have balanced these tokens; zeros unless the gate needs one.
        needed: of these tokens, where the bias is to balance all of a step; None: it is not.
    """

    counts: Array
    probs: Array
    tokens: Array
    assignments: Array
    bias_target: Array
    needed: NeededBias | None = None


#: Field of :class:`LayerReport` with an auxiliary loss → (field of ``model.moe.losses`` with its weight, its name).
AUXILIARY: Mapping[str, tuple[str, str]] = types.MappingProxyType(
    {
        "load_balancing_loss": ("balance", "load balancing"),
        "device_balance_loss": ("device", "device balance"),
        "importance_loss": ("importance", "importance"),
        "load_loss": ("load", "load"),
        "router_z_loss": ("z", "router z-loss"),
    }
)
#: Fields of :class:`LayerReport` that are shares of the assignments.
PER_ASSIGNMENT = ("expert_load", "fraction_tokens_dropped")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerReport:
    """Losses and metrics of one MoE layer over one batch; stacked over layers they gain a leading axis.

    Attributes:
        load_balancing_loss: [] unweighted, 1 at perfect balance, E when all tokens go to one expert.
        device_balance_loss: [] unweighted, the same over groups of experts.
        importance_loss: [] unweighted, 0 at perfect balance.
        load_loss: [] unweighted, 0 at perfect balance.
        router_z_loss: [] unweighted.
        broken_tokens: [] number of real tokens with a NaN or infinite router logit.
        expert_load: [E] share of the chosen assignments that name each expert, dropped ones included; sums to 1.
        fraction_tokens_dropped: [] share of the chosen assignments beyond the capacity.
        router_entropy: [] mean entropy of router_probs, nats.
        active_experts: [] mean number of FFN experts that a real token chooses.
        sparsity_penalty: [] a weighted loss: ReMoE's, and what a layer of a user's module adds; else 0.
        sums: see :class:`BalanceSums`.
    """

    load_balancing_loss: Array
    device_balance_loss: Array
    importance_loss: Array
    load_loss: Array
    router_z_loss: Array
    broken_tokens: Array
    expert_load: Array
    fraction_tokens_dropped: Array
    router_entropy: Array
    active_experts: Array
    sparsity_penalty: Array
    sums: BalanceSums

    def metrics(self) -> dict[str, Array]:
        """All attributes but the sums, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "sums"}


def auxiliary_losses(report: LayerReport, weights: Any) -> dict[str, Array]:
    """Weighted auxiliary terms by name, to be summed over the MoE layers (Switch 2021, section 2.2).

    Args:
        report: of a layer, or stacked over layers.
        weights: :class:`moe.config.moe_section.Losses`.
    """
    # Terms with weight 0 are only metrics; XLA cannot remove the computation of a gradient that is multiplied by 0.
    used = {name: weight for name, (field, _) in AUXILIARY.items() if (weight := getattr(weights, field))}
    return {name: weight * getattr(report, name) for name, weight in used.items()} | {
        "sparsity_penalty": report.sparsity_penalty
    }


def count_per_expert(
    expert_index: Int[Array, "*batch K"], counted: Bool[Array, "*batch K"], num_experts: int
) -> Float[Array, " E"]:
    """Number of counted assignments of each expert."""
    return jnp.sum(jax.nn.one_hot(expert_index, num_experts) * counted[..., None], axis=tuple(range(expert_index.ndim)))


def token_mean(values: Float[Array, "G S *rest"], mask: Bool[Array, "G S"]) -> Float[Array, "*rest"]:
    """Mean over the masked-in tokens; 0 if there are none."""
    weights = mask.astype(jnp.float32).reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
    return jnp.sum(values * weights, axis=(0, 1)) / jnp.maximum(jnp.sum(mask), 1)


def _sums(routing: Routing, mask: Array, parts: int, counts: BalanceCounts) -> tuple[Array, Array, Array]:
    """Counted assignments and summed probabilities [parts,E], and tokens [parts], of equal consecutive parts."""
    num_experts = routing.router_probs.shape[-1]
    chosen, expert_index = routing.chosen, routing.expert_index
    if counts == "first_choice":
        chosen, expert_index = chosen[..., :1], expert_index[..., :1]
    elif counts == "top_scores":
        _, expert_index = top_k(routing.router_probs, expert_index.shape[-1])

    def split(array: Array) -> Array:  # [G,S,...] → [parts,G·S/parts,...]
        return array.reshape(parts, -1, *array.shape[2:])

    is_expert = jax.nn.one_hot(split(expert_index), num_experts) * split(chosen)[..., None]
    total = jnp.sum(jnp.where(split(mask)[..., None], split(routing.router_probs), 0.0), axis=1)
    tokens = jnp.sum(split(mask), axis=1).astype(jnp.float32)
    counts_of_parts = checkpoint_name(jnp.sum(is_expert, axis=(1, 2)), ROUTES)
    return jax.lax.stop_gradient(counts_of_parts), total, tokens


def _balance(
    counts: Array, probs: Array, tokens: Array, weights: Array | np.ndarray | float = 1.0, groups: int = 0
) -> Array:
    """E·Σ_e w_e·f_e·P_e of sums [...,E], [...,E] and [...]; over n groups of experts: n·Σ_i f_i·P_i."""
    share = weights * counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1.0)
    probability = probs / jnp.maximum(tokens, 1.0)[..., None]
    if groups:
        # [...,E] → [...,n,E/n] → [...,n]
        share, probability = (
            jnp.sum(values.reshape(*values.shape[:-1], groups, -1), axis=-1) for values in (share, probability)
        )
    return share.shape[-1] * jnp.sum(share * probability, axis=-1)


def balance_weights(num_experts: int, null_experts: int, tau: float) -> np.ndarray | float:
    """Weight of each expert in the load-balancing loss: 1 for an FFN, τ for a zero, copy or constant expert (MoE++
    2024, section 3.3)."""
    return np.repeat([1.0, tau], [num_experts, null_experts]) if null_experts else 1.0


def load_balancing_loss(
    routing: Routing,
    mask: Bool[Array, "G S"],
    *,
    counts: BalanceCounts = "assignments",
    parts: int = 1,
    expert_groups: int = 0,
    weights: np.ndarray | float = 1.0,
) -> Float[Array, ""]:
    """E·Σ_e f_e·P_e, f_e the share of assignments to e, P_e the mean probability of e (Switch 2021, equations 4-6).

    1 at perfect balance for every K, since f sums to 1. The gradient flows through P only. In other papers:
    GShard's ℓ_aux (2020, algorithm 1) is this over first choices, per group, divided by E². DeepSeek's Σ f P
    (DeepSeekMoE 2024, equations 12-14; V3 2024, equations 17-20) is this, per sequence in V3. DeepSeekMoE's
    device-level loss (equations 15-17) is this over n groups of experts: n·Σ_i (Σ_{e in i} f_e)(Σ_{e in i} P_e).

    Args:
        counts: what f counts: all assignments, first choices only (GShard), or the top-K of the router probabilities
            without selection bias and group limits (DeepSeek-V3 2024, equation 18).
        parts: number of equal consecutive parts of the tokens; the loss is the mean over parts: 1 for the whole batch,
            G for groups, B for sequences. Parts without real tokens do not count.
        expert_groups: n; 0: no groups.
        weights: see :func:`balance_weights`.
    """
    load, probs, tokens = _sums(routing, mask, parts, counts)
    losses, present = _balance(load, probs, tokens, weights, expert_groups), tokens > 0
    return jnp.sum(losses * present) / jnp.maximum(jnp.sum(present), 1)


def over_step(report: LayerReport, totals: BalanceSums, weights: np.ndarray | float, microbatches: int) -> LayerReport:
    """Reports of one microbatch, stacked over layers, with its share of the load-balancing loss over the whole step.

    f and the number of tokens are the step's, P is the microbatch's: the mean over microbatches is E·Σ f_e·P_e of all
    tokens together, in value and gradient. ``weights``: see :func:`balance_weights`.
    """
    loss = _balance(totals.counts, report.sums.probs, totals.tokens, weights) * microbatches
    return dataclasses.replace(report, load_balancing_loss=loss)


def step_target(needed: NeededBias, tokens: Float[Array, "A L"]) -> Float[Array, "L E"]:
    """Selection bias of each layer that would have balanced all tokens of a step.

    Args:
        needed: of A microbatches and L layers, [A,L,G,S,E] and [A,L].
        tokens: real ones.
    """
    share = jnp.sum(needed.share * tokens, axis=0) / jnp.maximum(jnp.sum(tokens, axis=0), 1)
    # [A,L,G,S,E] → [L,G,A,S,E] → [L,G,A·S,E]: G, which devices share, stays an axis of its own.
    values = jnp.moveaxis(needed.values, 0, 2)
    values = values.reshape(*values.shape[:2], -1, values.shape[-1])
    return jax.vmap(quantile)(values, jnp.isfinite(values[..., 0]), share)


def squared_variation(values: Float[Array, " E"]) -> Float[Array, ""]:
    """CV², the variance divided by the squared mean; 0 if all values are 0."""
    mean = jnp.mean(values)
    return jnp.where(mean > 0, jnp.var(values) / jnp.maximum(jnp.square(mean), jnp.finfo(jnp.float32).tiny), 0.0)


def importance_loss(routing: Routing) -> Float[Array, ""]:
    """CV(Importance)², Importance_e = Σ_x G(x)_e, the sum of the weights of e (Shazeer 2017, equations 6 and 7)."""
    num_experts = routing.router_probs.shape[-1]
    weights = jax.nn.one_hot(routing.expert_index, num_experts) * routing.combine_weights[..., None]
    return squared_variation(jnp.sum(weights, axis=(0, 1, 2)))


def load_loss(routing: Routing, mask: Bool[Array, "G S"]) -> Float[Array, ""]:
    """CV(Load)², Load_e = Σ_x P(x,e) (Shazeer 2017, equations 10 and 11).

    Only noisy top-k with noise has a smooth P(x,e). Otherwise Load_e is the number of assignments, a metric without a
    gradient.
    """
    if routing.smooth_load is None:
        counts = count_per_expert(routing.expert_index, routing.chosen, routing.router_probs.shape[-1])
        return squared_variation(jax.lax.stop_gradient(counts))
    return squared_variation(jnp.sum(jnp.where(mask[..., None], routing.smooth_load, 0.0), axis=(0, 1)))


def router_z_loss(router_logits: Float[Array, "G S E"], mask: Bool[Array, "G S"]) -> Float[Array, ""]:
    """Mean over real tokens of logsumexp(logits)² (ST-MoE 2022, equation 5)."""
    return token_mean(jnp.square(jax.nn.logsumexp(router_logits, axis=-1)), mask)


def sparsity_penalty(
    routing: Routing, mask: Bool[Array, "G S"], experts_per_token: int | Array, strength: Float[Array, ""]
) -> Float[Array, ""]:
    """λ·Σ_e f_e·R_e, f_e = E/K times the share of tokens with a positive R_e, and R_e its mean over tokens (ReMoE 2024,
    equation 10: the L1 norm, weighted to balance the load)."""
    tokens, num_experts = jnp.maximum(jnp.sum(mask), 1), routing.router_logits.shape[-1]
    load = num_experts / experts_per_token * jnp.sum(routing.chosen, axis=(0, 1)) / tokens
    mean = jnp.sum(jax.nn.relu(routing.router_logits) * mask[..., None], axis=(0, 1)) / tokens
    return strength * jnp.sum(jax.lax.stop_gradient(load) * mean)


def report(
    routing: Routing,
    mask: Bool[Array, "G S"],
    kept: Bool[Array, "G S K"],
    *,
    counts: BalanceCounts = "assignments",
    parts: int = 1,
    k: int | None = 0,
    null_experts: int = 0,
    weights: np.ndarray | float = 1.0,
    expert_groups: int = 1,
    strength: Float[Array, ""] | None = None,
    keeps_needed: bool = False,
) -> LayerReport:
    """All losses and metrics of one layer.

    Args:
        kept: chosen assignments within the capacity.
        counts: see :func:`load_balancing_loss`.
        parts: see :func:`load_balancing_loss`.
        k: K, which the quantile and the penalty read; None: the mean number of experts that took a token.
        null_experts: how many of the last columns are experts without an FFN.
        weights: see :func:`balance_weights`.
        expert_groups: groups of the device-level loss.
        strength: λ of the sparsity penalty; None: no penalty.
        keeps_needed: report the selection biases that the tokens need, if the gate gives them.
    """
    num_experts = routing.router_probs.shape[-1]
    load = count_per_expert(routing.expert_index, routing.chosen, num_experts)
    num_chosen = jnp.maximum(jnp.sum(routing.chosen), 1)
    valid = mask & ~routing.broken
    # Its slope at a probability of 0 is infinite, and a pipeline gives metrics cotangents of 0: their product is NaN.
    entropy = jnp.sum(jax.scipy.special.entr(jax.lax.stop_gradient(routing.router_probs)), axis=-1)
    active = jnp.sum(load[: num_experts - null_experts]) / jnp.maximum(jnp.sum(valid), 1)
    taken = active if k is None else k
    target, needed = jnp.zeros((num_experts,), jnp.float32), None
    if routing.needed_bias is not None:
        target = quantile(routing.needed_bias, valid, taken / num_experts)
        if keeps_needed:
            values = jnp.where(valid[..., None], jax.lax.stop_gradient(routing.needed_bias), jnp.inf)
            needed = NeededBias(values, jnp.asarray(taken / num_experts, jnp.float32))
    counted, probs, tokens = (values[0] for values in _sums(routing, valid, 1, counts))
    return LayerReport(
        load_balancing_loss=load_balancing_loss(routing, valid, counts=counts, parts=parts, weights=weights),
        device_balance_loss=load_balancing_loss(routing, valid, expert_groups=expert_groups),
        importance_loss=importance_loss(routing),
        load_loss=load_loss(routing, valid),
        router_z_loss=router_z_loss(routing.router_logits, valid),
        broken_tokens=jnp.sum(routing.broken).astype(jnp.float32),
        expert_load=load / num_chosen,
        fraction_tokens_dropped=jnp.sum(routing.chosen & ~kept) / num_chosen,
        router_entropy=token_mean(entropy, valid),
        active_experts=active,
        sparsity_penalty=jnp.zeros(()) if strength is None else sparsity_penalty(routing, valid, taken, strength),
        sums=BalanceSums(counted, probs, tokens, jnp.sum(routing.chosen).astype(jnp.float32), target, needed),
    )


def max_violation(expert_load: Array | np.ndarray) -> Array | np.ndarray | np.generic:
    """(max − mean) / mean over experts, 0 at balance (loss-free balancing 2024, section 2.1); [...,E] → [...]."""
    return expert_load.max(axis=-1) * expert_load.shape[-1] - 1.0


def dead_experts(expert_load: Array | np.ndarray) -> Array | np.ndarray | np.generic:
    """Number of experts without an assignment; [...,E] → [...]."""
    return (expert_load == 0).sum(axis=-1)
