"""Initial state of a run that starts from a checkpoint: fine-tuning, sparse upcycling, adapters.

Parameters that both models have are copied layer by layer. Where an MoE layer replaces a dense one, every expert is a
copy of the dense FFN, or of a shard of it, and the router is fresh; where a dense layer replaces an MoE one, its FFN is
fresh (Switch 2021, section 4.2: non-expert weights are copied).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

from moe.checkpoints import parameters as stored
from moe.checkpoints.pinned import agreed
from moe.checkpoints.workdir import differing_settings, read_config
from moe.config import Config, ConfigError, DistillConfig, ModelConfig, StartConfig
from moe.config.objectives import OBJECTIVES, find_objective
from moe.data.tokenizer import Tokenizer
from moe.data.tokenizer_files import find_tokenizer
from moe.models.adapters import initial_adapters
from moe.models.factory import abstract_parameters
from moe.models.segments import part_of, restack_layers, unstack_layers
from moe.models.state import AdaptedState, TrainState, join, set_schedule_step
from moe.system.fields import require
from moe.system.sealed_folder import CONFIG
from moe.training.optimizer import is_average
from moe.training.optimizer_files import read_optimizer
from moe.training.spikes import is_history
from moe.training.step import Program
from moe.training.upcycling import copy_shards, diversify, granularity, group_columns

#: Settings of :class:`StartConfig` that only experts copied from a dense FFN read.
_UPCYCLING = "expert_noise", "virtual_groups", "expert_scale", "drop_share"

#: (layer, key path within its block); layer -1: outside the blocks.
LayerKey = tuple[int, tuple[str, ...]]


def check(config: Config) -> None:
    """Check that start.checkpoint and distill.teacher exist, before anything is written.

    Raises:
        ConfigError: a config or checkpoints are missing, or a setting is set without the one that makes it read.
    """
    _refuse_unread(config)
    for field, workdir in (("start.checkpoint", config.start.checkpoint), ("distill.teacher", config.distill.teacher)):
        if workdir:
            try:
                read_config(workdir)
            except ConfigError as error:
                raise ConfigError(f"{field}={workdir!r}: must be the workdir of a run or an import: {error}") from error
            if not (epath.Path(workdir) / "checkpoints").exists():
                raise ConfigError(f"{field}={workdir!r}: holds no checkpoints")


def _refuse_unread(config: Config) -> None:
    """Refuse settings that this run would not read, because of another one. Raises ConfigError."""
    for name, section, key, allowed in (
        ("start", config.start, "checkpoint", "must name a workdir"),
        ("distill", config.distill, "teacher", "must name a workdir"),
        ("lora", config.lora, "rank", "must be above 0"),
    ):
        value, default = getattr(section, key), type(section)()
        if not value and section != default:
            sections = ({name: dataclasses.asdict(each)} for each in (default, section))
            changed = ", ".join(differing_settings(*sections))
            raise ConfigError(f"{name}.{key}={value!r}: {allowed} to use {changed}; set it, or unset that")
    objective = config.objective
    data = config.data
    share = config.distill.soft_share
    name = f"data.objective={data.objective!r}"
    for one in map(find_objective, OBJECTIVES):
        if one.section and one.section != objective.section:
            section = getattr(config, one.section)
            if section != type(section)():
                raise ConfigError(f"{section}: is read only with data.objective={one.name!r}, not {data.objective!r}")
    allowed = f"is not read with {name}, whose teacher is the reference model; unset it"
    require(not objective.has_reference or share == DistillConfig().soft_share, "distill.soft_share", share, allowed)
    allowed = f"must be True with {name}, whose rows are cut from documents one after the other"
    require(data.pack or bool(objective.lengths(data)), "data.pack", data.pack, allowed)


def tokenizer(config: Config, directory: epath.Path) -> Tokenizer | None:
    """The tokenizer of the checkpoint that a run starts from, or of its teacher; None if the config has its own.

    A run whose checkpoint or teacher is gone uses the copy in its own workdir.

    Raises:
        ConfigError: it cannot be read.
    """
    workdir: Any = config.start.checkpoint or config.distill.teacher
    if not workdir or config.data.tokenizer:
        return None
    if not (epath.Path(workdir) / CONFIG).exists() and (directory / CONFIG).exists():
        workdir = directory
    try:
        return find_tokenizer(workdir, chat=config.objective.conversations)
    except ConfigError as error:
        raise ConfigError(f"{error}, or set data.tokenizer") from error


def first_state(
    program: Program, say: Callable[[str], Any] = lambda _: None, base_step: int | None = None
) -> TrainState:
    """The state at step 0: random, or taken from a checkpoint as ``config.start`` says.

    Args:
        say: receives a line that says what was loaded, what is fresh and what is inherited.
        base_step: of the checkpoint beneath adapters (:func:`moe.checkpoints.pinned.base_step`); None: the newest.

    Raises:
        ConfigError: no checkpoint, parameters of another shape, or no optimizer state in it.
    """
    start = program.config.start
    if not start.checkpoint:
        return program.init()
    source = read_config(start.checkpoint)
    _refuse_unread_upcycling(program.config, source.model)
    _refuse_other_depth(program.config, source.model)
    state = program.init()
    if program.config.lora.rank:
        return _adapted_state(program, state, base_step, say)
    # The same for all that is read, and on all hosts, even if the source trains on.
    step = agreed(stored.chosen_step(start.checkpoint, None))
    # Bound at once, so that the random ones are freed before moments are read.
    state = dataclasses.replace(state, parameters=_first_parameters(program, source.model, state.parameters, step))
    biases = state.biases
    rules = {gate and type(gate.balancing) for gate in (source.model.moe.gate, program.config.model.moe.gate)}
    if biases and len(rules) == 1:  # the state of another rule means something else
        source_biases = _host(stored.read_biases(start.checkpoint, source.model, step=step))
        biases = _transplant(program, source.model, source_biases, biases)
    optimizer = state.optimizer
    if start.optimizer == "carry":
        optimizer = _carry(program, source, optimizer, step)
        optimizer = set_schedule_step(optimizer, np.zeros((), np.int32))  # the schedule is this run's, from step 0
    say(_summary(program.config, source))
    state = _placed(program, dataclasses.replace(state, biases=biases, optimizer=optimizer))
    return state if start.optimizer == "carry" else _with_own_optimizer(program, state)


def _first_parameters(program: Program, model: ModelConfig, fresh: dict[str, Any], step: int) -> dict[str, Any]:
    """The parameters of a checkpoint, or what the new run makes of them; those of ``start.fresh`` are the fresh ones.

    Args:
        model: config of the checkpoint's model.
        step: of the checkpoint.
    """
    start = program.config.start
    # On the mesh each process reads its shards: a host may lack the memory for the whole model.
    mesh = program.mesh if _same_shapes(program.config.model, model) else None
    found = stored.read_parameters(start.checkpoint, model, dtype=np.float32, step=step, mesh=mesh)
    if mesh is None:
        return _transplant(program, model, _host(found), fresh, start)

    def choose(path: tuple[Any, ...], own: Any, old: Any) -> Any:
        return own if part_of([key.key for key in path]) in start.fresh else old

    return jax.tree_util.tree_map_with_path(choose, fresh, found)


def _adapted_state(program: Program, state: TrainState, base_step: int | None, say: Callable[[str], Any]) -> TrainState:
    """A fresh state with the base, and what is trained whole, from the checkpoint."""
    assert isinstance(state, AdaptedState)
    config = program.config
    base, biases = stored.read_base(config, base_step, program.mesh)
    model = program.model(join(base, biases or state.biases))
    adapters = nnx.to_pure_dict(initial_adapters(nnx.state(model, nnx.Param), config.lora, jax.random.key(config.seed)))
    # What is trained whole is still the base's array here: the train step donates both, so they need a buffer each.
    adapters = jax.tree.map(jnp.copy, adapters)
    counts = [sum(int(np.size(leaf)) for leaf in jax.tree.leaves(tree)) for tree in (adapters, base)]
    say(
        f"start: adapters of rank {config.lora.rank}, {counts[0]:,} trained beside {counts[1]:,} fixed parameters of "
        f"{config.start.checkpoint}; trained whole: {', '.join(config.lora.trained) or 'nothing'}"
    )
    state = dataclasses.replace(state, parameters=adapters, biases=biases or state.biases, base=base)
    return _with_own_optimizer(program, _placed(program, state))


def _with_own_optimizer(program: Program, state: TrainState) -> TrainState:
    """Initialise the state of a user's optimizer from these parameters, of which it may hold a copy; that of built-in
    optimizers starts as zeros and is kept."""
    if ":" not in program.config.optimizer.name:
        return state
    return dataclasses.replace(state, optimizer=program.init_optimizer(state.parameters))


def _placed(program: Program, state: TrainState) -> TrainState:
    """The state on the program's mesh, in the program's types: the source may have stored moments in another."""

    def place(array: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(array if array.dtype == like.dtype else array.astype(like.dtype), like.sharding)

    return jax.tree.map(place, state, program.state)


def _shapes(model: ModelConfig) -> dict[str, Any]:
    """The parameters of a model as arrays of their shapes that take no memory."""
    return jax.tree.map(lambda leaf: np.broadcast_to(0, leaf.shape), nnx.to_pure_dict(abstract_parameters(model)))


def _same_shapes(one: ModelConfig, other: ModelConfig) -> bool:
    return jax.tree.map(np.shape, _shapes(one)) == jax.tree.map(np.shape, _shapes(other))


def _summary(config: Config, source: Config) -> str:
    """One line: what a run takes from its checkpoint."""
    ours = unstack_layers(config.model, _shapes(config.model))
    available = unstack_layers(source.model, _shapes(source.model)).keys()
    loaded = {key for key in ours if _source(key, available, config) is not None}
    fresh = sorted({".".join(names) for layer, names in ours.keys() - loaded})
    models = ({"model": dataclasses.asdict(tree.model)} for tree in (source, config))
    changed = [
        f"{name.removeprefix('model.')} {'none' if old is None else old} -> {'none' if new is None else new}"
        for name, (old, new) in differing_settings(*models).items()  # only a gate may be None
    ]
    optimizer = "carried over" if config.start.optimizer == "carry" else "new"
    return (
        f"start: {len(loaded)} of {len(ours)} arrays from {config.start.checkpoint}; "
        f"fresh: {', '.join(fresh) or 'none'}; optimizer state: {optimizer}; "
        f"tokenizer: {config.data.tokenizer or 'inherited'}; "
        f"model: inherited{' but for ' + ', '.join(changed) if changed else ''}"
    )


def _carry(program: Program, source: Config, fresh: Any, step: int) -> Any:
    """Replace the fresh optimizer state by the source's; for AdamW also where the models differ."""
    start = program.config.start
    if source.lora.rank:
        raise ConfigError(
            f"start.optimizer='carry': {start.checkpoint} trained adapters, whose moments fit no parameter; use 'reset'"
        )
    # In shards, as the parameters; the checks of a pipeline's stages are of the source's own batch.
    sharded = _same_shapes(program.config.model, source.model) and program.mesh.shape.get("pipeline", 1) == 1
    mesh = program.mesh if sharded else None
    field = "start.optimizer='carry'"
    carried = read_optimizer(source, start.checkpoint, field, step, mesh)
    names = {config.optimizer.name for config in (source, program.config)}
    same = jax.tree.structure(carried) == jax.tree.structure(fresh) and not start.fresh
    shapes = (jax.tree.map(np.shape, tree) for tree in (carried, fresh))
    if len(names) == 1 and same and next(shapes) == next(shapes):
        decays = {config.optimizer.ema_decay for config in (source, program.config)}
        # The factors of an average sum to 1 only with its own decay: with another it begins anew.
        anew = is_history if len(decays) == 1 else _begins_anew
        return jax.tree.map(lambda own, old: own if anew(own) else old, fresh, carried, is_leaf=anew)
    if jax.tree.structure(carried, is_leaf=_is_tree) != jax.tree.structure(fresh, is_leaf=_is_tree) or len(names) > 1:
        raise ConfigError(
            f"start.optimizer='carry': the optimizer of {start.checkpoint} has another kind of state; set "
            "optimizer.name, frozen, and whether gradient_clip, skip_sigmas, qk_clip and ema_decay are 0 as there, "
            "or use 'reset'"
        )
    if names != {"adamw"} or source.optimizer.frozen:
        raise ConfigError(
            f"start.optimizer='carry': the state of optimizer.name={program.config.optimizer.name!r} fits only the "
            "same model with the same optimizer.frozen; use 'reset'"
        )

    def move(own: Any, old: Any) -> Any:
        # An average begins anew: the source has no weights of the fresh parameters.
        if _begins_anew(own):
            return own
        return _transplant(program, source.model, _host(old), own) if _is_tree(own) else old

    return jax.tree.map(move, fresh, carried, is_leaf=lambda node: _is_tree(node) or _begins_anew(node))


def _begins_anew(node: Any) -> bool:
    """Whether a new run has its own value of a node of the optimizer's state. Losses are of its own data: above those
    of another run, its first steps would be skipped as spikes."""
    return is_average(node) or is_history(node)


def _is_tree(node: Any) -> bool:
    return isinstance(node, dict)


def _host(tree: Any) -> Any:
    """Convert a tree to NumPy arrays, whole in every process; all processes of a run must call it."""

    def whole(leaf: Any) -> np.ndarray:
        split = isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True) if split else leaf)

    return jax.tree.map(whole, tree)


def _refuse_unread_upcycling(config: Config, source: ModelConfig) -> None:
    """Refuse settings of experts that are copies of a dense FFN where there are none. Raises ConfigError."""
    available = unstack_layers(source, _shapes(source)).keys()
    sources = {key: _source(key, available, config) for key in unstack_layers(config.model, _shapes(config.model))}
    if all(source in (None, key) for key, source in sources.items()):
        where = f"start.checkpoint={config.start.checkpoint!r}"
        allowed = f"is read only where experts become copies of a dense FFN, and none does from {where}; unset it"
        for name in _UPCYCLING:
            value = getattr(config.start, name)
            require(value == getattr(StartConfig, name), f"start.{name}", value, allowed)


def _refuse_other_depth(config: Config, source: ModelConfig) -> None:
    for name in ("num_layers", "encoder_layers"):
        ours, theirs = getattr(config.model, name), getattr(source, name)
        if ours != theirs:
            raise ConfigError(f"model.{name}={ours}: start.checkpoint={config.start.checkpoint!r} has {theirs}")


def _transplant(
    program: Program, model: ModelConfig, source: Any, fresh: Any, start: StartConfig | None = None
) -> dict[str, Any]:
    """Fill fresh parameters, or optimizer moments, with every array of the source that fits.

    Args:
        model: config of the source.
        source: parameters or moments of the source.
        fresh: the same of the new run.
        start: how upcycled parameters differ from copies; None: they do not, as for moments.
    """
    moe, seed = program.config.model.moe, program.config.seed
    wanted, available = unstack_layers(program.config.model, _host(fresh)), unstack_layers(model, source)
    where = f"start.checkpoint={program.config.start.checkpoint!r}"
    chosen = {}
    for (layer, names), fresh_value in wanted.items():
        key = _source((layer, names), available.keys(), program.config)
        if key is None:
            from_dense = names == ("moe", "router", "kernel") and (layer, ("dense", "up")) in available
            if from_dense and start is not None and start.virtual_groups:
                shards, experts = granularity(model.d_ff, moe.num_experts, moe.d_ff), moe.num_experts
                if moe.experts_per_token % shards:
                    raise ConfigError(
                        f"start.virtual_groups=True: K={moe.experts_per_token} must be a multiple of the {shards} "
                        "shards of the dense FFN, which together are one group"
                    )
                columns = group_columns(fresh_value[:, :experts], shards), fresh_value[:, experts:]
                fresh_value = np.concatenate(columns, axis=1)
            chosen[layer, names] = fresh_value
            continue
        value = available[key]
        if key[1] != names:  # [..] → [E,..]
            shards = granularity(model.d_ff, moe.num_experts, moe.d_ff)
            value = copy_shards(names[-1], value, moe.num_experts, shards)
            if start is not None:
                value = diversify(names[-1], value, start, seed, layer)
        if value.shape != fresh_value.shape:
            raise ConfigError(f"{where}: {'.'.join(names)} is {value.shape} there, {fresh_value.shape} here")
        chosen[layer, names] = value
    return restack_layers(program.config.model, fresh, chosen)


def _source(key: LayerKey, available: Collection[LayerKey], config: Config) -> LayerKey | None:
    """Key of the checkpoint's array that initialises an array of the run; None: the array is fresh."""
    layer, names = key
    if part_of(names) in config.start.fresh:
        return None
    if key in available:
        return key
    dense = layer, ("dense", names[-1])
    return dense if names[:2] == ("moe", "experts") and dense in available else None
