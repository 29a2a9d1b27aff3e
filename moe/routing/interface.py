"""Interface of a gate: its record, inputs and output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

from jax import Array

from moe.config import BalanceScope, BiasUpdate, DropPolicy, ScoreFunction

BalanceCounts = Literal["assignments", "first_choice", "top_scores"]
RouterKind = Literal["linear", "noisy", "slots", "none"]

#: Fields of a gate's record that its rule reads from :class:`GateInputs`; a config's values replace the record's.
ROUTING_FIELDS = (
    *("score_function", "bias_update", "renormalise", "routing_scale"),
    *("expert_groups", "kept_expert_groups", "scores_per_group"),
)


@dataclasses.dataclass(frozen=True)
class GateInputs:
    """Everything a gate may use besides the router logits.

    Attributes:
        mask: [G,S] bool, tokens to route: neither padding nor broken.
        experts_per_token: K.
        rng: key for the gate's random draws; None: deterministic, as in evaluation.
        train: in training.
        expert_capacity: C, tokens per expert under expert choice; 0: ceil(K·S/E).
        score_function: softmax, sigmoid or sqrt_softplus of the logits.
        bias_update: how the selection bias is balanced.
        expert_groups: number of equal groups of consecutive experts.
        kept_expert_groups: number of groups that one token may choose from; 0: all.
        scores_per_group: number of highest scores whose sum ranks a group.
        renormalise: 1: divide the chosen weights by their sum.
        routing_scale: factor applied to all weights.
        noise_logits: [G,S,E] float32, x·W_noise of noisy top-k; None: no noise.
        selection_bias: [E] float32, added to the scores for selection only; None: zeros.
        token_ids: [G,S] int32, for gates that route by token id.
        positions: [G,S] int32, position of each token in its text, given when generating: a rule that would draw, or
            count tokens of the batch, uses them so that no row depends on the others; None: not generating.
        expert_index: [G,S,K] int32, recorded experts whose weights are to be recomputed; None: the gate chooses.
    """

    mask: Array
    experts_per_token: int
    rng: Array | None = None
    train: bool = False
    expert_capacity: int = 0
    score_function: ScoreFunction = "softmax"
    bias_update: BiasUpdate = "none"
    expert_groups: int = 1
    kept_expert_groups: int = 0
    scores_per_group: int = 1
    renormalise: int = 0
    routing_scale: float = 1.0
    noise_logits: Array | None = None
    selection_bias: Array | None = None
    token_ids: Array | None = None
    positions: Array | None = None
    expert_index: Array | None = None


class GateOutput(NamedTuple):
    """Assignments of a gate, before padding and broken tokens are masked out.

    Attributes:
        expert_index: [G,S,K] int32, first choice first.
        weights: [G,S,K] float32.
        accepted: [G,S,K] bool, False where the gate does not send the assignment; None: all are sent.
        probs: [G,S,E] float32, probabilities for the balancing losses; None: softmax of the logits.
        smooth_load: [G,S,E] float32, differentiable probability of being chosen; None: not defined by the gate.
        needed_bias: [G,S,E] float32, selection bias above which the token goes to the expert; None: not needed.
    """

    expert_index: Array
    weights: Array
    accepted: Array | None = None
    probs: Array | None = None
    smooth_load: Array | None = None
    needed_bias: Array | None = None


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
        fixed_k: the rule is defined for this K only.
        balance_counts: what f of the load-balancing loss counts: all assignments, first choices only, or the top-K of
            the router probabilities, without selection bias and group limits.
        bias_update: state of the router without gradient, [E]: none; a selection bias that moves by the sign of the
            load's error (sign) or to the quantile that balances the step (quantile); thresholds (threshold); or the
            strength of a sparsity penalty (penalty).
        router: router parameters: linear (W_g), noisy (W_g and W_noise, initialised to zero), slots (a W_g per slot of
            every expert) or none.
        looks_ahead: the experts of a token depend on later tokens, in training at least.
        experts_choose: each expert takes C tokens, so K is an average.
        lists_all: the output has a column for every expert, whatever K is.
        scored_weights: weights follow score_function, renormalise and routing_scale.
        scored_choice: the choice follows score_function, the selection bias and the groups.
        reweighs: the rule reads ``GateInputs.expert_index``.
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
    score_function: ScoreFunction = "softmax"
    bias_update: BiasUpdate = "none"
    bias_update_rate: float = 0.0
    jitter: float = 0.0
    drop_policy: DropPolicy = "position"
    expert_groups: int = 1
    kept_expert_groups: int = 0
    scores_per_group: int = 1
    renormalise: int = 0
    routing_scale: float = 1.0
    zero_experts: int = 0
    copy_experts: int = 0
    constant_experts: int = 0
    null_balance: float = 1.0
    fixed_k: bool = False
    balance_counts: BalanceCounts = "assignments"
    router: RouterKind = "linear"
    looks_ahead: bool = False
    experts_choose: bool = False
    lists_all: bool = False
    scored_weights: bool = False
    scored_choice: bool = False
    reweighs: bool = False

    @property
    def generates(self) -> bool:
        """Whether a token's experts can be known, outside training, without later tokens."""
        return not self.looks_ahead or self.bias_update == "threshold"
