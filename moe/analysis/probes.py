"""Held-out loss of a frozen model under changed routing.

A :data:`Probe` gives loss per domain for any variables of a model; several seeds share its compiled program. Compare:

- :func:`masked` of 1, 2, … experts with :func:`masked` of 0 (DeepSeekMoE 2024, section 4.5, figure 4);
- :func:`shared_for_routed` with :func:`masked` of 0 (same section: 1.808 → 2.414);
- :func:`eval_capacity` of different factors (ST-MoE 2022, section 4.1).

The first two are dropless, so that they measure the choice of experts and not their capacity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from moe.config import Config, ConfigError, MoEConfig
from moe.routing.balancing_rules import BalancingRule, Penalty, RunningThreshold, Threshold
from moe.routing.interface import Gate, GateInputs, GateOutput, Scored, top_k
from moe.training.evaluation import Heldout, evaluate
from moe.training.step import Program, build

#: (variables, held-out batches) → nats per token by domain, and under "all".
Probe = Callable[[dict[str, Any], Heldout], dict[str, float]]


def eval_capacity(config: Config, mesh: Mesh, factor: float) -> Probe:
    """Probe with another ``model.moe.capacity.eval``.

    Raises:
        ConfigError: the model has no capacity, or the factor is invalid.
    """
    if config.model.moe.gate is None or config.model.moe.dispatch == "dropless":
        raise ConfigError(
            f"model.moe.gate={config.model.moe.gate_name!r}, model.moe.dispatch={config.model.moe.dispatch!r}: "
            "no capacity to change; use an MoE model with the dispatch gather or einsum"
        )
    # A fixed capacity would take the factor's place.
    capacity = dataclasses.replace(config.model.moe.capacity, eval=float(factor), fixed=0)
    program = _build(_with_moe(config, capacity=capacity), mesh)
    return lambda variables, heldout: _losses(program, variables, heldout)


def shared_for_routed(config: Config, mesh: Mesh) -> Probe:
    """Probe without the shared expert, replaced by additional routed experts of the same total size.

    Raises:
        ConfigError: the model has no shared expert, or too few routed ones.
    """
    moe = config.model.moe
    if not moe.shared_d_ff:
        raise ConfigError("model.moe.shared_d_ff=0: there is no shared expert to drop")
    more = max(1, round(moe.shared_d_ff / moe.d_ff))
    without = _with_moe(
        dropless(config), shared_d_ff=0, shared_gate=False, gate=_with_k(moe, moe.experts_per_token + more)
    )
    program = _build(without, mesh)
    return lambda variables, heldout: _losses(program, _without_key(variables, "shared"), heldout)


def fewer_routed(config: Config, mesh: Mesh, experts: int) -> Probe:
    """Probe with `experts` fewer routed experts per token, to compare with :func:`shared_for_routed`.

    Raises:
        ConfigError: no expert would be left, or the gate has a fixed K.
    """
    moe = config.model.moe
    program = _build(_with_moe(dropless(config), gate=_with_k(moe, moe.experts_per_token - experts)), mesh)
    return lambda variables, heldout: _losses(program, variables, heldout)


def masked(config: Config, mesh: Mesh, experts: int) -> Probe:
    """Probe that masks each token's ``experts`` most probable experts in every layer; K of the others are chosen.

    Probabilities and weights are those of a router over the others: a softmax sums to 1 over E − ``experts``.

    Args:
        config: config of a sparse model whose tokens choose experts by a router.
        mesh: mesh of the variables.
        experts: number of masked experts; 0 leaves the model unchanged.

    Raises:
        ConfigError: tokens do not choose experts in that model, or fewer than K would be left.
    """
    moe = config.model.moe
    gate = moe.gate
    if gate is None or not gate.routes_by_logits or gate.looks_ahead or moe.layer_gates:
        raise ConfigError(
            f"model.moe.gate={moe.gate_name!r}: experts can be masked only where tokens choose by a router"
        )
    if not 0 <= experts <= moe.num_experts - moe.experts_per_token:
        raise ConfigError(
            f"masked experts={experts}: must be from 0 to num_experts - K = {moe.num_experts - moe.experts_per_token}"
        )
    program = _build(dropless(config), mesh, gate=Masked(gate=gate, experts=experts) if experts else gate)
    return lambda variables, heldout: _losses(program, variables, heldout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masked(Gate):
    """A gate over all but the ``experts`` most probable experts of each token."""

    gate: Gate
    experts: int

    def route(self, router_logits: Array, inputs: GateInputs) -> GateOutput:
        """Route among the other experts."""
        gate, bias = self.gate, inputs.selection_bias
        scores = gate.scores(router_logits) + bias if bias is not None and isinstance(gate, Scored) else router_logits
        _, best = top_k(scores, self.experts)
        hidden = jnp.any(best[..., None] == jnp.arange(router_logits.shape[-1]), axis=-2)  # [G,S,experts,E] → [G,S,E]
        if bias is not None:  # a sigmoid of 0 could still win by its bias
            inputs = dataclasses.replace(inputs, selection_bias=jnp.where(hidden, -1e9, bias))
        return gate.route(jnp.where(hidden, -1e9, router_logits), inputs)

    @property
    def balancing(self) -> BalancingRule | None:
        """Rule of the gate."""
        return self.gate.balancing


def _build(config: Config, mesh: Mesh, gate: Gate | None = None) -> Program:
    with jax.set_mesh(mesh):
        return build(config, mesh, gate=gate)


def _losses(program: Program, variables: dict[str, Any], heldout: Heldout) -> dict[str, float]:
    with jax.set_mesh(program.mesh):
        return {domain: result["loss"] for domain, result in evaluate(program, variables, heldout).items()}


def _with_moe(config: Config, **fields: Any) -> Config:
    moe = dataclasses.replace(config.model.moe, **fields)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))


def _with_k(moe: MoEConfig, k: int) -> Gate:
    """The gate with another number of experts per token.

    Raises:
        ConfigError: the gate has a fixed one.
    """
    gate = moe.gate
    # ReMoE's k is the target of its penalty, that of expert thresholds the target of their updates: no choice reads it.
    if gate is None or not gate.sets_k or isinstance(gate.balancing, (Penalty, Threshold, RunningThreshold)):
        raise ConfigError(f"model.moe.gate={moe.gate_name!r}: its number of experts per token cannot be changed")
    return dataclasses.replace(gate, k=k)


def dropless(config: Config) -> Config:
    """The config with a dropless dispatch: every token reaches all experts that it chooses."""
    capacity = dataclasses.replace(config.model.moe.capacity, fixed=0)  # only a dispatch with buffers takes one
    return _with_moe(config, dispatch="dropless", overflow_to_next=False, capacity=capacity)


def _without_key(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """Copy a nested dict without the branches of that name."""
    return {
        name: _without_key(branch, key) if isinstance(branch, dict) else branch
        for name, branch in tree.items()
        if name != key
    }
