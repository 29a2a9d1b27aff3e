"""Interface of a gate: its base classes, and the selection that gates share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from moe.routing.balancing_rules import BIAS_RULES, BalancingRule, BiasRule, Threshold
from moe.routing.gate_values import GateInputs, GateOutput
from moe.routing.guarded import GUARDS
from moe.system.fields import check_fields, require, setting
from moe.system.guarded import guard_methods

#: ``jax.ad_checkpoint.checkpoint_name`` of indices of experts and rows, a few bytes per assignment.
ROUTES = "routes"
#: ``checkpoint_name`` of the scores that rank the experts of a token, with the selection bias and before groups.
SELECTION_SCORES = "selection_scores"

RouterKind = Literal["linear", "noisy", "none"]
BalanceScope = Literal["batch", "group", "sequence", "step"]
BalanceCounts = Literal["assignments", "first_choice", "top_scores"]
ScoreFunction = Literal["softmax", "sigmoid", "sqrt_softplus"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """Base of all gates. A gate is a frozen dataclass: its fields are what its rule reads, and :meth:`route` is the
    rule. K is its field ``k``, or a class attribute of that name; without one every token goes to every expert.

    Attributes:
        router: router parameters: linear (W_g), noisy (W_g and W_noise, initialised to zero) or none.
        looks_ahead: the experts of a token depend on later tokens, or on others of the batch, in training at least.
        chooses: the router's logits, if there are any, decide where a token goes, and not only its weights.
        experts_choose: each expert takes C tokens, so K is an average.
        lists_all: the output has a column for every expert, whatever K is.
        reweighs: the rule reads ``GateInputs.expert_index``.
        layer: class of the layer that models have for the gate, derived from :class:`moe.layers.moe_layer.MoELayer`,
            or its ``module:class``; None: MoELayer itself.
    """

    router: ClassVar[RouterKind] = "linear"
    looks_ahead: ClassVar[bool] = False
    chooses: ClassVar[bool] = True
    experts_choose: ClassVar[bool] = False
    lists_all: ClassVar[bool] = False
    reweighs: ClassVar[bool] = False
    layer: ClassVar[type[Any] | str | None] = None

    #: Name in configs, messages and records: that of the layer it was taken from, or module:class.
    name: str = ""

    def __init_subclass__(cls, **further: Any) -> None:
        super().__init_subclass__(**further)
        guard_methods(cls, GUARDS)

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", f"{type(self).__module__}:{type(self).__qualname__}")
        check_fields(self, "model.moe.gate.")

    def route(self, router_logits: Array, inputs: GateInputs) -> GateOutput:
        """Assign the tokens of float32 router logits [G,S,E]; a pure function."""
        raise NotImplementedError(f"{type(self).__name__} has no method route(router_logits, inputs)")

    def experts_per_token(self, num_experts: int) -> int:
        """K for a layer with this many experts."""
        return getattr(self, "k", num_experts)

    @property
    def expert_groups(self) -> int:
        """Number of equal groups of consecutive experts within which the gate chooses."""
        return getattr(self, "groups", 1)

    @property
    def slots_per_expert(self) -> int:
        """Number of mixes of tokens that each expert sees instead of tokens (Soft MoE); 0: tokens are assigned."""
        return 0

    @property
    def sends_to_all(self) -> bool:
        """Whether every token goes to every expert, so that no balance loss can move it."""
        return not hasattr(self, "k")

    @property
    def sets_k(self) -> bool:
        """Whether the number of experts per token is a setting; GShard's is fixed."""
        return "k" in {field.name for field in dataclasses.fields(self)}

    def parameter_loss(self, router: Array, experts: Array, rng: Array | None) -> Array | None:
        """Weighted loss of a layer's parameters in a training step, which is added to the objective; None: there is
        none.

        Args:
            router: [D,E] float32, W_g of a linear router without the columns of experts that have no FFN.
            experts: [E,D,F] float32, the experts' gate matrices, or up matrices for a plain activation.
            rng: key of its draws; None: deterministic.
        """
        del router, experts, rng

    def with_k(self, k: int) -> Gate:
        """The gate with this K, where K is a setting. Raises ConfigError for a K that its other fields exclude."""
        return dataclasses.replace(self, **{"k": k}) if self.sets_k else self

    def check_experts(self, num_experts: int, null_experts: int = 0) -> None:
        """Raise a ConfigError if the rule cannot choose among this many FFN experts and experts without an FFN."""
        k = self.experts_per_token(num_experts)
        require(k >= 1, "model.moe.gate.k", k, "must be at least 1")
        require(k <= num_experts, "model.moe.gate.k", k, f"must be at most num_experts={num_experts}")
        only = "must be 0 unless each token chooses K experts"
        require(
            not (null_experts and self.lists_all),
            "model.moe zero, copy, constant and novice experts",
            null_experts,
            only,
        )

    @property
    def balancing(self) -> BalancingRule | None:
        """Rule that updates a state of the router after each step; None: the router has no state."""
        return None

    def first_carry(self, num_experts: int) -> Any:
        """Initial ``GateInputs.carry`` of one token, read by the lowest MoE layer: a pytree of float32 arrays, whose
        shapes every layer keeps; None: nothing is handed on.

        Args:
            num_experts: E, columns of the router.
        """
        del num_experts
        return None

    def of_prompt(self, router_logits: Array, inputs: GateInputs) -> Any:
        """What generation keeps of prompts and gives to :meth:`route` for every token after them, so that a rule which
        reads whole documents generates: a pytree of [G,...] arrays. A rule that overrides this keeps something.

        Args:
            router_logits: [G,S,E] float32; a group is a row, whose prompt starts in column 0.
            inputs: the mask of the prompts' tokens and their ``segment_ids``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method of_prompt(router_logits, inputs)")

    @property
    def keeps_prompt(self) -> bool:
        """Whether the experts of a token that is generated follow from what is kept of the prompt."""
        return type(self).of_prompt is not Gate.of_prompt

    @property
    def hands_on(self) -> bool:
        """Whether the router hands anything on to that of the next MoE layer."""
        return type(self).first_carry is not Gate.first_carry

    @property
    def routes_by_logits(self) -> bool:
        """Whether a router's logits decide to which experts a token goes."""
        return self.chooses and self.router != "none" and not self.slots_per_expert

    @property
    def generates(self) -> bool:
        """Whether a token's experts can be known, outside training, without later tokens."""
        return not self.looks_ahead or self.keeps_prompt or isinstance(self.balancing, Threshold)


def pick(scores: Float[Array, "*batch E"], index: Int[Array, "*batch K"]) -> Float[Array, "*batch K"]:
    """Select entries of the last axis; the gradient is elementwise instead of a scatter."""
    # [...,1,E] where [...,K,E] → [...,K]; kept under remat, as another pass over [...,K,E] costs more than storing it
    chosen = index[..., None] == jnp.arange(scores.shape[-1])
    return checkpoint_name(jnp.sum(jnp.where(chosen, scores[..., None, :], 0.0), axis=-1), ROUTES)


def top_k(scores: Float[Array, "*batch E"], k: int) -> tuple[Float[Array, "*batch K"], Int[Array, "*batch K"]]:
    """Values and indices of the k highest scores, ties to the lower index; ``jax.lax.top_k`` as k rounds of argmax.

    XLA's partitioner cannot split ``lax.top_k`` over tokens: on a mesh every device would gather all logits and route
    all tokens. It can split reductions over E. The argmax is written as the lowest index that has the maximum because
    XLA on CPU runs ``jnp.argmax``, a reduction of (value, index) pairs, on one core and ten times slower.
    """
    num_experts = scores.shape[-1]
    experts = jnp.arange(num_experts)
    remaining, indices = jax.lax.stop_gradient(scores), []
    for _ in range(k):
        highest = jnp.max(remaining, axis=-1, keepdims=True)
        indices.append(jnp.min(jnp.where(remaining == highest, experts, num_experts - 1), axis=-1))
        remaining = jnp.where(indices[-1][..., None] == experts, -jnp.inf, remaining)
    index = checkpoint_name(jnp.stack(indices, axis=-1), ROUTES)
    return pick(scores, index), index


def rank(scores: Float[Array, "*batch N"]) -> Int[Array, "*batch N"]:
    """Rank of each entry of the last axis: 0 for the highest, ties to the lower index."""
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1).astype(jnp.int32)


def limit_to_groups(
    scores: Float[Array, "*batch E"], groups: int, kept: int, scores_per_group: int
) -> Float[Array, "*batch E"]:
    """Scores with −∞ outside the kept groups; a group is ranked by the sum of its ``scores_per_group`` highest
    (1: DeepSeek-V2 2024, section 2.2.2; 2: DeepSeek-V3 2024, section 2.1.2)."""
    if kept == groups:
        return scores
    # [...,E] → [...,groups,E/groups]
    by_group = scores.reshape(*scores.shape[:-1], groups, -1)
    values, _ = top_k(by_group, min(scores_per_group, by_group.shape[-1]))
    _, kept_index = top_k(jnp.sum(values, axis=-1), kept)
    is_kept = jnp.any(kept_index[..., None] == jnp.arange(groups), axis=-2)
    return jnp.where(is_kept[..., None], by_group, -jnp.inf).reshape(scores.shape)


def quantile(
    values: Float[Array, "G S E"], mask: Bool[Array, "G S"], share: Float[Array, ""] | float
) -> Float[Array, " E"]:
    """Largest q of each expert such that at most this share of the masked-in tokens has a value below q.

    Found by narrowing an interval to a sixteenth six times: each time the counts below 15 points are summed over all
    tokens, so that a mesh exchanges counts but no tokens. The error is 2⁻²⁴ of the values' range.
    """
    inside = mask[..., None]
    low = jnp.min(jnp.where(inside, values, jnp.inf), axis=(0, 1))
    high = jnp.max(jnp.where(inside, values, -jnp.inf), axis=(0, 1))
    low, high = (jnp.where(jnp.isfinite(bound), bound, 0.0) for bound in (low, high))
    steps = jnp.arange(17) / 16
    for _ in range(6):
        points = low[:, None] + (high - low)[:, None] * steps  # [E,17]
        below = jnp.sum(inside[..., None] & (values[..., None] < points[:, 1:-1]), axis=(0, 1))  # [E,15]
        last = jnp.sum(below <= share * jnp.sum(mask), axis=-1, keepdims=True)
        low, high = (jnp.take_along_axis(points, last + i, axis=-1)[:, 0] for i in (0, 1))
    return low


#: Score functions by name. The last one is DeepSeek-V4's; 1e-30 avoids the infinite slope of the root at 0.
SCORES = {
    "softmax": functools.partial(jax.nn.softmax, axis=-1),
    "sigmoid": jax.nn.sigmoid,
    "sqrt_softplus": lambda logits: jnp.sqrt(jnp.maximum(jax.nn.softplus(logits), 1e-30)),
}


def normalised(scores: Float[Array, "*batch N"]) -> Float[Array, "*batch N"]:
    """Scores divided by their sum, 0 if all are 0."""
    # The epsilon guards against sigmoids that underflow. Its square, by which the gradient is divided, must not: with
    # the 1e-20 of DeepSeek's code the gradient would be 0 x infinity in float32.
    return scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-18)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored(Gate):
    """Base of gates that weigh experts by a score of their logits."""

    reweighs: ClassVar[bool] = True

    score: ScoreFunction = "softmax"  # s, of the router logits
    renormalise: bool = False  # divide the chosen weights by their sum
    scale: float = setting(1.0, least=-1e6, most=1e6)  # factor of the chosen weights

    def scores(self, router_logits: Float[Array, "G S E"]) -> Float[Array, "G S E"]:
        """s of the router logits."""
        return SCORES[self.score](router_logits)

    def weigh(
        self, router_logits: Float[Array, "G S E"], inputs: GateInputs, expert_index: Int[Array, "G S K"]
    ) -> GateOutput:
        """Weigh these experts (or the recorded ones) by their scores; ``probs`` are the scores divided by their sum."""
        expert_index = expert_index if inputs.expert_index is None else inputs.expert_index
        scores = self.scores(router_logits)
        probs = None if self.score == "softmax" else normalised(scores)
        weights = pick(scores, expert_index)
        if self.renormalise:
            weights = normalised(weights)
        return GateOutput(expert_index, weights * self.scale, probs=probs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selecting(Scored):
    """Base of gates that choose K experts by score + selection bias, within the best groups of experts.

    Attributes:
        biases_logits: whether the selection bias is added to logits instead of scores.
    """

    biases_logits: ClassVar[bool] = False

    bias: BiasRule = "none"  # added to the scores for selection only, and how it moves
    bias_rate: float = setting(0.0, least=0, most=1e6)  # step of that bias, per optimizer step
    groups: int = setting(1, least=1)  # equal groups of consecutive experts; divides num_experts
    kept_groups: int = setting(1, least=1)  # groups that one token may choose from
    scores_per_group: int = setting(1, least=1)  # highest scores whose sum ranks a group

    def __post_init__(self) -> None:
        super().__post_init__()
        within = f"must be at most groups={self.groups}"
        require(self.kept_groups <= self.groups, "model.moe.gate.kept_groups", self.kept_groups, within)
        ranks = self.groups > 1 or self.scores_per_group == 1
        require(ranks, "model.moe.gate.scores_per_group", self.scores_per_group, "needs groups above 1")
        moves = self.bias != "none" or self.bias_rate == 0
        require(moves, "model.moe.gate.bias_rate", self.bias_rate, "needs a bias of sign, quantile or momentum")
        whole = self.bias != "quantile" or self.kept_groups == self.groups
        require(whole, "model.moe.gate.bias", self.bias, "needs kept_groups equal to groups")

    def check_experts(self, num_experts: int, null_experts: int = 0) -> None:
        """Check K and the groups."""
        super().check_experts(num_experts, null_experts)
        k, where = self.experts_per_token(num_experts), "model.moe.gate."
        divide = f"must divide num_experts={num_experts}"
        require(num_experts % self.groups == 0, f"{where}groups", self.groups, divide)
        available = self.kept_groups * num_experts // self.groups
        most = f"must be at most the {available} experts of kept_groups={self.kept_groups} of groups={self.groups}"
        require(k <= available, f"{where}k", k, most)
        one = "must be 1 with zero, copy or constant experts"
        require(null_experts == 0 or self.groups == 1, f"{where}groups", self.groups, one)
        left = self.bias != "quantile" or k < num_experts + null_experts
        require(left, f"{where}bias", self.bias, "needs k below the number of experts")

    def select(
        self,
        router_logits: Float[Array, "G S E"],
        inputs: GateInputs,
        preference: Float[Array, "G S E"] | None = None,
    ) -> GateOutput:
        """Top-k of scores + selection bias within the kept groups, weighted by the scores only: every top-k gate.

        ``preference`` ranks the experts instead of the scores; the bias is added to it, in its units.
        """
        k = self.experts_per_token(router_logits.shape[-1])
        preference = self.scores(router_logits) if preference is None else preference
        ranked = preference if inputs.selection_bias is None else preference + inputs.selection_bias
        ranked = checkpoint_name(ranked, SELECTION_SCORES)
        if not (inputs.train and self.bias == "quantile"):
            ranked = limit_to_groups(ranked, self.groups, self.kept_groups, self.scores_per_group)
            return self.weigh(router_logits, inputs, top_k(ranked, k)[1])
        # An expert is chosen if its preference + bias exceeds that of the best expert that is not chosen.
        values, expert_index = top_k(ranked, k + 1)
        needed = jax.lax.stop_gradient(values[..., k:] - preference)
        return self.weigh(router_logits, inputs, expert_index[..., :k])._replace(needed_bias=needed)

    @property
    def balancing(self) -> BalancingRule | None:
        """The rule of the selection bias."""
        return None if self.bias == "none" else BIAS_RULES[self.bias](self.bias_rate)
