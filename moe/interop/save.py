"""From a model to a folder of ``config.json`` and safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from flax import nnx

from moe.config import Config, ConfigError, ModelConfig
from moe.interop.config_json import keep_fields, write_config
from moe.interop.families import FAMILIES
from moe.interop.layout import Parameter, by_tensor, get_leaf, layout
from moe.interop.schema import Json
from moe.interop.tensor_files import CONFIG_FILE, TensorWriter
from moe.layers.router import SelectionBias
from moe.models.factory import Model
from moe.system.atomic_files import refuse_files, write_atomic

#: Name of a tensor → function from the tensor to what is written in its place, by name.
Encoders = Mapping[str, Callable[[np.ndarray], Mapping[str, np.ndarray]]]


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
    """Write ``config.json`` and safetensors, each tensor in its parameter's dtype.

    Args:
        model: its parameters may be sharded over a mesh if all its devices belong to this process.
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
    encoders: Encoders | None = None,
    copied: Sequence[epath.Path] = (),
) -> None:
    """Write a folder as :func:`save_huggingface` does, taking the parameters one by one.

    Args:
        source: content of ``config.json``, without the type of the weights.
        model: of these parameters.
        fetch: returns a parameter's whole array, sliceable; called once for each, and the result is not kept.
        directory: see there.
        max_shard_bytes: see there.
        fused: see there.
        encoders: of tensors that are quantised; each must be among those written.
        copied: further files. ``config.json`` is written after all others: a folder that a kill left unfinished has
            none.

    Raises:
        ConfigError: the folder holds files, a tensor with an encoder is not written, or one has numbers that are not
            finite in its dtype float16.
    """
    refuse_files(directory)
    encoders = encoders or {}
    writer = TensorWriter(directory, max_shard_bytes)
    family = FAMILIES[source["model_type"]]
    groups = by_tensor(layout(model, family, fused=fused))
    absent = encoders.keys() - {piece.name for group in groups for piece in group[0].pieces}
    if absent:
        raise ConfigError(
            f"quantized: {min(absent)} of the import is not a tensor of {family.model_type} in this layout"
        )
    for group in groups:
        _write_group(writer, group, fetch, encoders=encoders)
    if not (model.tie_embeddings or family.ties_by_file):  # the library then expects a table in each stack as well
        named = {group[0].pieces[0].name: group for group in groups}
        for copy, original in family.copies.items():
            if copy not in named and original in named:
                _write_group(writer, named[original], fetch, as_name=copy)
            elif copy in named and original not in named:  # stacks with tables of their own; nothing reads the original
                _write_group(writer, named[copy], fetch, as_name=original)
                named[original] = named[copy]
    writer.finish()
    content = source
    if not encoders:
        dtype = str(max(writer.sizes, key=writer.sizes.__getitem__))  # selection biases may have another dtype
        content = source | {"dtype" if "dtype" in source else "torch_dtype": dtype}
    for path in copied:
        write_atomic(directory / path.name, path.read_bytes())
    write_atomic(directory / CONFIG_FILE, json.dumps(content, indent=2) + "\n")


def _write_group(
    writer: TensorWriter,
    group: list[Parameter],
    fetch: Callable[[Parameter], Any],
    as_name: str = "",
    encoders: Encoders | None = None,
) -> None:
    """Write the tensors that a group of parameters shares, under their own names or this one."""
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
        if dtype == np.float16 and not np.isfinite(tensor).all():
            raise ConfigError(f"{as_name or name}: holds numbers that float16 does not; use bfloat16 or float32")
        encode = (encoders or {}).get(name)
        for part, array in ({as_name or name: tensor} if encode is None else encode(tensor)).items():
            writer.add(part, array)
