"""Interface of a gate: its record, inputs and output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

from jax import Array

from moe.config import BalanceScope, DropPolicy

BalanceCounts = Literal["assignments", "first_choice", "top_scores"]
RouterKind = Literal["linear", "noisy", "biased", "slots", "none"]


@dataclasses.dataclass(frozen=True)
class GateInputs:
    """Everything a gate may use besides the router logits.

    Attributes:
        mask: [G,S] bool, tokens to route: neither padding nor broken.
        experts_per_token: K.
        rng: key for the gate's random draws; None: deterministic, as in evaluation.
        expert_capacity: C, tokens per expert under expert choice; 0: ceil(K·S/E).
        expert_groups: number of equal groups of consecutive experts.
        kept_expert_groups: number of groups that one token may choose from.
        renormalise: divide the chosen weights by their sum, where the rule leaves it open.
        routing_scale: factor applied to all weights.
        noise_logits: [G,S,E] float32, x·W_noise of noisy top-k; None: no noise.
        selection_bias: [E] float32, added to the scores for selection only; None: zeros.
        token_ids: [G,S] int32, for gates that route by token id.
        positions: [G,S] int32, position of each token in its text, given when generating: a rule that would draw, or
            count tokens of the batch, uses them so that no row depends on the others; None: not generating.
    """

    mask: Array
    experts_per_token: int
    rng: Array | None = None
    expert_capacity: int = 0
    expert_groups: int = 1
    kept_expert_groups: int = 1
    renormalise: bool = False
    routing_scale: float = 1.0
    noise_logits: Array | None = None
    selection_bias: Array | None = None
    token_ids: Array | None = None
    positions: Array | None = None


class GateOutput(NamedTuple):
    """Assignments of a gate, before padding and broken tokens are masked out.

    Attributes:
        expert_index: [G,S,K] int32, first choice first.
        weights: [G,S,K] float32.
        accepted: [G,S,K] bool, False where the gate does not send the assignment; None: all are sent.
        probs: [G,S,E] float32, probabilities for the balancing losses; None: softmax of the logits.
        smooth_load: [G,S,E] float32, differentiable probability of being chosen; None: not defined by the gate.
    """

    expert_index: Array
    weights: Array
    accepted: Array | None = None
    probs: Array | None = None
    smooth_load: Array | None = None


#: A rule: router logits [G,S,E] float32 → assignments.
GateRule = Callable[[Array, GateInputs], GateOutput]


@dataclasses.dataclass(frozen=True)
class Gate:
    """A routing rule and the constants of its paper; each constant is the default of the ``model.moe`` field of the
    same name.

    Attributes:
        choose: the rule, a pure function of float32 router logits.
        source: paper and equation.
        experts_per_token: K; 0: all experts.
        kept_expert_groups: 0: all groups.
        renormalise: 1 or 0, whether the chosen weights are divided by their sum; -1: fixed by the rule.
        fixed_k: the rule is defined for this K only.
        weights_sum_to_one: the rule renormalises by itself; with K = 1 the weight is always 1 and the router gets no
            gradient.
        balance_counts: what f of the load-balancing loss counts: all assignments, first choices only, or the top-K of
            the router probabilities, without selection bias and group limits.
        router: router parameters: linear (W_g), noisy (W_g and W_noise, initialised to zero), biased (W_g and a
            selection bias without gradient), slots (a W_g per slot of every expert) or none.
        looks_ahead: the experts of a token depend on later tokens.
        experts_choose: each expert takes C tokens, so K is an average.
    """

    choose: GateRule
    source: str
    experts_per_token: int
    capacity_factor: float = 1.25  # with eval_capacity_factor 2.0 as in Switch 2021
    eval_capacity_factor: float = 2.0
    load_balancing_weight: float = 0.0
    z_loss_weight: float = 0.0
    importance_weight: float = 0.0
    load_weight: float = 0.0
    device_balance_weight: float = 0.0
    balance_scope: BalanceScope = "batch"
    bias_update_rate: float = 0.0
    jitter: float = 0.0
    drop_policy: DropPolicy = "position"
    expert_groups: int = 1
    kept_expert_groups: int = 0
    renormalise: int = -1
    routing_scale: float = 1.0
    fixed_k: bool = False
    weights_sum_to_one: bool = False
    balance_counts: BalanceCounts = "assignments"
    router: RouterKind = "linear"
    looks_ahead: bool = False
    experts_choose: bool = False
