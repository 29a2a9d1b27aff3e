"""A top-k MoE layer as values: the rule that it is meant to compute, known differences from it, weights and inputs."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Literal

import jax.numpy as jnp
import numpy as np

from .errors import InputError

Score = Literal["softmax", "sigmoid", "sqrt_softplus"]
Activation = Literal["swiglu", "geglu", "geglu_exact", "gpt_oss", "relu", "relu2", "gelu", "gelu_exact"]
#: Activations of experts with a gate projection.
GATED = ("swiglu", "geglu", "geglu_exact", "gpt_oss")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Rule that a layer is meant to compute.

    Attributes:
        k: experts per token.
        score: of the router logits.
        renormalise: divide the chosen scores by their sum (with softmax: Mixtral's softmax over the chosen logits).
        scale: factor of the weights (DeepSeek-V3: 2.5).
        groups: equal groups of consecutive experts.
        kept_groups: groups that one token may choose from.
        scores_per_group: highest scores whose sum ranks a group (DeepSeek-V3: 2).
        capacity_factor: C = ceil(capacity_factor · K · S / E); 0: no capacity.
        activation: of the experts.
        balance_weight: of the load-balancing loss in what is differentiated.
        z_weight: of the router z-loss in what is differentiated.
    """

    k: int = 2
    score: Score = "softmax"
    renormalise: bool = False
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    scores_per_group: int = 1
    capacity_factor: float = 0.0
    activation: Activation = "swiglu"
    balance_weight: float = 0.0
    z_weight: float = 0.0

    def __str__(self) -> str:
        weights = f"{self.score}{', renormalised' if self.renormalise else ''}"
        weights += f", times {self.scale:g}" if self.scale != 1 else ""
        limit = f", {self.kept_groups} of {self.groups} groups" if self.groups > 1 else ""
        capacity = f"capacity factor {self.capacity_factor:g}" if self.capacity_factor else "no capacity"
        return f"top-{self.k}, {weights}{limit}, {capacity}, {self.activation}"


@dataclasses.dataclass(frozen=True)
class Variant:
    """Known ways in which implementations differ from the equations; the defaults follow the equations.

    Attributes:
        router_dtype: of the router's matmul.
        bias_in_choice: the selection bias is added to the scores for the choice.
        bias_on_logits: the selection bias is added to the logits instead of the scores.
        bias_in_weights: the weights are biased scores too.
        logits_as_weights: the weights are the logits instead of scores.
        zero_outside_groups: experts outside the kept groups have a score of 0 in the choice instead of none.
        weighs_input: an expert is applied to weight · x instead of weighing its output.
        swapped: the activation is applied to the up projection instead of the gate projection.
        expert_shift: expert e + shift is applied where e was chosen.
        rounding: of the capacity.
        capacity_without_k: C = factor · S / E.
        token_order: a token's second choice takes its place before the next token's first choice.
        routes_padding: padding takes capacity.
        computes_padding: padding has outputs, whose gradients count.
        renormalises_kept: weights are divided by the sum over the assignments that were not dropped.
        router_gradient: through the weights: all, none, or with the denominator of the renormalisation as a constant.
        detached_input: x gets no gradient through the router.
        detached_router: the router's matrix gets no gradient through the weights.
        balance_counts: assignments that f of the load-balancing loss counts.
        balance_probs: P of that loss: scores of all experts, or the combine weights.
        balance_padding: padding counts in the losses.
        balance_shards: the loss is the mean over this many equal shards of the tokens.
        balance_softmax: number of softmaxes of the logits whose K largest values f counts and whose mean P is; 0: the
            rule's choices and scores.
        z_of_scores: the z-loss is taken of the scores instead of the logits.
    """

    router_dtype: Literal["float32", "bfloat16"] = "float32"
    bias_in_choice: bool = True
    bias_on_logits: bool = False
    bias_in_weights: bool = False
    logits_as_weights: bool = False
    zero_outside_groups: bool = False
    weighs_input: bool = False
    swapped: bool = False
    expert_shift: int = 0
    rounding: Literal["up", "down"] = "up"
    capacity_without_k: bool = False
    token_order: bool = False
    routes_padding: bool = False
    computes_padding: bool = False
    renormalises_kept: bool = False
    router_gradient: Literal["all", "none", "constant denominator"] = "all"
    detached_input: bool = False
    detached_router: bool = False
    balance_counts: Literal["all", "first", "kept"] = "all"
    balance_probs: Literal["scores", "weights"] = "scores"
    balance_padding: bool = False
    balance_shards: int = 1
    balance_softmax: int = 0
    z_of_scores: bool = False


#: Fields of :class:`Layer` that have gradients, besides x.
WEIGHTS = ("router", "up", "gate", "down", "router_bias", "up_bias", "gate_bias", "down_bias")


@dataclasses.dataclass(frozen=True)
class Layer:
    """Weights and inputs of one layer, float64.

    Attributes:
        x: [G,S,D]; tokens compete for capacity within a group.
        mask: [G,S] bool, real tokens.
        router: [D,E]; None where only the logits are known.
        logits: [G,S,E]; None: x · router.
        up, gate, down: [E,D,F], [E,D,F] or None, [E,F,D].
        bias: [E], selection bias; None: none.
        router_bias, up_bias, gate_bias, down_bias: [E], [E,F], [E,F], [E,D], added to the products; None: none.
        cotangent: [G,S,D], gradient of the objective by y; None: no gradients.
    """

    x: np.ndarray
    mask: np.ndarray
    router: np.ndarray | None
    logits: np.ndarray | None
    up: np.ndarray
    gate: np.ndarray | None
    down: np.ndarray
    bias: np.ndarray | None = None
    cotangent: np.ndarray | None = None
    router_bias: np.ndarray | None = None
    up_bias: np.ndarray | None = None
    gate_bias: np.ndarray | None = None
    down_bias: np.ndarray | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.up)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of every array."""
        arrays = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        parts = [f"{name}{array.shape}".encode() + array.tobytes() for name, array in arrays if array is not None]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """Differentiable arrays by name."""
        arrays = {name: getattr(self, name) for name in ("x", *WEIGHTS)}
        return {name: array for name, array in arrays.items() if array is not None}

    def router_logits(self, variant: Variant) -> np.ndarray:
        """[G,S,E], in float64 or as a bfloat16 router rounds them."""
        if self.logits is not None:
            return self.logits
        assert self.router is not None
        bias = 0.0 if self.router_bias is None else self.router_bias
        if variant.router_dtype == "float32":
            return self.x @ self.router + bias
        rounded = [array.astype(jnp.bfloat16).astype(np.float64) for array in (self.x, self.router)]
        return (rounded[0] @ rounded[1] + bias).astype(jnp.bfloat16).astype(np.float64)


def check_rule(rule: Rule, num_experts: int) -> None:
    """Refuse a rule that does not fit E experts.

    Raises:
        InputError: groups that do not divide E, or more experts per token than may be chosen.
    """
    if num_experts % rule.groups or not 1 <= rule.kept_groups <= rule.groups:
        raise InputError(
            f"groups={rule.groups}, kept_groups={rule.kept_groups}: groups must divide the {num_experts} experts, "
            "and a token keeps 1 to all of them"
        )
    if not 1 <= rule.k <= num_experts * rule.kept_groups // rule.groups:
        raise InputError(f"k={rule.k}: a token may choose from {num_experts * rule.kept_groups // rule.groups} experts")
