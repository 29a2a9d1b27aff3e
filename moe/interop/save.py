"""From a model to a folder of ``config.json`` and safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from moe.config import Config, ConfigError
from moe.interop.config_json import write_config
from moe.interop.families import FAMILIES
from moe.interop.layout import Parameter, by_tensor, get_leaf, layout
from moe.interop.schema import Json
from moe.interop.tensor_files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, TensorWriter
from moe.models.decoder import Transformer

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def save_huggingface(
    model: Transformer,
    config: Config,
    directory: str | os.PathLike[str],
    *,
    model_type: str = "",
    max_shard_bytes: int = 2 * 1024**3,
) -> None:
    """Writes ``config.json`` and safetensors, each tensor in its parameter's dtype.

    Args:
        model: its parameters may lie on a mesh, if all its devices are this process's.
        config: of the model.
        directory: made if missing; must hold no weights yet.
        model_type: family to write; empty: the first that can express the model.
        max_shard_bytes: of one file, unless a single tensor is larger.

    Raises:
        ConfigError: no open architecture computes this model, or the folder holds weights.
    """
    parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def fetch(parameter: Parameter) -> Any:
        return get_leaf(parameters, parameter.path)

    write_folder(config, fetch, Path(directory), model_type=model_type, max_shard_bytes=max_shard_bytes)


def write_folder(
    config: Config,
    fetch: Callable[[Parameter], Any],
    directory: Path,
    *,
    model_type: str = "",
    max_shard_bytes: int = 2 * 1024**3,
    token_ids: Json | None = None,
) -> None:
    """Writes a folder as :func:`save_huggingface` does, taking the parameters one by one.

    Args:
        config: of the model.
        fetch: returns a parameter's whole array, sliceable; called once for each, and the result is not kept.
        directory: see there.
        model_type: see there.
        max_shard_bytes: see there.
        token_ids: those of :data:`TOKEN_IDS` that are known.
    """
    source: Json = {**write_config(config, model_type), **dict.fromkeys(TOKEN_IDS), **(token_ids or {})}
    if (directory / SINGLE_FILE).exists() or (directory / INDEX_FILE).exists():
        raise ConfigError(f"{directory}: holds weights already")
    writer = TensorWriter(directory, max_shard_bytes)
    for group in by_tensor(layout(config.model, FAMILIES[source["model_type"]])):
        _write_group(writer, group, fetch)
    writer.finish()
    source["torch_dtype"] = str(writer.dtypes.pop()) if len(writer.dtypes) == 1 else "float32"
    (directory / CONFIG_FILE).write_text(json.dumps(source, indent=2) + "\n")


def _write_group(writer: TensorWriter, group: list[Parameter], fetch: Callable[[Parameter], Any]) -> None:
    """Writes the tensors that a group of parameters shares."""
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
        writer.add(name, tensor)
