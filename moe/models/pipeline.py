"""Pipeline parallelism: layers split into stages over the mesh axis ``pipeline``, through which microbatches pass.

The equal layers that most of a model consists of (its longest segment) are pipelined, except the last few where
stages do not divide them. What comes before and after belongs to no stage: there the devices of the axis share the
microbatches. All of it is one ``shard_map`` that is manual over this axis only. The layers inside are traced as on a
mesh without the axis, with their kernels, exchanges and gathers as they are; under ``vmap`` over a stacked axis of
stages (GSPMD 2021, section 3.3, praxis, MaxText) each of them would need a batched form.

Microbatch m has its home on device m mod S of the axis. Blocks of S microbatches enter one after the other and pass the
ring of S stages C times before the next block enters (MaxText's circular schedule): a step takes C·A + S - 1 turns for
A microbatches, and a stage is idle in S - 1 of them, the bubble.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from moe.config import Config
from moe.config.layer_kinds import layer_kinds
from moe.layers.call import Call
from moe.layers.inputs import Rows, StackSite
from moe.models.decoder import Output, Transformer
from moe.models.factory import variable_specs
from moe.models.segments import LayerStates, segments
from moe.models.stack import Flow, Segment, joined, scan_segment
from moe.models.stages import TAKEN_SCOPE, Schedule, pipelined_segment
from moe.models.state import TrainState
from moe.parallel import partition_specs
from moe.parallel.mesh import axis_of, axis_size, constrain
from moe.parallel.parameters import read_as
from moe.system.fields import require

#: (model, output, microbatch, number of targets) → (share of the loss, (numbers to sum, reports that lead with layers))
Loss = Callable[[Any, Output, dict[str, Array], Array], tuple[Array, tuple[Any, Any]]]


def check(config: Config, sizes: Mapping[str, int]) -> None:
    """Check that a run can be split into stages.

    Args:
        sizes: devices per axis (``mesh.shape``).

    Raises:
        ConfigError: it cannot; the message says what to change.
    """
    stages = sizes.get("pipeline", 1)
    if stages == 1:
        return
    train, field = config.train, f"with mesh.pipeline={stages}"
    unit, repeats = segments(layer_kinds(config.model))[pipelined_segment(config.model)]
    groups = stages * train.pipeline_rounds
    equal = f"{repeats} equal layers" if len(unit) == 1 else f"{repeats} equal groups of {len(unit)} layers"
    product = f"mesh.pipeline x train.pipeline_rounds = {groups}"
    if repeats % stages:
        fits, allowed = repeats >= groups, f"its {equal} must be at least {product}"
    else:
        fits, allowed = repeats % groups == 0, f"its {equal}, divisible by {stages}, must be a multiple of {product}"
    require(fits, "model.num_layers", config.model.num_layers, allowed)
    divides = train.accumulation_steps % stages == 0
    allowed = f"must be a multiple of mesh.pipeline={stages}, since microbatches pass through its stages"
    require(divides, "train.accumulation_steps", train.accumulation_steps, allowed)
    # XLA of JAX 0.12 fails to partition a lookup in an array whose rows are split, within a Manual axis.
    for name, value, only in (
        ("mesh.tensor", sizes.get("tensor", 1), 1),
        ("model.encoder_layers", config.model.encoder_layers, 0),
        ("model.memory.layers", config.model.memory.layers, ()),
        ("distill.teacher", config.distill.teacher, ""),
        ("lora.rank", config.lora.rank, 0),
        ("train.rampup_rows", train.rampup_rows, ()),
    ):
        require(value == only, name, value, f"must be {only!r} {field}")
    able, objective = "pipeline" in config.objective.abilities, config.data.objective
    require(able, "data.objective", objective, f"must not be {objective!r} {field}")
    scope = config.model.moe.losses.scope
    require(scope != "step", "model.moe.losses.scope", scope, f"must not be 'step' {field}")


def _shift(tree: Any, by: int) -> Any:
    """Send arrays from each device of the axis to the one ``by`` places further on the ring."""
    size = lax.axis_size(axis_of("pipeline"))
    pairs = [(i, (i + by) % size) for i in range(size)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis_of("pipeline"), pairs), tree)


class Pipeline:
    """A model's layers, within ``shard_map`` over the axis; K·S microbatches, of which each device holds K."""

    def __init__(self, model: Transformer, schedule: Schedule, rng: Array, signals: tuple[str, ...]):
        """Set up.

        Args:
            model: this device's parameters: for the pipelined segment, the stage's layers in :meth:`run` and those of
                no stage in :meth:`finish`; all of everything else.
            schedule: of the pipelined segment.
            rng: key of the step.
            signals: names of what layers report.
        """
        self.model, self.schedule, self.rng, self.signals = model, schedule, rng, signals
        self.index = pipelined_segment(model.config)
        self.segment: Segment = getattr(model, f"segment_{self.index}")
        #: Number of the segment's first layer.
        self.first = sum(len(unit) * repeats for unit, repeats in segments(model.kinds)[: self.index])
        self.settings: dict[str, Any] = {"remat": model.config.remat, "per_trip": model.config.layers_per_trip}

    def run(self, x: Array, rows: Rows, numbers: Array, casts: Transformer) -> tuple[Flow, LayerStates]:
        """All layers up to the last pipelined one.

        Args:
            x: embedded tokens of this device's microbatches, [K,b,T,D].
            rows: of these microbatches, [K,b,T].
            numbers: of these microbatches.
            casts: model from which the stage's parameters are read; the gradients go to those of ``self.model``.

        Returns:
            What passes from layer to layer, and what the layers report, each leading with K.
        """

        def begin(_: None, inputs: tuple[Array, Rows, Array]) -> tuple[None, Any]:
            x, rows, number = inputs
            call = self.call(rows, number)
            x = self.model.outer_dropout(call).at(StackSite.EMBEDDING)(x)
            return None, self.model.scan(
                self.model.body(call), self.model.begin(x), of=range(self.index), **self.settings
            )

        _, (flow, before) = lax.scan(begin, None, (x, rows, numbers))
        flow, pipelined = self._stages(flow, rows, nnx.state(getattr(casts, f"segment_{self.index}")))
        return flow, [*before, pipelined]

    def call(self, rows: Rows, number: Array) -> Call:
        """Call of the microbatch of this number."""
        return Call(rows, train=True, rng=jax.random.fold_in(self.rng, number), signals=self.signals)

    def finish(self, flow: Flow, states: LayerStates, rows: Rows, number: Array) -> Output:
        """The remaining layers and the result of one microbatch; arguments are those that :meth:`run` takes and
        returns, without their leading axis."""
        model, call = self.model, self.call(rows, number)
        body = model.body(call)
        rest, further = self.segment, []
        if len(jax.tree.leaves(nnx.state(rest))[0]):
            first = self.first + self.schedule.pipelined * rest.size
            flow, reports = scan_segment(rest, body, flow, [None] * rest.size, first, **self.settings)
            further = [reports]
        after = range(self.index + 1, len(segments(model.kinds)))
        flow, others = model.scan(body, flow, of=after, **self.settings)
        further += others
        x = model.end(flow, model.outer_dropout(call))
        return model.output(x, joined([*states, *further]), call)

    def _stages(self, flow: Flow, rows: Rows, casts: nnx.State) -> tuple[Flow, list[Any]]:
        """The pipelined segment: [K,b,T,D] → [K,b,T,D], and the reports of its layers."""
        stages, rounds, blocks = self.schedule.stages, self.schedule.rounds, len(rows.token_ids)
        stage, repeats, segment = lax.axis_index(axis_of("pipeline")), self.schedule.repeats, self.segment
        turns = rounds * blocks * stages

        def layers(current: tuple[Flow, Rows], turn: Array) -> tuple[tuple[Flow, Rows], list[Any]]:
            """This stage's work of a turn, on the microbatch that has arrived; before its first and after its last
            turn its result is not used."""
            flow, rows = current
            work = jnp.clip(turn - stage, 0, turns - 1)
            group = work // stages % rounds
            microbatch = work // (rounds * stages) * stages + work % stages

            # If a turn's slices of weights were inputs of a scan, they would be kept for the backward pass, and all of
            # their gradients stacked in every turn.
            def take(variables: Any, repeat: Array) -> Any:
                place = group * repeats + repeat
                take_one = functools.partial(lax.dynamic_index_in_dim, index=place, keepdims=False)
                return jax.tree.map(lambda x, cast: read_as(take_one(x), take_one(cast)), variables, casts)

            body = self.model.body(self.call(rows, microbatch))
            number = self.first + (group * stages + stage) * repeats * segment.size
            own = {"repeats": repeats, "take": take, **self.settings}
            flow, reports = scan_segment(segment, body, flow, [None] * segment.size, number, **own)
            return (flow, rows), reports

        def exchange(current: Any, waiting: Any, turn: Array | int) -> tuple[Any, Any]:
            """Swap, on the first stage, a microbatch that has passed all layers for one that has not.

            Rotating the waiting ones by one place in every turn brings each to the first stage when it is due, and
            finished ones home.
            """
            block, swaps = turn // (rounds * stages), stage == 0
            slot = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, block, keepdims=False), waiting)
            current, slot = (
                jax.tree.map(functools.partial(jnp.where, swaps), a, b) for a, b in ((slot, current), (current, slot))
            )
            slot = _shift(slot, -1)
            return current, jax.tree.map(
                lambda x, new: lax.dynamic_update_index_in_dim(x, new, block, 0), waiting, slot
            )

        def turn(carry: Any, number: Array) -> tuple[Any, list[Any]]:
            current, waiting = carry
            if rounds == 1:
                current, waiting = exchange(current, waiting, number)
            else:
                # The branch is also taken in the last turns, where one more block would enter.
                with jax.named_scope(TAKEN_SCOPE.format((blocks + 1) * stages - 1, turns + stages - 1)):
                    enters = number % (rounds * stages) < stages
                    current, waiting = lax.cond(enters, exchange, lambda *both: both[:2], current, waiting, number)
            current, reports = layers(current, number)
            return (_shift(current, 1), waiting), reports

        # One more block, in which the last microbatches come home.
        waiting = jax.tree.map(lambda x: jnp.pad(x, ((0, 1), *((0, 0),) * (x.ndim - 1))), (flow, rows))
        empty = jax.tree.map(lambda x: jnp.zeros_like(x[0]), (flow, rows))
        carry, reports = lax.scan(turn, (empty, waiting), jnp.arange(turns + stages - 1))
        _, (flow, _) = exchange(carry[0], carry[1], turns + stages - 1)
        flow = jax.tree.map(lambda x: x[1:], flow)
        return flow, jax.tree.map(functools.partial(self._home, stage, blocks), reports)

    def _home(self, stage: Array, blocks: int, report: Array) -> Array:
        """[turns,n,...] of this stage's layers → [K,R,...] of all R repeats, of this device's microbatches."""
        stages, rounds = self.schedule.stages, self.schedule.rounds
        report = lax.dynamic_slice_in_dim(report, stage, rounds * blocks * stages)
        report = report.reshape(blocks, rounds, stages, *report.shape[1:])  # [K,C,S,n,...]
        # Microbatches are exchanged for stages: [K,C,S,n,...]
        report = lax.all_to_all(report, axis_of("pipeline"), 2, 2, tiled=True)
        return report.reshape(blocks, -1, *report.shape[4:])


class _StoredLayers:
    """The pipelined segment's arrays: how devices of the axis store them, and what a stage reads of them.

    Methods take an array's path in the train state or in ``{segment: arrays}``.
    """

    def __init__(self, config: Config):
        self.schedule = Schedule.of(config, axis_size("pipeline"))
        self.segment = f"segment_{pipelined_segment(config.model)}"
        self._dtype = jnp.dtype(config.model.dtype)
        self._specs = {self.segment: variable_specs(config.model)[self.segment]}

    def spec(self, path: tuple[Any, ...]) -> P:
        """Partition spec of an array; P() outside the segment."""
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return functools.reduce(operator.getitem, names, self._specs) if self.segment in names else P()

    def specs(self, tree: Any) -> Any:
        """Specs of a tree's arrays for the ``shard_map`` over the axis."""
        axis = axis_of("pipeline")
        return jax.tree_util.tree_map_with_path(
            lambda path, _: P(*(axis if axes == "pipeline" else None for axes in self.spec(path))), tree
        )

    def assign(self, layers: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """This stage's layers, and those of no stage."""
        pairs = jax.tree_util.tree_map_with_path(lambda path, x: self.schedule.assign(x, self.spec(path)), layers)
        own, rest = (
            jax.tree.map(operator.itemgetter(i), pairs, is_leaf=lambda node: isinstance(node, tuple)) for i in range(2)
        )
        return own, rest

    def cast(self, path: tuple[Any, ...], x: Array, own: Array) -> Array:
        """A stage's parameters as they are read: matrices of experts that are sent are cast first, others are kept."""
        moves = self.schedule.rounds > 1 or "pipeline" not in self.spec(path)[:1]
        names = {getattr(key, "key", None) for key in path}
        if not (moves and "experts" in names and x.ndim > 3 and self._dtype.itemsize < x.dtype.itemsize):
            return own
        return self.schedule.assign(x.astype(self._dtype), self.spec(path))[0]


def gradients(
    config: Config,
    graphdef: nnx.GraphDef[Any],
    loss: Loss,
    state: TrainState,
    batch: dict[str, Array],
    rng: Array,
    count: Array,
    signals: tuple[str, ...],
) -> tuple[tuple[Array, Any, Any], Any]:
    """(loss, numbers, reports [A,L,...]) and gradients of microbatches [A,b,T], as without a pipeline.

    Args:
        loss: see :data:`Loss`.
        rng: key of the step; microbatch m has ``fold_in(rng, m)``.
        count: number of targets in all microbatches.
        signals: names of what layers report.
    """
    axis, stored = axis_of("pipeline"), _StoredLayers(config)
    schedule, segment = stored.schedule, stored.segment
    stages = schedule.stages
    state = dataclasses.replace(state, optimizer=None)

    def embed(table: Any) -> Array:
        """Embed tokens: [K,S,b,T] → [S,b,K,T] → [S·b·K,T], where rows are split as outside pipelines, and back."""
        variables = dataclasses.replace(state, parameters=state.parameters | {"embedding": table}).variables
        token_ids = jnp.moveaxis(batch["tokens"], 0, 2)
        x = nnx.merge(graphdef, variables).embed(token_ids.reshape(-1, token_ids.shape[-1]))
        x = jnp.moveaxis(x.reshape(*token_ids.shape, -1), 2, 0)
        return constrain(x, partition_specs.PIPELINED)

    def local(state: TrainState, x: Array, batch: dict[str, Array], rng: Array, count: Array) -> Any:
        """One device of the axis: the loss, its layers' gradients, and those of the embedded tokens x."""
        x, batch = jax.tree.map(lambda values: jnp.squeeze(values, 1), (x, batch))  # [K,1,b,T]
        numbers = jnp.arange(len(batch["tokens"])) * stages + lax.axis_index(axis)
        rows = Rows(batch["tokens"], batch["segment_ids"], batch["positions"], prefix=batch.get("prefix"))
        outside = {name: tree for name, tree in state.parameters.items() if name != segment}
        arrays = {segment: state.parameters[segment]}
        (own, rest), back = jax.vjp(stored.assign, arrays)
        own_biases, rest_biases = stored.assign({name: tree for name, tree in state.biases.items() if name == segment})
        casts = jax.tree_util.tree_map_with_path(stored.cast, arrays, own)

        def model(parameters: Any, biases: Any) -> Transformer:
            of_stage = dataclasses.replace(state, parameters=parameters, biases=state.biases | biases)
            return nnx.merge(graphdef, of_stage.variables)

        def run(outside: Any, own: Any, x: Array) -> tuple[Flow, LayerStates]:
            stage = Pipeline(model(outside | own, own_biases), schedule, rng, signals)
            return stage.run(x, rows, numbers, model(outside | casts, own_biases))

        def finish(outside: Any, flow: Flow, reports: LayerStates, inputs: tuple[Any, ...]) -> Any:
            rows, microbatch, number = inputs
            end = Pipeline(model(outside, rest_biases), schedule, rng, signals)
            return loss(end.model, end.finish(flow, reports, rows, number), microbatch, count)

        def accumulate(sums: Any, inputs: tuple[Any, ...]) -> Any:
            flow, reports, *others = inputs
            of_microbatch = jax.value_and_grad(finish, (0, 1, 2), has_aux=True)(after, flow, reports, tuple(others))
            (share, (numbers, layers)), (gradient, *cotangents) = of_microbatch
            return jax.tree.map(jnp.add, sums, (share, gradient)), (numbers, layers, cotangents)

        (flow, reports), back_through_stages = jax.vjp(run, outside, own, x)
        # What follows the last stage is differentiated microbatch by microbatch, so that none of it is kept.
        after = outside | rest
        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, after)
        inputs = flow, reports, rows, batch, numbers
        (share, gradient), (shown, layers, cotangents) = lax.scan(accumulate, zeros, inputs)
        before, of_own, of_x = back_through_stages(tuple(cotangents))
        (of_layers,) = back((of_own, {segment: gradient.pop(segment)}))
        # For arrays that every device stores whole, each device has the gradient of its own layers only.
        of_layers = jax.tree_util.tree_map_with_path(
            lambda path, x: x if "pipeline" in stored.spec(path) else lax.psum(x, axis), of_layers
        )
        shown = jax.tree.map(lambda values: jnp.sum(values, axis=0), shown)
        sums = lax.psum((share, shown, jax.tree.map(jnp.add, gradient, before)), axis)
        return *sums, of_layers, *jax.tree.map(lambda values: values[:, None], (of_x, layers))

    # [A,b,T] → [K,S,b,T]
    batch = {name: values.reshape(-1, stages, *values.shape[1:]) for name, values in batch.items()}
    batch = {name: constrain(values, partition_specs.PIPELINED) for name, values in batch.items()}
    blocks = P(None, axis)
    spread = jax.shard_map(
        local,
        in_specs=(stored.specs(state), blocks, blocks, P(), P()),
        out_specs=(P(), P(), P(), stored.specs({segment: state.parameters[segment]}), blocks, blocks),
        axis_names={axis},
        check_vma=False,
    )
    # Tokens are embedded outside: inside, XLA would send the gradient of every token to every device of a stage.
    x, back = jax.vjp(embed, state.parameters["embedding"])
    share, shown, outside, inside, of_x, layers = spread(state, x, batch, rng, count)
    outside["embedding"] = jax.tree.map(jnp.add, outside["embedding"], *back(of_x))
    # [K,S,L,...] → [A,L,...]
    layers = jax.tree.map(lambda values: values.reshape(-1, *values.shape[2:]), layers)
    return (share, shown, layers), outside | inside
