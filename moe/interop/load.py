"""From a folder of ``config.json`` and safetensors to a model in memory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from moe.config import Config, ConfigError, ModelConfig, layer_kinds, validate_mesh
from moe.config.mixers import GatedDelta
from moe.interop.config_json import family_of, read_config
from moe.interop.families.family import PREDICTION_COPIES, Family
from moe.interop.layout import Parameter, get_leaf, is_fused, layout, set_leaf
from moe.interop.quantization_config import read_quantization
from moe.interop.schema import parse
from moe.interop.tensor_files import CONFIG_FILE, TensorFolder
from moe.interop.whole_models import renamed, text_fields, whole_model
from moe.models import sampling
from moe.models.factory import Model, abstract_model
from moe.parallel.parameters import parameter_shardings
from moe.system.foreign_files import Json, read_object

#: PEFT's file next to adapters, or next to the model that they belong to.
ADAPTER_FILE = "adapter_config.json"


def load_huggingface(
    directory: str | os.PathLike[str], *, mesh: Mesh | None = None, dtype: str = "float32"
) -> tuple[Model, Config]:
    """Build the model of a folder.

    Args:
        directory: holds ``config.json`` and safetensors files.
        mesh: where to put the parameters, each shard read by itself; None: on the default device.
        dtype: of activations and matmuls, and of dequantised weights; other parameters keep the dtype of their tensors.

    Returns:
        (model, config): ``model(tokens).logits`` are [B,T,V].

    Raises:
        ConfigError: an architecture or a setting that is not supported, a tensor that is missing, surplus or of the
            wrong shape, or a dimension that the mesh does not divide.
    """
    config, folder, parameters = open_folder(directory, dtype=dtype)
    if mesh is not None:
        validate_mesh(sampling.for_generation(config, mesh.size), mesh.shape)
    arrays = _place(folder, parameters, config.model, mesh)
    return _module(config.model, arrays), config


def read_source(directory: str | os.PathLike[str]) -> Json:
    """The ``config.json`` of a folder; for a model of images or sound too, that of its text model.

    Raises:
        ConfigError: it cannot be read, or the folder holds adapters, which would change the model.
    """
    return text_fields(_read_config(directory))


def _read_config(directory: str | os.PathLike[str]) -> Json:
    """The ``config.json`` of a folder.

    Raises:
        ConfigError: it cannot be read, or the folder holds adapters, which would change the model.
    """
    if (Path(directory) / ADAPTER_FILE).exists():
        raise ConfigError(
            f"{directory}: holds adapters ({ADAPTER_FILE}), which are not read: merge them into the model with PEFT's "
            "merge_and_unload() and save that"
        )
    return read_object(Path(directory) / CONFIG_FILE)


def open_folder(
    directory: str | os.PathLike[str], *, dtype: str = "float32", prediction: bool = False
) -> tuple[Config, TensorFolder, list[Parameter]]:
    """The config of a folder, its tensors after all checks, and the parameters that they form. Reads only headers.

    ``prediction``: include the layers of multi-token prediction, which are skipped otherwise.
    """
    stated = _read_config(directory)
    source, whole = text_fields(stated), whole_model(stated)
    config = read_config(source)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    family = whole.text_model(family_of(source), stated) if whole else family_of(source)

    def rename(name: str) -> str:
        return renamed(name, family.inside)

    folder = TensorFolder(directory, read_quantization(source), dtype, rename)
    family = family.as_stored(config.model, folder.names())
    if config.model.tie_embeddings or family.ties_by_file:
        folder.fill_originals(family.copies)
    config = dataclasses.replace(config, model=_by_copies(config.model, family, folder))
    last, extra = config.model.num_layers, parse(family.schema, source).num_nextn_predict_layers
    # An encoder-decoder has no such layer after its blocks, whose names depend on the stack.
    after = "" if config.model.encoder_layers else family.block.format(layer=last)
    prefix = (family.prediction_prefixes or (after,))[0]
    found = f"{prefix}{family.prediction['prediction.project']}" in folder.names()
    extra = int(found) if family.prediction_prefixes else extra
    if prediction:
        if not extra or not found:
            raise ConfigError(f"{directory}: holds no layer of multi-token prediction; import it without them")
        if isinstance(layer_kinds(config.model)[-1].mixer, GatedDelta):  # which the prediction layer here takes over
            raise ConfigError(
                f"{directory}: layer_types ends with linear_attention: layers of multi-token prediction are read only "
                "after one of full_attention; import it without them"
            )
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, prediction_layers=extra))
        for layer in range(last, last + extra):
            block = family.block.format(layer=layer)
            folder.drop_copies({block + copy: original for copy, original in PREDICTION_COPIES.items()})
    else:
        folder.skip_layers(range(last, last + extra))
    folder.skip_parts({part: what for part, what in family.skipped.items() if not (prediction and part == prefix)})
    parameters = layout(config.model, family, fused=is_fused(folder.names()), names=folder.names())
    folder.check(parameters, family)
    return config, folder, parameters


def _by_copies(model: ModelConfig, family: Family, folder: TensorFolder) -> ModelConfig:
    """Derive from equal or different tensors in a file whether embeddings are tied, and whether the encoder has a table
    of its own, as in Hugging Face's Switch if they are not tied."""
    differ = {copy for copy, original in family.copies.items() if folder.differ(copy, original)}
    head = family.outside(model)["unembedding.kernel"]
    if family.ties_by_file:
        return dataclasses.replace(model, tie_embeddings=head not in folder.names() or head not in differ)
    own_tables = model.encoder_layers and not model.tie_embeddings and differ - {head}
    return dataclasses.replace(model, encoder_vocab_size=model.vocab_size) if own_tables else model


def parameter_dtype(folder: TensorFolder, parameter: Parameter) -> np.dtype[Any]:
    """The dtype of a parameter's tensors; float32 if they differ, and for selection biases."""
    if parameter.selection_bias:
        return np.dtype(np.float32)
    dtypes = {folder.dtype(piece.name) for piece in parameter.pieces}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def _module(model: ModelConfig, parameters: dict[str, Any]) -> Model:
    return nnx.merge(nnx.graphdef(abstract_model(model)), parameters)


def _place(folder: TensorFolder, parameters: list[Parameter], model: ModelConfig, mesh: Mesh | None) -> dict[str, Any]:
    """Nested dict of arrays; a device's shard is put together from the slices of the files that it needs."""
    where = parameter_shardings(mesh, nnx.state(abstract_model(model)))
    tree: dict[str, Any] = {}
    for parameter in parameters:
        placed = get_leaf(where, parameter.path)
        array = jax.make_array_from_callback(parameter.shape, placed, _shard_reader(folder, parameter))
        set_leaf(tree, parameter.path, array)
    return tree


def _shard_reader(folder: TensorFolder, parameter: Parameter) -> Callable[[Any], np.ndarray]:
    """Function from an index (a slice per axis of the parameter) to that part of it."""
    dtype = parameter_dtype(folder, parameter)
    leading = len(parameter.pieces[0].slot)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not leading:  # one piece: it is the shard, without a second copy
            return parameter.read(folder, parameter.pieces[0], index).astype(dtype, copy=False)
        bounds = [at.indices(size)[:2] for at, size in zip(index, parameter.shape, strict=True)]
        shard = np.empty([stop - start for start, stop in bounds], dtype)
        for piece in parameter.pieces:
            slot = [at - start for at, (start, _) in zip(piece.slot, bounds[:leading], strict=True)]
            if all(0 <= at < stop - start for at, (start, stop) in zip(slot, bounds[:leading], strict=True)):
                shard[tuple(slot)] = parameter.read(folder, piece, index[leading:])
        return shard

    return read
