"""The training state that a checkpoint holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
from jax import Array

from moe.config import Config
from moe.models.adapters import merge
from moe.models.factory import abstract_parameters, abstract_selection_biases, abstract_trained
from moe.parallel.parameters import optimizer_specs, parameter_specs
from moe.parallel.partition_specs import REPLICATED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All arrays that a resumed run needs.

    Attributes:
        step: [] int32, steps done, skipped updates included.
        parameters: nested dict of float32 arrays.
        biases: nested dict of the routers' selection biases, which receive no gradient; empty for most gates.
        optimizer: Optax state.
        rng: [2] uint32, key of the run's routing noise; step n uses fold_in(rng, n).
    """

    step: Array
    parameters: dict[str, Any]
    biases: dict[str, Any]
    optimizer: Any
    rng: Array

    @property
    def variables(self) -> dict[str, Any]:
        """Parameters and biases in one nested dict: everything the model reads."""
        return join(self.parameters, self.biases)

    @property
    def stored(self) -> TrainState:
        """Content of a checkpoint."""
        return self

    def restored(self, stored: TrainState) -> TrainState:
        """The state with the content of a checkpoint, as :attr:`stored` made it."""
        return stored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedState(TrainState):
    """The state of a run whose parameters are adapters (:mod:`moe.models.adapters`) of a base.

    Attributes:
        base: nested dict of float32 arrays, neither trained nor saved.
        scale: alpha / rank.
    """

    base: dict[str, Any]
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def variables(self) -> dict[str, Any]:
        """Merged parameters, and biases."""
        return join(merge(self.base, self.parameters, self.scale), self.biases)

    @property
    def stored(self) -> TrainState:
        """Content of a checkpoint: everything but the base."""
        return TrainState(self.step, self.parameters, self.biases, self.optimizer, self.rng)

    def restored(self, stored: TrainState) -> AdaptedState:
        """The state of a checkpoint, with this base."""
        fields = {field.name: getattr(stored, field.name) for field in dataclasses.fields(TrainState)}
        return dataclasses.replace(self, **fields)


def join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested dicts that share no leaf."""
    joined = dict(first)
    for name, value in second.items():
        joined[name] = join(joined[name], value) if name in joined else value
    return joined


def set_schedule_step(optimizer: Any, step: Any) -> Any:
    """Set the step counts of schedules in an Optax state; moments and their counts are unchanged."""

    def move(node: Any) -> Any:
        if isinstance(node, optax.ScaleByScheduleState):
            return node._replace(count=step)
        if isinstance(node, optax.InjectStatefulHyperparamsState):
            schedules = {name: state._replace(count=step) for name, state in node.hyperparams_states.items()}
            inner = set_schedule_step(node.inner_state, step)
            return node._replace(count=step, hyperparams_states=schedules, inner_state=inner)
        return node

    kinds = (optax.ScaleByScheduleState, optax.InjectStatefulHyperparamsState)
    return jax.tree.map(move, optimizer, is_leaf=lambda node: isinstance(node, kinds))


def continue_at(state: TrainState, step: int) -> TrainState:
    """An earlier state renumbered to a later step: routing noise and learning rate follow the new step."""
    number = np.asarray(step, np.int32)
    moved = dataclasses.replace(state, step=number, optimizer=set_schedule_step(state.optimizer, number))
    # A buffer for each count, of which Muon has several: the train step donates its arguments.
    return jax.tree.map(lambda leaf: jax.device_put(leaf, state.step.sharding) if leaf is number else leaf, moved)


def state_specs(config: Config, shapes: TrainState) -> TrainState:
    """PartitionSpecs of a state of these shapes."""
    parameters = parameter_specs(abstract_trained(config.model, config.lora))
    specs = dataclasses.replace(
        shapes,
        step=REPLICATED,
        parameters=parameters,
        biases=parameter_specs(abstract_selection_biases(config.model)),
        optimizer=optimizer_specs(shapes.parameters, parameters, shapes.optimizer),
        rng=REPLICATED,
    )
    if not isinstance(specs, AdaptedState):
        return specs
    return dataclasses.replace(specs, base=parameter_specs(abstract_parameters(config.model)))
