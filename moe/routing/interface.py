"""Interface of a gate: its base class, inputs and output."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, NamedTuple

from jax import Array

from moe.fields import check_fields, require

RouterKind = Literal["linear", "noisy", "slots", "none"]
BiasUpdate = Literal["none", "sign", "quantile", "threshold", "penalty"]
BalanceScope = Literal["batch", "group", "sequence", "step"]
BalanceCounts = Literal["assignments", "first_choice", "top_scores"]
ScoreFunction = Literal["softmax", "sigmoid", "sqrt_softplus"]


@dataclasses.dataclass(frozen=True)
class GateInputs:
    """What a call of the layer gives a gate besides the router logits.

    Attributes:
        mask: [G,S] bool, tokens to route: neither padding nor broken.
        rng: key for the gate's random draws; None: deterministic, as in evaluation.
        train: in training.
        expert_capacity: C, tokens per expert under expert choice; 0: ceil(K·S/E).
        noise_logits: [G,S,E] float32, x·W_noise of noisy top-k; None: no noise.
        selection_bias: [E] float32, added to the scores for selection only; None: zeros.
        token_ids: [G,S] int32, for gates that route by token id.
        positions: [G,S] int32, position of each token in its text, given when generating: a rule that would draw, or
            count tokens of the batch, uses them so that no row depends on the others; None: not generating.
        expert_index: [G,S,K] int32, recorded experts whose weights are to be recomputed; None: the gate chooses.
    """

    mask: Array
    rng: Array | None = None
    train: bool = False
    expert_capacity: int = 0
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


class RouterState(NamedTuple):
    """State [E] of a router without gradient, which the train step updates.

    Attributes:
        update: none; a selection bias that moves by the sign of the load's error (sign) or to the quantile that
            balances the step (quantile); thresholds (threshold); or the strength of a sparsity penalty (penalty).
        rate: step of the update, per optimizer step.
    """

    update: BiasUpdate = "none"
    rate: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """Base of all gates. A gate is a frozen dataclass: its fields are what its rule reads, and :meth:`route` is the
    rule. K is its field ``k``, or a class attribute of that name; without one every token goes to every expert.

    Attributes:
        router: router parameters: linear (W_g), noisy (W_g and W_noise, initialised to zero), slots (a W_g per slot of
            every expert) or none.
        looks_ahead: the experts of a token depend on later tokens, in training at least.
        experts_choose: each expert takes C tokens, so K is an average.
        lists_all: the output has a column for every expert, whatever K is.
        reweighs: the rule reads ``GateInputs.expert_index``.
    """

    router: ClassVar[RouterKind] = "linear"
    looks_ahead: ClassVar[bool] = False
    experts_choose: ClassVar[bool] = False
    lists_all: ClassVar[bool] = False
    reweighs: ClassVar[bool] = False

    #: Name in configs, messages and records: of the layer that it was taken from, or module:class.
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", f"{type(self).__module__}:{type(self).__qualname__}")
        check_fields(self, "model.moe.gate.")

    def route(self, router_logits: Array, inputs: GateInputs) -> GateOutput:
        """Assign the tokens of float32 router logits [G,S,E]; a pure function."""
        raise NotImplementedError(f"{type(self).__name__} has no method route(router_logits, inputs)")

    def experts_per_token(self, num_experts: int) -> int:
        """K, of this many experts."""
        return getattr(self, "k", num_experts)

    @property
    def sets_k(self) -> bool:
        """Whether the number of experts per token is a setting; GShard's is fixed."""
        return "k" in {field.name for field in dataclasses.fields(self)}

    def check_experts(self, num_experts: int, null_experts: int = 0) -> None:
        """Raise a ConfigError where the rule cannot choose among so many FFN experts and experts without an FFN."""
        k = self.experts_per_token(num_experts)
        require(1 <= k <= num_experts, "model.moe.gate.k", k, f"must be at most num_experts={num_experts}")
        only = "must be 0 unless each token chooses K experts"
        require(not (null_experts and self.lists_all), "model.moe zero, copy and constant experts", null_experts, only)

    @property
    def state(self) -> RouterState:
        """State of the router that the rule needs."""
        return RouterState()

    @property
    def generates(self) -> bool:
        """Whether a token's experts can be known, outside training, without later tokens."""
        return not self.looks_ahead or self.state.update == "threshold"
