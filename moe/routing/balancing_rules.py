"""Balancing without a loss: rules that update a state of each router after every optimizer step, without a gradient.

A gate's ``balancing`` is one of them, or one of a user's module. The state is any pytree of [E] float32 arrays. Models
keep it as one array, or as a dict of arrays, beside the router's parameters.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from moe.system.fields import check_fields, setting

#: A :class:`moe.routing.balancing.LayerReport`, whose module imports this one.
LayerReport = Any
#: Pytree of [E] arrays of one router, or of [R,E] arrays of the R layers that are stacked.
State = Any


@dataclasses.dataclass(frozen=True)
class BalancingRule:
    """Base of the rules: a frozen dataclass whose fields the update reads."""

    #: Short name of a rule of the package.
    short: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_fields(self, "balancing.")

    @property
    def name(self) -> str:
        """Name in records of runs: of the package's rules, or module:class."""
        return self.short or f"{type(self).__module__}:{type(self).__qualname__}"

    def first_state(self, num_experts: int) -> State:
        """State before the first step, for E columns of a router; 0 of each expert unless overridden."""
        return jnp.zeros((num_experts,), jnp.float32)

    def signal(self, layers: LayerReport, experts_per_token: int) -> Any:
        """Part of a step's reports that :meth:`next_state` reads.

        Args:
            layers: reports of all MoE layers, stacked.
            experts_per_token: K.

        Returns:
            A pytree of arrays with leading axis [L], of which each layer gets its part; by default the reports.
        """
        del experts_per_token
        return layers

    def next_state(self, state: State, report: Any) -> State:
        """State after a step; a pure function.

        Args:
            state: arrays of shape [..., E]; equal layers are updated together, along the leading axes.
            report: of these layers, with the same leading axes: a LayerReport, or their part of :meth:`signal`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method next_state(state, report)")

    def selection_bias(self, state: State) -> Float[Array, " E"] | None:
        """Bias that is added to the scores for selection only (``GateInputs.selection_bias``): the state, if it is one
        array; a rule with several arrays chooses. None: none."""
        return state if isinstance(state, jax.Array) else None

    def penalty(self, state: State) -> Float[Array, ""] | None:
        """Strength of the sparsity penalty (:func:`moe.routing.balancing.sparsity_penalty`); None: there is none."""
        del state


@dataclasses.dataclass(frozen=True)
class Sign(BalancingRule):
    """b_e + u·sign(mean load − load_e), a selection bias (loss-free balancing 2024, algorithm 1)."""

    rate: float = setting(0.0, least=0)  # u
    short = "sign"

    def signal(self, layers: LayerReport, experts_per_token: int) -> Float[Array, "*layers E"]:
        """Signs of the loads' errors."""
        load = layers.expert_load
        return jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)

    def next_state(self, state: Float[Array, "*layers E"], report: Float[Array, "*layers E"]) -> Array:
        """Move by the signs."""
        return state + self.rate * report


@dataclasses.dataclass(frozen=True)
class Threshold(BalancingRule):
    """Moving average of the selection bias that would have balanced the step (``GateOutput.needed_bias``)."""

    rate: float = setting(0.0, least=0)  # u, share of the way in a step
    short = "threshold"

    def signal(self, layers: LayerReport, experts_per_token: int) -> Float[Array, "*layers E"]:
        """Selection biases that would have balanced the step."""
        return layers.sums.bias_target

    def next_state(self, state: Float[Array, "*layers E"], report: Float[Array, "*layers E"]) -> Array:
        """Go the share u of the way."""
        return state + self.rate * (report - state)


@dataclasses.dataclass(frozen=True)
class Quantile(Threshold):
    """The same, mean-centred (Kimi K3 2026, section 2.3.3)."""

    short = "quantile"

    def next_state(self, state: Float[Array, "*layers E"], report: Float[Array, "*layers E"]) -> Array:
        """Go the share u of the way, and centre."""
        bias = super().next_state(state, report)
        return bias - jnp.mean(bias, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class RunningThreshold(BalancingRule):
    """The average of :class:`Threshold`, corrected for its start as Adam's: weights (1 − u)^i of the steps divided by
    their sum w, so b ← b + u/w·(target − b), w ← w + u·(1 − w)."""

    rate: float = setting(0.0, least=0)  # u, share of the way in a step
    short = "running_threshold"

    def first_state(self, num_experts: int) -> dict[str, Float[Array, " E"]]:
        """b and w, zeros."""
        zeros = jnp.zeros((num_experts,), jnp.float32)
        return {"bias": zeros, "weight": zeros}

    def signal(self, layers: LayerReport, experts_per_token: int) -> Float[Array, "*layers E"]:
        """Selection biases that would have balanced the step."""
        return layers.sums.bias_target

    def next_state(self, state: dict[str, Array], report: Float[Array, "*layers E"]) -> dict[str, Array]:
        """Average."""
        weight = state["weight"] + self.rate * (1 - state["weight"])
        share = self.rate / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)
        return {"bias": state["bias"] + share * (report - state["bias"]), "weight": weight}

    def selection_bias(self, state: dict[str, Array]) -> Float[Array, " E"]:
        """b."""
        return state["bias"]


@dataclasses.dataclass(frozen=True)
class Momentum(BalancingRule):
    """A selection bias that moves by a soft-clamped momentum of the loads' relative errors (SMEBU: Trinity 2026, arXiv
    2602.17004): Δ_e = u·tanh(κ·(mean load − load_e) / mean load), less its mean over experts; m ← β·m + (1 − β)·Δ;
    b ← b + m."""

    rate: float = setting(0.0, least=0)  # u
    decay: float = setting(0.5, share=True)  # β
    clamp: float = setting(2.0, above=0)  # κ
    short = "momentum"

    def first_state(self, num_experts: int) -> dict[str, Float[Array, " E"]]:
        """b and m, zeros."""
        zeros = jnp.zeros((num_experts,), jnp.float32)
        return {"bias": zeros, "momentum": zeros}

    def signal(self, layers: LayerReport, experts_per_token: int) -> Float[Array, "*layers E"]:
        """Errors of the loads, relative to their mean."""
        return 1 - layers.expert_load / jnp.mean(layers.expert_load, axis=-1, keepdims=True)

    def next_state(self, state: dict[str, Array], report: Float[Array, "*layers E"]) -> dict[str, Array]:
        """Update the momentum, and move by it."""
        clamped = jnp.tanh(self.clamp * report)
        step = self.rate * (clamped - jnp.mean(clamped, axis=-1, keepdims=True))
        momentum = self.decay * state["momentum"] + (1 - self.decay) * step
        return {"bias": state["bias"] + momentum, "momentum": momentum}

    def selection_bias(self, state: dict[str, Array]) -> Float[Array, " E"]:
        """b."""
        return state["bias"]


@dataclasses.dataclass(frozen=True)
class Centroids(BalancingRule):
    """Online k-means: an expert's centroid is the moving average of the mean of the tokens sent to it in a step, and
    stays where there are none; beside a selection bias as :class:`Sign` (Ahrac et al. 2026, arXiv 2605.12476)."""

    rate: float = setting(0.0, least=0)  # u of the bias
    centroid_rate: float = setting(0.01, share=True)  # 1 − α
    short = "centroids"

    def first_state(self, num_experts: int) -> dict[str, Float[Array, " E"]]:
        """The bias, zeros; a router that knows D adds ``centroids`` [E,D], whose place this holds without a D."""
        return {"bias": jnp.zeros((num_experts,), jnp.float32), "centroids": jnp.zeros((num_experts, 0), jnp.float32)}

    def signal(self, layers: LayerReport, experts_per_token: int) -> dict[str, Array]:
        """Signs of the loads' errors, and the sums [L,E,D] and numbers [L,E,1] of the tokens sent."""
        routed = layers.sums.routed
        signs = Sign(self.rate).signal(layers, experts_per_token)
        return {"signs": signs, "sums": routed[..., :-1], "counts": routed[..., -1:]}

    def next_state(self, state: dict[str, Array], report: dict[str, Array]) -> dict[str, Array]:
        """Move the bias by the signs and the centroids to the means."""
        counts, centroids = report["counts"], state["centroids"]
        means = report["sums"] / jnp.maximum(counts, jnp.finfo(jnp.float32).tiny)
        moved = centroids + self.centroid_rate * (means - centroids)
        bias = Sign(self.rate).next_state(state["bias"], report["signs"])
        return {"bias": bias, "centroids": jnp.where(counts > 0, moved, centroids)}

    def selection_bias(self, state: dict[str, Array]) -> Float[Array, " E"]:
        """The bias."""
        return state["bias"]


@dataclasses.dataclass(frozen=True)
class Penalty(BalancingRule):
    """λ·(1 + u)^sign(mean number of active experts − K), the strength of a sparsity penalty, one for all layers (ReMoE
    2024, equation 8); at least float32's smallest normal number, since 0 would never grow again."""

    rate: float = setting(0.0, least=0)  # u
    short = "penalty"

    def first_state(self, num_experts: int) -> Float[Array, " E"]:
        """1e-8 (ReMoE 2024, section 3.3), the same for every expert."""
        return jnp.full((num_experts,), 1e-8, jnp.float32)

    def signal(self, layers: LayerReport, experts_per_token: int) -> Float[Array, "*layers E"]:
        """Sign of the error of the mean number of active experts."""
        sign = jnp.sign(jnp.mean(layers.active_experts) - experts_per_token)
        return jnp.broadcast_to(sign, layers.expert_load.shape)

    def next_state(self, state: Float[Array, "*layers E"], report: Float[Array, "*layers E"]) -> Array:
        """Multiply by 1 + u or divide by it."""
        return jnp.maximum(state * (1 + self.rate) ** report, jnp.finfo(jnp.float32).tiny)

    def selection_bias(self, state: Float[Array, " E"]) -> None:
        """None: the penalty does not move the choice."""

    def penalty(self, state: Float[Array, " E"]) -> Float[Array, ""]:
        """λ."""
        return state[0]


#: How the selection bias of a top-k gate moves, by the value of its field ``bias``; each rule's first field is u.
BiasRule = Literal["none", "sign", "quantile", "momentum"]
BIAS_RULES: Mapping[str, Callable[[float], BalancingRule]] = types.MappingProxyType(
    {
        "sign": Sign,
        "quantile": Quantile,
        "momentum": Momentum,
    }
)


def stored(state: State) -> Array | dict[str, Array]:
    """A state as models keep it: one array, or a dict of arrays by their place in the pytree."""
    if isinstance(state, jax.Array):
        return state
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def restored(rule: BalancingRule, kept: Array | dict[str, Array]) -> State:
    """The state that :func:`stored` made."""
    if not isinstance(kept, dict):
        return kept
    like = jax.eval_shape(lambda: rule.first_state(1))
    names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(like)]
    return jax.tree.unflatten(jax.tree.structure(like), [kept[name] for name in names])


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="_")
