"""Writing only the parameters of a model, in parts that are computed when they are written."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from moe.checkpoints.integrity import (
    MEMORY,
    partial_checksum,
    quiet_orbax,
)
from moe.checkpoints.manager import (
    orbax_folder,
    refuse_unusable_path,
)
from moe.checkpoints.orbax_threads import no_background_tracebacks, writers_end_on_error
from moe.checkpoints.workdir import write_config
from moe.config import Config, ConfigError
from moe.system.atomic_files import new_folder, to_checked_json, write_atomic

#: Elements of an array that are in memory, or in a file's chunk, at once, where it is written in parts.
PART_ELEMENTS = 1 << 26


@dataclasses.dataclass(frozen=True)
class Streamed:
    """An array written in parts, so that it is never whole in memory.

    Attributes:
        shape: whole array.
        dtype: whole array.
        slot_axes: number of leading axes that index the parts.
        parts: () → (index in the leading axes, part) for every part.
        rows: rows of one part, where parts are blocks of rows and no axis indexes them; 0: all rows.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    slot_axes: int
    parts: Callable[[], Iterator[tuple[tuple[int | slice, ...], np.ndarray]]]
    rows: int = 0

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of one part, which is stored as one chunk."""
        if self.rows:
            return self.rows, *self.shape[1:]
        return (1,) * self.slot_axes + self.shape[self.slot_axes :]


def _summed(sums: dict[str, int], branch: str, path: tuple[Any, ...], array: Streamed) -> Streamed:
    """The array, which puts its checksum into ``sums``, under its key path, when its parts are read."""
    strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.slot_axes or 1)]

    def parts() -> Iterator[tuple[tuple[int | slice, ...], np.ndarray]]:
        total = 0
        for index, part in array.parts():
            places = [place.start if isinstance(place, slice) else place for place in index]
            start = sum(place * stride for place, stride in zip(places, strides, strict=False))
            total += partial_checksum(part, start)
            yield index, part
        sums[branch + jax.tree_util.keystr(path)] = total % 2**32

    return dataclasses.replace(array, parts=parts)


class _StreamedHandler(ocp.type_handlers.NumpyHandler):
    """Write each part of a Streamed as one chunk of an ordinary Orbax array."""

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
                local_shape=value.part_shape,
                dtype=value.dtype,
                process_index=None,  # one writer: write to the final database, no merge needed
                arg=args[number] if args else None,
            )
            array = await tensorstore.open(tensorstore.Spec(spec), create=True, open=True, context=info.ts_context)
            for index, part in value.parts():
                await array[index].write(part, can_reference_source_data_indefinitely=True)
        return []


def write_parameters(workdir: epath.Path, parameters: dict[str, Any], biases: dict[str, Any] | None = None) -> None:
    """Write a checkpoint at step 0 that holds parameters only: a model to evaluate or to start a run from.

    Args:
        workdir: a folder without checkpoints.
        parameters: nested dict of :class:`Streamed`.
        biases: the same, of the routers' selection biases.

    Raises:
        ConfigError: the workdir holds checkpoints, or its path cannot hold any.
    """
    refuse_unusable_path(workdir)
    with quiet_orbax(), no_background_tracebacks(), writers_end_on_error():
        _write_parameters(workdir, {"parameters": parameters} | ({"biases": biases} if biases else {}))


def write_workdir(
    out: str, config: Config, parameters: dict[str, Any], biases: dict[str, Any], companions: dict[str, bytes]
) -> None:
    """Create a workdir of parameters, with a config and a tokenizer: a model to evaluate or to start from.

    Args:
        out: new or empty folder.
        config: of a run of the model.
        parameters: nested dict of arrays or of :class:`Streamed`.
        biases: the same, of the routers' selection biases.
        companions: name → content of further files, see :func:`moe.data.tokenizer_files.companions`.

    Raises:
        ConfigError: see :func:`moe.system.atomic_files.new_folder` and :func:`write_parameters`.
    """
    workdir = epath.Path(out)
    with new_folder(workdir):
        write_parameters(workdir, streamed(parameters), streamed(biases))
        for name, content in companions.items():
            write_atomic(workdir / name, content)
        write_config(config, workdir, companions)


def streamed(tree: Any) -> Any:
    """A tree of arrays as :func:`write_parameters` takes it; a :class:`Streamed` stays as it is."""

    def one(leaf: Any) -> Streamed:
        if isinstance(leaf, Streamed):
            return leaf
        return in_parts(leaf.shape, leaf.dtype, lambda: np.asarray(leaf))

    return jax.tree.map(one, tree)


def in_parts(shape: tuple[int, ...], dtype: np.dtype[Any], compute: Callable[[], np.ndarray]) -> Streamed:
    """An array that is computed when it is written, in the largest parts, along its leading axes, of at most
    :data:`PART_ELEMENTS` or of a matrix: a device that reads its shard reads whole parts."""
    axes = max(len(shape) - 2, 0)
    axes = next((number for number in range(axes) if math.prod(shape[number:]) <= PART_ELEMENTS), axes)
    rows = rows_of_a_part(shape) if shape and not axes else 0

    def parts() -> Iterator[tuple[tuple[int | slice, ...], np.ndarray]]:
        array = compute()
        for start in range(0, shape[0], rows) if rows else ():
            yield (slice(start, start + rows),), array[start : start + rows]
        for index in () if rows else np.ndindex(shape[:axes]):
            yield index, np.asarray(array[index])

    return Streamed(shape, dtype, axes, parts, rows)


def rows_of_a_part(shape: tuple[int, ...]) -> int:
    """Rows of a table that are read and written at once: the largest divisor that keeps a part small."""
    least = max(-(-math.prod(shape) // PART_ELEMENTS), 1)
    return next((shape[0] // count for count in range(least, shape[0] + 1) if shape[0] % count == 0), 0)


def _write_parameters(workdir: epath.Path, state: dict[str, Any]) -> None:
    registry = ocp.type_handlers.create_type_handler_registry((Streamed, _StreamedHandler()))
    manager = ocp.CheckpointManager(
        orbax_folder(workdir),
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
        item_handlers={"state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry)},
    )
    if manager.latest_step() is not None:
        raise ConfigError(f"{workdir}: holds checkpoints already")
    sums: dict[str, int] = {}
    for branch, arrays in state.items():
        state[branch] = jax.tree_util.tree_map_with_path(functools.partial(_summed, sums, f".{branch}"), arrays)
    manager.save(0, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state)), force=True)
    manager.close()
    memory = workdir / "checkpoints" / "0" / MEMORY
    memory.parent.mkdir()
    write_atomic(memory, json.dumps({"sealed": to_checked_json({"loop": {}, "checksums": sums})}))
