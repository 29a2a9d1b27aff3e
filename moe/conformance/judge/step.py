"""Steps of a small MoE model by the equations, in float64: losses over microbatches, gradients, clipping, AdamW, bias.

The model is embedding, layers x + MoE(x), unembedding; each layer is :func:`.equations.forward`. Between two steps the
state is saved and restored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from . import equations
from .rule import Layer, Rule, Variant

Arrays = dict[str, Any]
#: Kinds of parameters, by the end of their names.
EXPERTS = ("up", "gate", "down", "up_a", "up_b")
KINDS = ("embedding", "unembedding", "router", *EXPERTS)


@dataclasses.dataclass(frozen=True)
class StepRule:
    """Settings of a step: the computation that is meant.

    Attributes:
        layer: of every MoE layer, with the weights of its losses.
        balance_scope: tokens over which f and P of the balance loss are taken; of microbatches, the mean of the losses.
        clip: largest global norm of the gradients; 0: none.
        learning_rate, b1, b2, eps, weight_decay: of AdamW.
        decayed: kinds of parameters that decay.
        bias_rate: u of the selection bias, b + u · sign(mean load - load) after each step; 0: not moved.
        adapter_scale: alpha / rank of up + scale · up_a · up_b; parameters without adapters are then fixed.
    """

    layer: Rule = dataclasses.field(default_factory=Rule)
    balance_scope: Literal["step", "microbatch"] = "microbatch"
    clip: float = 1.0
    learning_rate: float = 1e-2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decayed: tuple[str, ...] = KINDS
    bias_rate: float = 0.0
    adapter_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class StepVariant:
    """Known ways in which trainers differ; the defaults follow the equations.

    Attributes:
        loss_mean: of all targets of the step, of the microbatches' means, or of all positions.
        balance_mean: of microbatches' balance losses: equal weights, weights by tokens, or their sum.
        expert_norm: factor of the experts' squares in the global norm.
        clips: whether gradients are clipped.
        coupled_decay: weight decay is added to the gradient instead of the update.
        lost: kinds of parameters whose updates are lost.
        bias_microbatch: the selection bias moves by the loads of the last microbatch only.
        restored: experts after a restart: all, those of the first of ``ranks`` ranks on every rank, or zeros beyond it.
        ranks: number of ranks with experts in ``restored``.
        adapter_columns: column r of up_a meets row r of up_b, or the rank is read with the experts' order.
    """

    loss_mean: Literal["targets", "microbatches", "positions"] = "targets"
    balance_mean: Literal["equal", "tokens", "sum"] = "equal"
    expert_norm: float = 1.0
    clips: bool = True
    coupled_decay: bool = False
    lost: tuple[str, ...] = ()
    bias_microbatch: bool = False
    restored: Literal["all", "first rank everywhere", "first rank only"] = "all"
    ranks: int = 2
    adapter_columns: Literal["own", "reversed"] = "own"


@dataclasses.dataclass(frozen=True)
class Steps:
    """State before the first step, and the batches.

    Attributes:
        weights: by name: embedding [V,D], unembedding [D,V], and of layer N ``layers.N.`` router, up, gate, down and,
            if there are any, bias [E], adapters up_a [E,D,R] and up_b [E,R,F].
        tokens: [steps,A,B,T] ids, of A microbatches.
        targets: [steps,A,B,T] ids, -1 where there is no target: such a position is padding.
    """

    weights: Mapping[str, np.ndarray]
    tokens: np.ndarray
    targets: np.ndarray

    @property
    def layers(self) -> int:
        """L."""
        return sum(name.endswith(".router") for name in self.weights)


def kind_of(name: str) -> str:
    """Kind of a parameter."""
    return name.rsplit(".", 1)[-1]


def compute(rule: StepRule, variant: StepVariant, steps: Steps) -> dict[str, np.ndarray]:
    """Every quantity in which a trainer can be compared.

    Returns:
        ``cross_entropy``, ``balance_loss``, ``z_loss`` and ``gradient_norm`` [steps]; ``grad.NAME`` of the first step;
        ``restored.NAME`` after the first step and a restart, if there are several; ``after.NAME`` after the last.
    """
    with jax.enable_x64(True):
        weights = {name: np.asarray(array, np.float64) for name, array in steps.weights.items()}
        adapted = any(kind_of(name) == "up_a" for name in weights)
        kinds = ("up_a", "up_b") if adapted else KINDS
        trained = [name for name in weights if kind_of(name) in kinds]
        moments = {name: (np.zeros_like(weights[name]), np.zeros_like(weights[name])) for name in trained}
        results: dict[str, Any] = {}
        shown: list[dict[str, float]] = []
        for step, batch in enumerate(zip(steps.tokens, steps.targets, strict=True)):
            losses, loads, gradients = _gradients(rule, variant, steps.layers, weights, trained, *batch)
            norm = _norm(variant, gradients)
            shown.append({**losses, "gradient_norm": norm})
            if step == 0:
                results |= {f"grad.{name}": gradients[name] for name in trained}
            factor = min(1.0, rule.clip / norm) if rule.clip and variant.clips else 1.0
            for name in trained:
                gradient = gradients[name] * factor
                weights[name], moments[name] = _adamw(rule, variant, name, weights[name], gradient, moments[name], step)
            for layer, load in enumerate(loads):
                name = f"layers.{layer}.bias"
                if rule.bias_rate and name in weights:
                    weights[name] = weights[name] + rule.bias_rate * np.sign(load.mean() - load)
            if step == 0 and len(steps.tokens) > 1:
                weights = {name: _restored(variant, name, array) for name, array in weights.items()}
                results |= {f"restored.{name}": array for name, array in weights.items()}
        results |= {name: np.asarray([numbers[name] for numbers in shown]) for name in shown[0]}
        return results | {f"after.{name}": array for name, array in weights.items()}


def _gradients(
    rule: StepRule,
    variant: StepVariant,
    layers: int,
    weights: Mapping[str, np.ndarray],
    trained: list[str],
    tokens: np.ndarray,
    targets: np.ndarray,
) -> tuple[dict[str, float], list[np.ndarray], Arrays]:
    """Losses, loads [E] of each layer, and gradients, of the microbatches [A,B,T] of one step."""
    microbatches, rows, _ = tokens.shape
    ids, wanted = tokens.reshape(-1, tokens.shape[-1]), targets.reshape(-1, tokens.shape[-1])
    mask = wanted >= 0
    parts = [slice(i * rows, (i + 1) * rows) for i in range(microbatches)]
    scope = [slice(None)] if rule.balance_scope == "step" else parts
    shares = _shares(variant, [int(mask[part].sum()) for part in scope])
    per_token = mask * _loss_weights(variant, mask, parts)
    loads: list[np.ndarray] = []

    def objective(trainable: Mapping[str, jax.Array], inputs: list[np.ndarray] | None) -> Any:
        arrays = {name: jnp.asarray(array) for name, array in weights.items()} | dict(trainable)
        x = arrays["embedding"][ids]
        balance, z, reached = jnp.zeros(()), jnp.zeros(()), []
        for index in range(layers):
            reached.append(x)
            own = _layer_arrays(rule, variant, arrays, f"layers.{index}.")
            known = np.asarray(x) if inputs is None else inputs[index]
            outputs = []
            for part, share in zip(scope, shares, strict=True):
                numbers: Arrays = {"gate": None, **_layer_arrays(rule, variant, weights, f"layers.{index}.")}
                bias = weights.get(f"layers.{index}.bias")
                layer = Layer(x=known[part], mask=mask[part], logits=None, bias=bias, **numbers)
                decisions = equations.decide(rule.layer, Variant(), layer)
                found = equations.forward(rule.layer, Variant(), layer, decisions, {**own, "x": x[part]})
                balance, z = balance + share * found["balance_loss"], z + share * found["z_loss"]
                outputs.append(found["y"] * mask[part][..., None])
                if inputs is not None:
                    counts = np.bincount(decisions.expert_index[layer.mask].ravel(), minlength=layer.num_experts)
                    loads.append(counts)
            x = x + jnp.concatenate(outputs)
        log_probs = jax.nn.log_softmax(x @ arrays["unembedding"], axis=-1)
        chosen = jnp.take_along_axis(log_probs, np.maximum(wanted, 0)[..., None], axis=-1)[..., 0]
        cross_entropy = -jnp.sum(chosen * per_token)
        total = cross_entropy + rule.layer.balance_weight * balance + rule.layer.z_weight * z
        return total, ({"cross_entropy": cross_entropy, "balance_loss": balance, "z_loss": z}, reached)

    trainable = {name: jnp.asarray(weights[name]) for name in trained}
    reached = [np.asarray(x) for x in objective(trainable, None)[1][1]]
    differentiate: Callable[..., Any] = jax.grad(objective, has_aux=True)
    gradients, (losses, _) = differentiate(trainable, reached)
    by_layer = [loads[index * len(scope) : (index + 1) * len(scope)] for index in range(layers)]
    counted = [counts[-1] if variant.bias_microbatch else np.sum(counts, axis=0) for counts in by_layer]
    named = {name: float(value) for name, value in losses.items()}
    return named, counted, {name: np.asarray(array) for name, array in gradients.items()}


def _layer_arrays(rule: StepRule, variant: StepVariant, arrays: Mapping[str, Any], prefix: str) -> Arrays:
    """Router and experts of a layer, adapters added."""
    own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    own.pop("bias", None)
    if "up_a" in own:
        a, b = own.pop("up_a"), own.pop("up_b")
        a = a if variant.adapter_columns == "own" else a[..., ::-1]
        own["up"] = own["up"] + rule.adapter_scale * a @ b
    return own


def _shares(variant: StepVariant, counts: list[int]) -> list[float]:
    """Weights of the balance losses of parts with so many tokens."""
    if variant.balance_mean == "sum":
        return [1.0] * len(counts)
    return [count / sum(counts) if variant.balance_mean == "tokens" else 1 / len(counts) for count in counts]


def _loss_weights(variant: StepVariant, mask: np.ndarray, parts: list[slice]) -> np.ndarray:
    """[A·B,1] weights of targets in the loss."""
    if variant.loss_mean != "microbatches":
        count = mask.sum() if variant.loss_mean == "targets" else mask.size
        return np.full((len(mask), 1), 1 / count)
    return np.concatenate([np.full((len(mask[part]), 1), 1 / len(parts) / mask[part].sum()) for part in parts])


def _norm(variant: StepVariant, gradients: Mapping[str, np.ndarray]) -> float:
    squares = 0.0
    for name, gradient in gradients.items():
        squares += float(np.sum(gradient**2)) * (variant.expert_norm if kind_of(name) in EXPERTS else 1.0)
    return squares**0.5


def _adamw(
    rule: StepRule,
    variant: StepVariant,
    name: str,
    weight: np.ndarray,
    gradient: np.ndarray,
    moments: tuple[np.ndarray, np.ndarray],
    step: int,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """AdamW (Loshchilov and Hutter 2019), algorithm 2; steps count from 0."""
    decay = rule.weight_decay * weight if kind_of(name) in rule.decayed else np.zeros_like(weight)
    gradient = gradient + decay if variant.coupled_decay else gradient
    first = rule.b1 * moments[0] + (1 - rule.b1) * gradient
    second = rule.b2 * moments[1] + (1 - rule.b2) * gradient**2
    update = first / (1 - rule.b1 ** (step + 1)) / (np.sqrt(second / (1 - rule.b2 ** (step + 1))) + rule.eps)
    update = update if variant.coupled_decay else update + decay
    if kind_of(name) in variant.lost:
        return weight, (first, second)
    return weight - rule.learning_rate * update, (first, second)


def _restored(variant: StepVariant, name: str, array: np.ndarray) -> np.ndarray:
    if variant.restored == "all" or kind_of(name) not in EXPERTS:
        return array
    kept = array[: len(array) // variant.ranks]
    if variant.restored == "first rank everywhere":
        return np.concatenate([kept] * variant.ranks)
    return np.concatenate([kept, np.zeros_like(array[len(kept) :])])
