"""Assignment of layers to pipeline stages, and the transfer of their weights from where they are stored."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from moe.config import Config, ModelConfig
from moe.config.layer_kinds import layer_kinds
from moe.models.segments import segments
from moe.parallel.mesh import axis_of, on_mesh
from moe.parallel.parameters import WEIGHTS_SCOPE

#: Scope of a conditional, with the number of turns that take its branch and of all turns, which the planner reads.
TAKEN_SCOPE = "taken_{}_of_{}"


def pipelined_segment(config: ModelConfig) -> int:
    """Index of the segment that is pipelined: the one with most layers."""
    runs = segments(layer_kinds(config))
    return max(range(len(runs)), key=lambda i: len(runs[i][0]) * runs[i][1])


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Assignment of the pipelined segment's layers to stages: stage s has the groups s, s + S, s + 2·S ...

    Attributes:
        stages: S.
        rounds: C, number of groups of a stage.
        repeats: number of repeats of the segment's unit in one group.
    """

    stages: int
    rounds: int
    repeats: int

    @classmethod
    def of(cls, config: Config, stages: int) -> Schedule:
        """The schedule of a run with this number of stages."""
        rounds = config.train.pipeline_rounds
        _, repeats = segments(layer_kinds(config.model))[pipelined_segment(config.model)]
        return cls(stages, rounds, repeats // (stages * rounds))

    @property
    def pipelined(self) -> int:
        """Repeats that the stages run; those after them belong to no stage."""
        return self.stages * self.rounds * self.repeats

    def assign(self, x: Array, spec: P) -> tuple[Array, Array]:
        """The repeats of a stage, in the order in which it runs them, and those of no stage.

        Args:
            x: this device's part of an array of all repeats.
            spec: how it is stored (:func:`moe.parallel.parameters.parameter_specs`).
        """
        whole = on_mesh(P(*(None if axes == "pipeline" else axes for axes in spec)))
        others = {*jax.sharding.get_abstract_mesh().axis_names} - {axis_of("pipeline")}
        spread = functools.partial(jax.shard_map, out_specs=whole, axis_names=others, check_vma=False)
        own = functools.partial(self._own, spec=spec)

        # XLA gathers over all axes what is sent along a Manual one, so here all axes are Manual. As the transpose of a
        # shard_map, the gradients would be summed over axes that split nothing, where they are already equal.
        @jax.custom_vjp
        def assigned(x: Array) -> tuple[Array, Array]:
            return spread(own, in_specs=whole)(x)

        def back(x: Array, gradient: tuple[Array, Array]) -> tuple[Array]:
            return jax.vjp(own, x)[1](gradient)

        assigned.defvjp(lambda x: (assigned(x), x), spread(back, in_specs=(whole, whole)))
        with jax.named_scope(f"{WEIGHTS_SCOPE}stages"):
            return assigned(x)

    def _own(self, x: Array, spec: P) -> tuple[Array, Array]:
        axis = axis_of("pipeline")
        if "pipeline" in spec[:1]:
            return self._regrouped(x), x[:0]
        # [C,S,n] → [S,C·n]
        own = np.arange(self.pipelined).reshape(self.rounds, self.stages, -1).swapaxes(0, 1).reshape(self.stages, -1)
        rest = x[self.pipelined :]
        if "pipeline" not in spec:
            return x[jnp.asarray(own)[lax.axis_index(axis)]], rest
        dim = spec.index("pipeline")
        parts = lax.all_to_all(x[own], axis, 0, dim + 1, tiled=True)
        return jnp.squeeze(parts, 0), lax.all_gather(rest, axis, axis=dim, tiled=True)

    def _regrouped(self, x: Array) -> Array:
        """:meth:`assign` where stages divide the repeats, and device p stores the groups p·C ... p·C + C - 1."""
        if self.rounds == 1:
            return x
        # Every device sends equally many groups to every stage: first the stage's own, then arbitrary ones.
        most = -(-self.rounds // self.stages)
        sent = np.zeros((self.stages, self.stages, most), int)
        received = np.zeros((self.stages, self.rounds), int)
        for device in range(self.stages):
            for stage in range(self.stages):
                groups = [device * self.rounds + i for i in range(self.rounds)]
                groups = [group for group in groups if group % self.stages == stage]
                sent[device, stage, : len(groups)] = [group % self.rounds for group in groups]
                received[stage, [group // self.stages for group in groups]] = device * most + np.arange(len(groups))
        place = lax.axis_index(axis_of("pipeline"))
        groups = x.reshape(self.rounds, self.repeats, *x.shape[1:])[jnp.asarray(sent)[place]]
        groups = lax.all_to_all(groups, axis_of("pipeline"), 0, 0)  # [S,most,n,...], of each device
        return groups.reshape(-1, *groups.shape[2:])[jnp.asarray(received)[place]].reshape(x.shape)
