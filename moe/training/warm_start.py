"""Initial state of a run that starts from a checkpoint: fine-tuning, sparse upcycling, distillation.

Parameters that both models have are copied layer by layer. Where an MoE layer replaces a dense one, every expert is a
copy of the dense FFN, or of a shard of it, and the router is fresh (:mod:`moe.training.upcycling`); where a dense layer
replaces an MoE one, its FFN is fresh (Switch 2021, section 4.2: non-expert weights are copied).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from moe.checkpoints import parameters as stored
from moe.checkpoints.manager import Checkpoints
from moe.checkpoints.state import AdaptedState, TrainState, set_schedule_step
from moe.checkpoints.workdir import flatten, read_config
from moe.config import Config, ConfigError, ModelConfig, StartConfig
from moe.data.tokenizer import Tokenizer
from moe.data.tokenizer_files import find_tokenizer
from moe.models.adapters import initial_adapters
from moe.models.flops import abstract_parameters
from moe.models.stack import part_of, restack_layers, unstack_layers
from moe.parallel.mesh import make_mesh
from moe.training import upcycling
from moe.training.step import Program, build

#: (layer, key path within its block); layer -1: outside the blocks.
LayerKey = tuple[int, tuple[str, ...]]


def check(config: Config) -> None:
    """Check that start.checkpoint and distill.teacher exist, before anything is written.

    Raises:
        ConfigError: a config or checkpoints are missing.
    """
    for field, workdir in (("start.checkpoint", config.start.checkpoint), ("distill.teacher", config.distill.teacher)):
        if workdir:
            try:
                read_config(workdir)
            except ConfigError as error:
                raise ConfigError(f"{field}={workdir!r}: must be the workdir of a run or an import: {error}") from error
            if not (epath.Path(workdir) / "checkpoints").exists():
                raise ConfigError(f"{field}={workdir!r}: holds no checkpoints")


def tokenizer(config: Config) -> Tokenizer | None:
    """The tokenizer of the checkpoint that a run starts from, or of its teacher; None if the config has its own.

    Raises:
        ConfigError: it cannot be read.
    """
    workdir = config.start.checkpoint or config.distill.teacher
    if not workdir or config.data.tokenizer:
        return None
    try:
        return find_tokenizer(workdir, chat=config.data.objective == "chat")
    except ConfigError as error:
        raise ConfigError(f"{error}, or set data.tokenizer") from error


def first_state(program: Program, say: Callable[[str], Any] = lambda _: None, workdir: str = "") -> TrainState:
    """The state at step 0: random, or taken from a checkpoint as ``config.start`` says.

    Args:
        program: of the run.
        say: receives a line that says what was loaded, what is fresh and what is inherited.
        workdir: of the run, which notes the base of adapters; empty: the base is the newest checkpoint.

    Raises:
        ConfigError: no checkpoint, parameters of another shape, or no optimizer state in it.
    """
    state, start = program.init(), program.config.start
    if not start.checkpoint:
        return state
    if program.config.lora.rank:
        return _adapted_state(program, state, workdir, say)
    source = read_config(start.checkpoint)
    theirs = _host(stored.read_parameters(start.checkpoint, source.model, dtype=np.float32))
    _refuse_other_depth(program.config, source.model)
    parameters = _transplant(program, source.model, theirs, state.parameters, start)
    biases = state.biases
    if biases:
        found = _host(stored.read_biases(start.checkpoint, source.model))
        biases = _transplant(program, source.model, found, biases)
    optimizer = state.optimizer
    if start.optimizer == "carry":
        carried = _host(_optimizer_state(source, start.checkpoint))
        if jax.tree.structure(carried, is_leaf=_is_tree) != jax.tree.structure(optimizer, is_leaf=_is_tree):
            raise ConfigError(f"start.optimizer='carry': {start.checkpoint} was trained by another optimizer")
        optimizer = jax.tree.map(
            lambda fresh, old: _transplant(program, source.model, old, fresh) if _is_tree(fresh) else jnp.asarray(old),
            optimizer,
            carried,
            is_leaf=_is_tree,
        )
        optimizer = set_schedule_step(optimizer, np.zeros((), np.int32))  # the schedule is this run's, from step 0
    say(_summary(program.config, source, theirs))
    placed = dataclasses.replace(state, parameters=parameters, biases=biases, optimizer=optimizer)
    return jax.tree.map(lambda array, like: jax.device_put(array, like.sharding), placed, program.state)


def _adapted_state(program: Program, state: TrainState, workdir: str, say: Callable[[str], Any]) -> TrainState:
    """A fresh state with the base, and what is trained whole, from the checkpoint."""
    assert isinstance(state, AdaptedState)
    config = program.config
    base, biases = stored.read_base(config, workdir or None, program.mesh)
    adapters = initial_adapters(base, config.lora, jax.random.key(config.seed))
    counts = [sum(int(np.size(leaf)) for leaf in jax.tree.leaves(tree)) for tree in (adapters, base)]
    say(
        f"start: adapters of rank {config.lora.rank}, {counts[0]:,} trained beside {counts[1]:,} fixed parameters of "
        f"{config.start.checkpoint}; trained whole: {', '.join(config.lora.trained) or 'nothing'}"
    )
    placed = dataclasses.replace(state, parameters=adapters, biases=biases or state.biases, base=base)
    return jax.tree.map(lambda array, like: jax.device_put(array, like.sharding), placed, program.state)


def teacher(config: Config, mesh: Mesh) -> tuple[ModelConfig, dict[str, Any]] | None:
    """Model config of ``config.distill.teacher`` and its variables on the mesh; None without a teacher.

    Raises:
        ConfigError: no checkpoint, or another vocabulary.
    """
    if not config.distill.teacher:
        return None
    model = read_config(config.distill.teacher).model
    if model.vocab_size != config.model.vocab_size:
        raise ConfigError(f"model.vocab_size={config.model.vocab_size}: must be the teacher's {model.vocab_size}")
    return model, stored.read_variables(config.distill.teacher, model, mesh=mesh)


def _summary(config: Config, source: Config, theirs: Any) -> str:
    """One line: what a run takes from its checkpoint."""
    shapes = jax.tree.map(lambda leaf: np.broadcast_to(0, leaf.shape), abstract_parameters(config.model))
    ours = unstack_layers(config.model, shapes)
    available = unstack_layers(source.model, theirs).keys()
    loaded = {key for key in ours if _source(key, available, config) is not None}
    fresh = sorted({".".join(names) for layer, names in ours.keys() - loaded})
    flat = [flatten(dataclasses.asdict(tree.model)) for tree in (config, source)]
    changed = [f"{name} {flat[1][name]} -> {value}" for name, value in flat[0].items() if value != flat[1][name]]
    optimizer = "carried over" if config.start.optimizer == "carry" else "new"
    return (
        f"start: {len(loaded)} of {len(ours)} arrays from {config.start.checkpoint}; "
        f"fresh: {', '.join(fresh) or 'none'}; optimizer state: {optimizer}; "
        f"tokenizer: {config.data.tokenizer or 'inherited'}; "
        f"model: inherited{' but for ' + ', '.join(changed) if changed else ''}"
    )


def _is_tree(node: Any) -> bool:
    return isinstance(node, dict)


def _host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def _optimizer_state(source: Config, workdir: str) -> Any:
    """Optimizer state of the newest checkpoint of a run, on one device."""
    mesh = make_mesh(dataclasses.replace(source.mesh, data=1, fsdp=1, expert=1, tensor=1), jax.local_devices()[:1])
    with jax.set_mesh(mesh):
        program = build(source, mesh)
    try:
        checkpoints = Checkpoints(epath.Path(workdir), 1, read_only=True)
        return checkpoints.restore_state(checkpoints.latest() or 0, program.state).optimizer
    except (ValueError, KeyError) as error:
        raise ConfigError(f"start.optimizer='carry': {workdir} holds no optimizer state; use 'reset'") from error


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
        program: of the new run.
        model: config of the source.
        source: parameters or moments of the source.
        fresh: the same of the new run.
        start: how upcycled parameters differ from copies; None: they do not, as for moments.
    """
    moe, seed = program.config.model.moe, program.config.seed
    ours, theirs = unstack_layers(program.config.model, _host(fresh)), unstack_layers(model, source)
    where = f"start.checkpoint={program.config.start.checkpoint!r}"
    chosen = {}
    for (layer, names), own in ours.items():
        key = _source((layer, names), theirs.keys(), program.config)
        if key is None:
            from_dense = names == ("moe", "router", "kernel") and (layer, ("dense", "up")) in theirs
            if from_dense and start is not None and start.virtual_groups:
                own = upcycling.group_columns(own, upcycling.granularity(model.d_ff, moe.num_experts, moe.d_ff))
            chosen[layer, names] = own
            continue
        found = theirs[key]
        if key[1] != names:  # [..] → [E,..]
            shards = upcycling.granularity(model.d_ff, moe.num_experts, moe.d_ff)
            found = upcycling.copy_shards(names[-1], found, moe.num_experts, shards)
            if start is not None:
                found = upcycling.diversify(names[-1], found, start, seed, layer)
        if found.shape != own.shape:
            raise ConfigError(f"{where}: {'.'.join(names)} is {found.shape} there, {own.shape} here")
        chosen[layer, names] = found
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
