"""From a model to a folder of ``config.json`` and safetensors."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from flax import nnx

from moe.atomic_files import in_bucket, write_atomic
from moe.checkpoints.integrity import first_line
from moe.config import Config, ConfigError, ModelConfig
from moe.interop.config_json import keep_fields, write_config
from moe.interop.families import FAMILIES
from moe.interop.layout import Parameter, by_tensor, get_leaf, layout
from moe.interop.schema import Json
from moe.interop.tensor_files import CONFIG_FILE, TensorWriter
from moe.models.encoder_decoder import Model
from moe.routing.router import SelectionBias


def save_huggingface(
    model: Model,
    config: Config,
    directory: str | os.PathLike[str],
    *,
    model_type: str = "",
    max_shard_bytes: int = 2 * 1024**3,
    source: Json | None = None,
    fused: bool = False,
) -> None:
    """Writes ``config.json`` and safetensors, each tensor in its parameter's dtype.

    Args:
        model: its parameters may lie on a mesh, if all its devices are this process's.
        config: of the model.
        directory: made if missing; must be empty.
        model_type: family to write; empty: that of ``source``, else the first that can express the model.
        max_shard_bytes: of one file, unless a single tensor is larger.
        source: ``config.json`` that the model was imported with, whose unchanged fields are kept.
        fused: write the experts of a layer as two tensors, the library's own layout, instead of three for each expert.

    Raises:
        ConfigError: no open architecture computes this model, or the folder holds files.
    """
    parameters = nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.Param, SelectionBias)))

    def fetch(parameter: Parameter) -> Any:
        return get_leaf(parameters, parameter.path)

    written = keep_fields(source, config, model_type) if source else write_config(config, model_type)
    write_folder(written, config.model, fetch, Path(directory), max_shard_bytes=max_shard_bytes, fused=fused)


def write_folder(
    source: Json,
    model: ModelConfig,
    fetch: Callable[[Parameter], Any],
    directory: Path,
    *,
    max_shard_bytes: int = 2 * 1024**3,
    fused: bool = False,
) -> None:
    """Writes a folder as :func:`save_huggingface` does, taking the parameters one by one.

    Args:
        source: content of ``config.json``, without the type of the weights.
        model: of these parameters.
        fetch: returns a parameter's whole array, sliceable; called once for each, and the result is not kept.
        directory: see there.
        max_shard_bytes: see there.
        fused: see there.
    """
    refuse_files(directory)
    writer = TensorWriter(directory, max_shard_bytes)
    family = FAMILIES[source["model_type"]]
    groups = by_tensor(layout(model, family, fused=fused))
    for group in groups:
        _write_group(writer, group, fetch)
    if not (model.tie_embeddings or family.ties_by_file):  # then that library expects a table in each stack, too
        named = {group[0].pieces[0].name: group for group in groups}
        for copy, original in family.copies.items():
            if copy not in named and original in named:
                _write_group(writer, named[original], fetch, as_name=copy)
    writer.finish()
    dtype = str(writer.dtypes.pop()) if len(writer.dtypes) == 1 else "float32"
    content = source | {"dtype" if "dtype" in source else "torch_dtype": dtype}
    write_atomic(directory / CONFIG_FILE, json.dumps(content, indent=2) + "\n")


def refuse_files(directory: Path | epath.Path) -> None:
    """Raises ConfigError if a folder that is to be written exists and is not empty: nothing is ever overwritten."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ConfigError(f"{directory}: must be a folder, existing and empty or new")
    held = sorted(path.name for path in directory.iterdir())
    if held:
        more = f" and {len(held) - 3} more" if len(held) > 3 else ""
        raise ConfigError(f"{directory}: must be empty or new; it holds {', '.join(held[:3])}{more}")


def _write_group(
    writer: TensorWriter, group: list[Parameter], fetch: Callable[[Parameter], Any], as_name: str = ""
) -> None:
    """Writes the tensors that a group of parameters shares, under their own names or this one."""
    arrays = [fetch(parameter) for parameter in group]
    pieces: dict[str, list[tuple[int, Any]]] = {}
    for i, parameter in enumerate(group):
        for piece in parameter.pieces:
            pieces.setdefault(piece.name, []).append((i, piece))
    dtype = np.result_type(*(np.dtype(array.dtype) for array in arrays))
    for name, parts in pieces.items():
        tensor = np.empty(group[0].file_shape, dtype)
        for i, piece in parts:
            group[i].write(tensor, piece, np.asarray(arrays[i][piece.slot]))
        writer.add(as_name or name, tensor)


@contextlib.contextmanager
def new_folder(folder: epath.Path) -> Iterator[None]:
    """Create a folder that is new or empty; if the block fails, remove it with its content and the parents it needed.

    Raises:
        ConfigError: it holds files.
    """
    refuse_files(folder)
    parents = () if in_bucket(folder) else folder.parents
    missing = [path for path in (folder, *parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException as error:
        (missing[-1] if missing else folder).rmtree()
        if not missing:
            folder.mkdir()
        # safetensors and TensorStore have other types for errors of the disk.
        if isinstance(error, OSError) or re.search("(?i)os.error", str(error)):
            raise ConfigError(f"{folder}: cannot be written, and nothing was left: {first_line(error)}") from error
        raise
