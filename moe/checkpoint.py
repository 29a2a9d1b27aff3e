"""Checkpoints of a run, kept by Orbax: atomic, written in the background, restored onto whatever mesh is there.

A checkpoint at step n holds the :class:`moe.step.TrainState` after n steps, the place in the data, what the loop
itself remembers, and a checksum of all three: Orbax and TensorStore do not notice a flipped bit in an array. Retention:
the newest ``keep``, multiples of ``keep_every`` steps, and the one with the lowest held-out loss. Nothing in a
checkpoint is code, and none of it is unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging as absl_logging
from etils import epath
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import preservation_policy

from moe import sharding
from moe.config import Config, ConfigError, ModelConfig, from_config_dict
from moe.data.streams import StreamsRestore, StreamsSave
from moe.experts import SelectionBias
from moe.flops import abstract_parameters
from moe.guard import START_AGAIN, Stopped
from moe.metrics import METRICS, read_rows
from moe.sealed import seal, unseal
from moe.step import TrainState, join
from moe.transformer import Transformer


class DamagedError(Exception):
    """A checkpoint that cannot be read, or is not what was saved; the message says what is wrong with it."""


class Checkpoints:
    """The checkpoints under ``workdir/checkpoints``."""

    def __init__(self, workdir: epath.Path, keep: int, keep_every: int = 0, *, read_only: bool = False):
        """
        Args:
            workdir: of the run.
            keep: newest checkpoints kept.
            keep_every: steps, whose multiples are kept too; 0: none.
            read_only: for a look at another run.
        """
        self._workdir = workdir
        self._best = _LowestLoss(workdir)
        policies = [preservation_policy.LatestN(keep), self._best]
        if keep_every:
            policies.append(preservation_policy.EveryNSteps(keep_every))
        with _said_in_a_sentence(workdir, None):
            self._manager = ocp.CheckpointManager(
                workdir / "checkpoints",
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                    create=not read_only,
                    read_only=read_only,
                    cleanup_tmp_directories=not read_only,  # what a killed run was writing
                ),
            )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def before(self, step: int, save_every: int) -> list[int]:
        """Steps of the complete checkpoints older than a step, the newest first.

        Multiples of ``save_every`` come before those that an interruption left, which another run would not have.
        """
        older = [saved for saved in self._manager.all_steps() if saved < step]
        return sorted(older, key=lambda saved: (saved % save_every == 0, saved), reverse=True)

    def save(
        self,
        step: int,
        state: TrainState,
        iterator: grain.DatasetIterator,
        memory: dict[str, Any],
        heldout_loss: float | None,
    ) -> None:
        """Starts writing and returns; the state's arrays may be reused at once.

        Args:
            step: optimizer steps done.
            state: on the mesh.
            iterator: at the batch that the next step will take.
            memory: JSON of the training loop.
            heldout_loss: at this step, if it was evaluated.

        Raises:
            ConfigError: this checkpoint, or the one before, could not be written.
        """
        self._best.losses[step] = heldout_loss
        content = {"loop": memory, "checksums": checksums(state)}
        with _said_in_a_sentence(self._workdir, self._manager):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=StreamsSave(iterator),
                    memory=ocp.args.JsonSave({"sealed": seal(content)}),
                ),
                force=True,
            )

    def check(self) -> None:
        """Cheap. Raises ConfigError if what is being written in the background has failed."""
        with _said_in_a_sentence(self._workdir, self._manager):
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when what was started is on disk. Raises ConfigError if it could not be written."""
        with _said_in_a_sentence(self._workdir, self._manager):
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """An error within is told only when it is clear which checkpoints there are."""
        try:
            yield
        except Exception:
            with contextlib.suppress(ConfigError):
                self.wait()
            raise

    def resume(
        self, state: TrainState, iterator: grain.DatasetIterator, say: Callable[[str], Any]
    ) -> tuple[int, TrainState, dict[str, Any]] | None:
        """(step, state, the loop's JSON) of the newest good checkpoint, or None if there is none at all.

        Damaged ones that are newer are set aside in ``workdir/damaged``, and ``say`` is told so. In a run of several
        processes one of them may see the damage alone: it sets the checkpoint aside and asks for a new start.

        Args:
            state: ShapeDtypeStructs with the shardings to restore to (:attr:`moe.step.Program.state`).
            iterator: a fresh one of the same data; it is moved to its place.
            say: told in a line.

        Raises:
            ConfigError: there are checkpoints, and not one of them is good.
        """
        damaged: dict[int, str] = {}
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                found = self.restore(step, state, iterator)
            except DamagedError as error:
                damaged[step] = str(error)
                if jax.process_count() > 1 and step != steps[-1]:
                    self._set_aside(step, say, str(error))
                    raise Stopped(START_AGAIN, f"the checkpoint of step {step} is damaged") from error
                continue
            for bad, reason in damaged.items():
                self._set_aside(bad, say, reason)
            self._manager.reload()
            return step, *found
        if damaged:
            listed = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
            raise ConfigError(
                f"{self._workdir / 'checkpoints'}: no checkpoint is good ({listed}); nothing was changed; "
                "put one back from a copy, or use another --workdir"
            )
        return None

    def _set_aside(self, step: int, say: Callable[[str], Any], reason: str) -> None:
        """Moved, never deleted: somebody may mend it."""
        folder = self._workdir / "damaged"
        folder.mkdir(exist_ok=True)
        names = (str(step), *(f"{step}_{number}" for number in range(1, 1000)))
        target = folder / next(name for name in names if not (folder / name).exists())
        (self._workdir / "checkpoints" / str(step)).rename(target)
        say(f"the checkpoint of step {step} is damaged and now lies in {target}: {reason}")

    def restore(
        self, step: int, state: TrainState, iterator: grain.DatasetIterator | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state and the loop's JSON of a step, known to be what was saved.

        Args:
            step: of a complete checkpoint.
            state: ShapeDtypeStructs with the shardings to restore to (:attr:`moe.step.Program.state`).
            iterator: a fresh one of the same data, which is moved to its place; None: the data's place is not read.

        Raises:
            DamagedError: it cannot be read, or is not what was saved.
            ConfigError: the iterator is over other documents.
            OSError: it may be good, but this process cannot get at it.
        """
        items = {} if iterator is None else {"data": StreamsRestore(iterator)}
        with _quiet(), _damage():
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(state), memory=ocp.args.JsonRestore(), **items),
            )
            memory = unseal(restored["memory"]["sealed"])
            _compare(memory["checksums"], restored["state"])
            return restored["state"], memory["loop"]

    def restore_state(self, step: int, state: TrainState) -> TrainState:
        """The state alone, as it is: without a look at its checksums, which what others wrote does not have."""
        return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(state)))["state"]

    def close(self) -> None:
        """Waits until what was started is on disk. Raises ConfigError if it could not be written."""
        self.wait()
        self._manager.close()


@contextlib.contextmanager
def errors_said_once() -> Iterator[None]:
    """Without the tracebacks that Orbax's threads log of what is raised as well, and TensorStore of what comes late."""

    def keep(record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)

    def late(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    hook, sys.unraisablehook = sys.unraisablehook, late
    absl_logging.get_absl_logger().addFilter(keep)
    try:
        yield
    finally:
        absl_logging.get_absl_logger().removeFilter(keep)
        sys.unraisablehook = hook


class _LowestLoss(preservation_policy.PreservationPolicy):
    """Keeps the checkpoint with the lowest held-out loss, which ``metrics.jsonl`` remembers from one start to the next.

    (Orbax's BestN asks for metrics of Orbax's own, a second place for the same number.)
    """

    def __init__(self, workdir: epath.Path):
        self.losses: dict[int, float | None] = {
            row["step"]: row["loss"] for row in read_rows(workdir / METRICS) if row["kind"] == "heldout/all"
        }

    def should_preserve(
        self, checkpoints: Sequence[preservation_policy.PolicyCheckpointInfo], *, context: Any
    ) -> Sequence[bool]:
        del context
        losses = {info.step: self.losses.get(info.step) for info in checkpoints}
        known = {step: loss for step, loss in losses.items() if loss is not None and np.isfinite(loss)}
        best = min(known, key=lambda step: known[step]) if known else None
        return [info.step == best for info in checkpoints]


# --- Whether it is what was saved ------------------------------------------------------------------------------------
@jax.jit
def _checksum(array: Array) -> Array:
    """Σ (2i+1)·word_i mod 2³² over the words of an array, [] uint32.

    Integers, so that the order of the sum, and with it the mesh, does not matter; odd factors, so that no change of
    one word leaves it as it was; different ones, so that words cannot change places.
    """
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    number, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        number += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    return jnp.sum(bits * (2 * number + 1), dtype=jnp.uint32)


def checksums(tree: Any) -> dict[str, int]:
    """Of every array of a tree (float32, int32 or uint32), by its place; the same on every mesh."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = [_checksum(leaf) for _, leaf in leaves]  # all started before one is read
    return {jax.tree_util.keystr(path): int(value) for (path, _), value in zip(leaves, sums, strict=True)}


def _compare(saved: dict[str, int], tree: Any) -> None:
    """Raises DamagedError if an array of the tree is not the one that was saved."""
    differing = [name for name, value in checksums(tree).items() if saved.get(name, value) != value]
    if differing:
        raise DamagedError(f"{len(differing)} arrays are not those that were saved, the first is {differing[0]}")


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Whatever goes wrong in reading a file that says nonsense; but not what is wrong outside of the file."""
    try:
        yield
    except (ConfigError, DamagedError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        raise DamagedError(_first_line(error)) from error


@contextlib.contextmanager
def _said_in_a_sentence(workdir: epath.Path, manager: ocp.CheckpointManager | None) -> Iterator[None]:
    """An error of writing, as a sentence with the step from which the run can go on."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        steps = complete_steps(workdir)
        last = f"the newest good checkpoint is of step {max(steps)}" if steps else "there is no checkpoint yet"
        what = "a checkpoint could not be written" if manager else "cannot be used"
        raise ConfigError(
            f"--workdir={workdir}: {what} ({_first_line(error)}); {last}; "
            "make room or repair it, and the same command goes on from there"
        ) from error


def complete_steps(workdir: epath.Path) -> list[int]:
    """Steps of the checkpoints that were written to their end."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def _first_line(error: BaseException) -> str:
    """Of what was wrong first; those above it speak of the work that failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error).strip() or "no more is known").splitlines()[0]
    return f"{type(error).__name__}: {line if len(line) <= 300 else f'{line[:100]} ... {line[-190:]}'}"


# --- Parameters alone ------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences Orbax's warnings of what is meant: reading only, and parts that are not arrays."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)


@dataclasses.dataclass(frozen=True)
class Streamed:
    """An array that is written part by part and never whole in memory.

    Attributes:
        shape: of the whole.
        dtype: of the whole.
        slot_axes: leading axes that number the parts.
        parts: () → (index in the leading axes, part) for every part.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    slot_axes: int
    parts: Callable[[], Iterator[tuple[tuple[int, ...], np.ndarray]]]


class _StreamedHandler(ocp.type_handlers.NumpyHandler):
    """Writes a part of a Streamed as a chunk of the array that Orbax would have written; it is read as any other."""

    def typestr(self) -> str:
        return "jax.Array"

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        for number, (value, info) in enumerate(zip(values, infos, strict=True)):
            await info.await_path_creation()
            spec = ocp.type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=True,
                global_shape=value.shape,
                local_shape=(1,) * value.slot_axes + value.shape[value.slot_axes :],
                dtype=value.dtype,
                process_index=None,  # straight into the common database: nothing to merge from several writers
                arg=args[number] if args else None,
            )
            array = await tensorstore.open(tensorstore.Spec(spec), create=True, open=True, context=info.ts_context)
            for index, part in value.parts():
                await array[index].write(part, can_reference_source_data_indefinitely=True)
        return []


def write_parameters(workdir: epath.Path, parameters: dict[str, Any]) -> None:
    """A checkpoint at step 0 that holds parameters and nothing else: a start for a run, or a model to evaluate.

    Args:
        workdir: has no checkpoints yet.
        parameters: nested dict of :class:`Streamed`.

    Raises:
        ConfigError: there are checkpoints already.
    """
    with _quiet():
        _write_parameters(workdir, parameters)


def _write_parameters(workdir: epath.Path, parameters: dict[str, Any]) -> None:
    registry = ocp.type_handlers.create_type_handler_registry((Streamed, _StreamedHandler()))
    manager = ocp.CheckpointManager(
        workdir / "checkpoints",
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
        item_handlers={"state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry)},
    )
    if manager.latest_step() is not None:
        raise ConfigError(f"{workdir}: holds checkpoints already")
    manager.save(0, args=ocp.args.Composite(state=ocp.args.PyTreeSave({"parameters": parameters})), force=True)
    manager.close()


def read_config(workdir: str | os.PathLike[str]) -> Config:
    """The config that a run or an import left beside its checkpoints.

    Raises:
        ConfigError: there is none, or it is none of ours.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise ConfigError(f"{path}: no such file")
    try:
        return from_config_dict(json.loads(path.read_text()))
    except (json.JSONDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from error


def read_parameters(
    workdir: str | os.PathLike[str],
    model: ModelConfig,
    mesh: Mesh | None = None,
    *,
    dtype: Any = None,
    step: int | None = None,
    only: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The parameters of a checkpoint of a run or of an import, without the optimizer's state.

    Args:
        workdir: holds ``checkpoints``.
        model: what the checkpoint is of.
        mesh: where to put them, each device reading its shard; None: the default device.
        dtype: to cast to; None: as stored.
        step: of the checkpoint; None: the newest.
        only: keys down to the one parameter, or the branch, that is read; empty: all.

    Raises:
        ConfigError: no checkpoint, or one of another model; the parameter is named.
    """
    return _read_branch(epath.Path(workdir), "parameters", abstract_parameters(model), mesh, dtype, step, only)


def read_variables(
    workdir: str | os.PathLike[str],
    model: ModelConfig,
    mesh: Mesh | None = None,
    *,
    dtype: Any = None,
    step: int | None = None,
) -> dict[str, Any]:
    """As :func:`read_parameters`, with the routers' selection biases where the model has them."""
    parameters = read_parameters(workdir, model, mesh, dtype=dtype, step=step)
    abstract = nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)))
    biases = nnx.to_pure_dict(nnx.state(abstract, SelectionBias))
    if not biases:
        return parameters
    return join(parameters, _read_branch(epath.Path(workdir), "biases", biases, mesh, dtype, step, ()))


def _read_branch(
    workdir: epath.Path,
    branch: str,
    wanted: dict[str, Any],
    mesh: Mesh | None,
    dtype: Any,
    step: int | None,
    only: tuple[str, ...],
) -> dict[str, Any]:
    """A field of the TrainState, checked against what the model wants."""
    if not (workdir / "checkpoints").exists():
        raise ConfigError(f"{workdir}: holds no checkpoints")
    with _quiet():
        return _read_quietly(workdir, branch, wanted, mesh, dtype, step, only)


def _read_quietly(workdir, branch, wanted, mesh, dtype, step, only) -> dict[str, Any]:
    manager = ocp.CheckpointManager(
        workdir / "checkpoints",
        options=ocp.CheckpointManagerOptions(read_only=True),
        item_handlers={"state": ocp.PyTreeCheckpointHandler()},
    )
    step = manager.latest_step() if step is None else step
    try:
        if step is None or step not in manager.all_steps():
            raise ConfigError(f"{workdir}: holds no checkpoint{'' if step is None else f' of step {step}'}")
        with _damage():
            return _read_checked(manager, workdir, branch, wanted, mesh, dtype, step, only)
    except DamagedError as error:
        raise ConfigError(f"{workdir}: the checkpoint of step {step} is damaged: {error}") from error
    finally:
        manager.close()


def _read_checked(manager, workdir, branch, wanted, mesh, dtype, step, only) -> dict[str, Any]:
    stored = manager.item_metadata(step)["state"].tree.get(branch, {})
    _refuse_other_model(stored, wanted, f"{workdir} at step {step}")
    specs = sharding.parameter_specs(wanted)
    stored, wanted, specs = (_branch(tree, only) for tree in (stored, wanted, specs))

    def restore_args(leaf: Any, spec: Any) -> ocp.ArrayRestoreArgs:
        where = SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else NamedSharding(mesh, spec)
        return ocp.ArrayRestoreArgs(dtype=leaf.dtype if dtype is None else dtype, sharding=where)

    args = jax.tree.map(restore_args, stored, specs)
    restore = ocp.args.PyTreeRestore({branch: wanted}, {branch: args}, partial_restore=True)
    restored = manager.restore(step, args=ocp.args.Composite(state=restore))["state"][branch]
    saved = _saved_checksums(workdir, step)
    if saved and (dtype is None or np.dtype(dtype) == np.float32):  # as they are stored
        _compare({name.removeprefix(f".{branch}"): value for name, value in saved.items()}, restored)
    return restored


def _saved_checksums(workdir: epath.Path, step: int) -> dict[str, int]:
    """Of the arrays of a run's checkpoint; an import has none."""
    path = workdir / "checkpoints" / str(step) / "memory" / "metadata"
    if not path.exists():
        return {}
    with _damage():
        return unseal(json.loads(path.read_text())["sealed"])["checksums"]


def _branch(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """The tree without what is beside the path."""
    return {path[0]: _branch(tree[path[0]], path[1:])} if path else tree


def _refuse_other_model(stored: Any, wanted: Any, where: str) -> None:
    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: not isinstance(node, dict))
        return {".".join(str(key.key) for key in path): tuple(leaf.shape) for path, leaf in leaves}

    theirs, ours = shapes(stored), shapes(wanted)
    problems = [
        f"{name} is {theirs.get(name, 'absent')} there, {ours.get(name, 'absent')} by the config"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]
    if problems:
        raise ConfigError(f"{where}: holds another model: {'; '.join(problems[:3])}")
