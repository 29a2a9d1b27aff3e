"""Catalogue of single deviations from a layer's equations, each with the sentence that names it.

Sources are reports of wrong losses and gradients filed against Megatron-LM (7452, 5916, 5798, 5047), torchtitan (4054,
3280), PyTorch (160285), transformers (44242, 45111) and MaxText (4829), and the published papers' own differences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from .equations import ACTIVATIONS
from .rule import GATED, Layer, Rule, Variant


@dataclasses.dataclass(frozen=True)
class Deviation:
    """One way in which a layer may differ.

    Attributes:
        sentence: what the layer does instead.
        rule: fields of :class:`Rule` that it changes.
        variant: fields of :class:`Variant` that it changes.
    """

    sentence: str
    rule: dict[str, Any] = dataclasses.field(default_factory=dict)
    variant: dict[str, Any] = dataclasses.field(default_factory=dict)

    def apply(self, rule: Rule, variant: Variant) -> tuple[Rule, Variant]:
        """The rule and variant of a layer with this deviation."""
        return dataclasses.replace(rule, **self.rule), dataclasses.replace(variant, **self.variant)


def _of_weights(rule: Rule, layer: Layer) -> Iterator[Deviation]:
    if rule.score == "softmax" and rule.renormalise:
        yield Deviation("softmax before the top-k without renormalising", {"renormalise": False})
    elif rule.renormalise:
        yield Deviation("the weights are not renormalised", {"renormalise": False})
    elif rule.score == "softmax":
        yield Deviation("softmax after the top-k, or renormalised: the weights add up to 1", {"renormalise": True})
    else:
        yield Deviation("the weights are renormalised", {"renormalise": True})
    for score in ("softmax", "sigmoid", "sqrt_softplus"):
        if score != rule.score:
            yield Deviation(f"scores are {score} instead of {rule.score}", {"score": score})
    yield Deviation("the weights are the router's logits instead of scores", variant={"logits_as_weights": True})
    if rule.scale != 1:
        yield Deviation(f"the routing scale {rule.scale:g} is left out", {"scale": 1.0})
        yield Deviation(f"the routing scale {rule.scale:g} is applied twice", {"scale": rule.scale**2})
    if layer.bias is not None:
        yield Deviation("the selection bias changes the weights too", variant={"bias_in_weights": True})
        yield Deviation("the selection bias is ignored", variant={"bias_in_choice": False})
        yield Deviation("the selection bias is added to the logits", variant={"bias_on_logits": True})
    yield Deviation("the weight multiplies an expert's input instead of its output", variant={"weighs_input": True})


def _of_choices(rule: Rule, layer: Layer) -> Iterator[Deviation]:
    for k in (rule.k - 1, rule.k + 1):
        if 1 <= k <= layer.num_experts * rule.kept_groups // rule.groups:
            yield Deviation(f"{k} experts per token instead of {rule.k}", {"k": k})
    if rule.groups > 1:
        yield Deviation("the limit on groups of experts is ignored", {"groups": 1, "kept_groups": 1})
        zero = "experts outside the kept groups have a score of 0 in the choice, above negative ones"
        yield Deviation(zero, variant={"zero_outside_groups": True})
        for number in {1, 2} - {rule.scores_per_group}:
            yield Deviation(f"groups are ranked by {number} score(s)", {"scores_per_group": number})
    yield Deviation("the router's matmul is in bfloat16", variant={"router_dtype": "bfloat16"})


def _of_capacity(rule: Rule) -> Iterator[Deviation]:
    if not rule.capacity_factor:
        return
    yield Deviation("the capacity is rounded down instead of up", variant={"rounding": "down"})
    if rule.k > 1:
        yield Deviation("the capacity lacks the factor K", variant={"capacity_without_k": True})
        yield Deviation("second choices of a token take places before later first choices", {}, {"token_order": True})
    yield Deviation("there is no capacity: nothing is dropped", {"capacity_factor": 0.0})
    yield Deviation("padding takes capacity", variant={"routes_padding": True})
    yield Deviation("weights are renormalised over the assignments that were kept", {}, {"renormalises_kept": True})


def _of_padding(layer: Layer) -> Iterator[Deviation]:
    if layer.cotangent is not None and not layer.mask.all():
        ignored = {"routes_padding": True, "computes_padding": True}
        yield Deviation("the mask is ignored: padding has outputs, and their gradients count", variant=ignored)


def _of_experts(rule: Rule, layer: Layer) -> Iterator[Deviation]:
    if layer.gate is not None:
        yield Deviation("gate and up projections are swapped", variant={"swapped": True})
        names = GATED
    else:
        names = tuple(name for name in ACTIVATIONS if name not in GATED)
    for name in names:
        if name != rule.activation:
            yield Deviation(f"the activation is {name} instead of {rule.activation}", {"activation": name})
    for shift in range(1, layer.num_experts):
        yield Deviation(f"expert e + {shift} is applied where e was chosen", variant={"expert_shift": shift})


def _of_losses(rule: Rule, layer: Layer, devices: tuple[int, ...]) -> Iterator[Deviation]:
    if rule.k > 1:
        yield Deviation("f of the balance loss counts first choices only", variant={"balance_counts": "first"})
    if rule.capacity_factor:
        yield Deviation("f of the balance loss leaves out dropped assignments", variant={"balance_counts": "kept"})
    yield Deviation("P of the balance loss is the mean combine weight", variant={"balance_probs": "weights"})
    twice = "P of the balance loss is a softmax of a softmax"
    yield Deviation(twice, variant={"balance_softmax": 2})
    if rule.score != "softmax" or layer.bias is not None or rule.groups > 1:
        plain = "f and P of the balance loss are those of a plain softmax router"
        yield Deviation(plain, variant={"balance_softmax": 1})
    if not layer.mask.all():
        yield Deviation("padding counts in the losses", variant={"balance_padding": True})
    for count in devices:
        if count > 1 and layer.mask.size % count == 0:
            sentence = f"the balance loss is a mean over {count} shards of the tokens instead of one over all tokens"
            yield Deviation(sentence, variant={"balance_shards": count})
    yield Deviation("the z-loss is taken of the scores instead of the logits", variant={"z_of_scores": True})
    if rule.balance_weight:
        yield Deviation("the balance loss has no gradient", {"balance_weight": 0.0})
        yield Deviation(
            "the gradient of the balance loss is K times as large", {"balance_weight": rule.balance_weight * rule.k}
        )
        yield Deviation("the balance loss counts twice in the gradient", {"balance_weight": 2 * rule.balance_weight})
    if rule.z_weight:
        yield Deviation("the z-loss has no gradient", {"z_weight": 0.0})


def _of_gradients(rule: Rule) -> Iterator[Deviation]:
    yield Deviation("the combine weights pass no gradient to the router", variant={"router_gradient": "none"})
    yield Deviation("x gets no gradient through the router", variant={"detached_input": True})
    no_matrix = "the router's matrix gets no gradient through the combine weights"
    yield Deviation(no_matrix, variant={"detached_router": True})
    if rule.renormalise:
        constant = "the denominator of the renormalisation is a constant in the backward pass"
        yield Deviation(constant, variant={"router_gradient": "constant denominator"})


def deviations(rule: Rule, layer: Layer, devices: tuple[int, ...]) -> list[Deviation]:
    """Every deviation that this rule and layer can show, the earliest stage of the computation first."""
    return [
        *_of_choices(rule, layer),
        *_of_weights(rule, layer),
        *_of_capacity(rule),
        *_of_padding(layer),
        *_of_experts(rule, layer),
        *_of_losses(rule, layer, devices),
        *_of_gradients(rule),
    ]


def factors(rule: Rule, layer: Layer, devices: tuple[int, ...]) -> dict[str, float]:
    """Known factors by which values and gradients of implementations are off, by name."""
    k = rule.k
    e = layer.num_experts
    tokens = int(layer.mask.sum())
    pairs = [("K", "1/K", k), ("E", "1/E", e), ("E/K", "K/E", e / k)]
    pairs += [("the routing scale", "1/the routing scale", rule.scale)]
    pairs += [("the number of tokens", "1/the number of tokens", tokens)]
    pairs += [("all tokens over real ones", "real tokens over all", layer.mask.size / max(tokens, 1))]
    pairs += [(f"{count} devices (TP, EP or DP)", f"1/{count} devices (TP, EP or DP)", count) for count in devices]
    values = {name: float(value) for name, _, value in pairs} | {name: 1 / value for _, name, value in pairs if value}
    return {name: value for name, value in values.items() if value not in (0.0, 1.0)}
