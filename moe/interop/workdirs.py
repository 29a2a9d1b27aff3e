"""Between folders of open checkpoints and workdirs."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from moe.checkpoints import parameters as stored
from moe.checkpoints import streamed
from moe.checkpoints.manager import refuse_unusable_path
from moe.checkpoints.workdir import read_config as read_run_config
from moe.checkpoints.workdir import write_config as write_run_config
from moe.config import Config, ConfigError
from moe.data.tokenizer_files import GENERATION_FILE, companions, find_tokenizer
from moe.interop.config_json import BIAS_DTYPE, TOKEN_IDS, keep_fields, write_config
from moe.interop.families import FAMILIES
from moe.interop.layout import Parameter, Piece, get_leaf, set_leaf
from moe.interop.load import open_folder, parameter_dtype, read_source
from moe.interop.quantization_config import FP8Config, read_quantization
from moe.interop.quantized import pack_scales, unpack_scales
from moe.interop.save import Encoders, write_folder
from moe.interop.schema import Json
from moe.interop.tensor_files import TensorFolder
from moe.interop.whole_models import rename_modules
from moe.system.atomic_files import new_folder, refuse_files, write_atomic
from moe.system.foreign_files import read_object
from moe.system.sealed_folder import CONFIG, is_there, read_checked, read_checked_object

#: Copy in a workdir of the ``config.json`` that was imported; an export keeps its fields that did not change.
SOURCE_FILE = "huggingface_config.json"
#: Types of selection biases in files that are narrower than the float32 in which they are trained.
_NARROW = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
#: Scales of the FP8 tensors of the import, with which an export can write the same codes again.
SCALES_FILE = "huggingface_scales.safetensors"


def import_checkpoint(
    source: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    prediction: bool = False,
) -> Config:
    """Convert a folder's model to a workdir, with one tensor in memory at a time.

    Args:
        source: holds ``config.json`` and safetensors files.
        workdir: gets ``config.json``, ``checkpoints/0``, :data:`SOURCE_FILE`, :data:`SCALES_FILE` if the weights are
            FP8, and the files named in ``moe.data.tokenizer_files.COMPANIONS``; must be new or empty.
        dtype: of activations and matmuls, and of dequantised weights.
        prediction: include the layers of multi-token prediction (DeepSeek-V3), which are skipped otherwise.

    Raises:
        ConfigError: see :func:`moe.interop.load.load_huggingface`; or the workdir holds files.
    """
    workdir = epath.Path(workdir)
    refuse_files(workdir)
    refuse_unusable_path(workdir)
    config, folder, parameters = open_folder(source, dtype=dtype, prediction=prediction)
    written = read_source(source)
    starts = ("decoder_start_token_id",) if config.model.encoder_layers else ()
    known = {name: written.get(name) for name in (*TOKEN_IDS, *starts)}
    files = {GENERATION_FILE: (json.dumps(known) + "\n").encode()}
    files |= _companions(Path(source))
    stated = written | _bias_dtype(folder, parameters)
    files[SOURCE_FILE] = (json.dumps(stated, indent=2) + "\n").encode()
    if isinstance(read_quantization(written), FP8Config):
        files[SCALES_FILE] = pack_scales(folder.scales())
    tree: dict[str, Any] = {}
    biases: dict[str, Any] = {}
    for parameter in parameters:
        set_leaf(biases if parameter.selection_bias else tree, parameter.path, _streamed(folder, parameter))
    with new_folder(workdir):
        streamed.write_parameters(workdir, tree, biases)
        for name, content in files.items():
            write_atomic(workdir / name, content)
        write_run_config(config, workdir, files)  # last: with it a workdir is complete
    return config


def _bias_dtype(folder: TensorFolder, parameters: list[Parameter]) -> Json:
    """The dtype of selection biases, which are float32 here, where the files have a narrower one."""
    biases = [piece.name for parameter in parameters if parameter.selection_bias for piece in parameter.pieces]
    dtypes = {str(folder.dtype(name)) for name in biases}
    narrow = dtypes & set(_NARROW) if len(dtypes) == 1 else set()
    return {BIAS_DTYPE: narrow.pop()} if narrow else {}


def _companions(source: Path) -> dict[str, bytes]:
    """Files that are copied with the weights of a folder. Raises ConfigError for one that cannot be read."""
    found = companions(source)
    if GENERATION_FILE in found:
        read_object(source / GENERATION_FILE)
    return found


def _streamed(folder: TensorFolder, parameter: Parameter) -> streamed.Streamed:
    dtype, everything = parameter_dtype(folder, parameter), (slice(None),) * len(parameter.slot_shape)
    leading = len(parameter.pieces[0].slot)
    rows = 0 if leading else streamed.rows_of_a_part(parameter.shape)

    def read(piece: Piece, index: tuple[slice, ...]) -> np.ndarray:
        values = parameter.read(folder, piece, index).astype(dtype, copy=False)
        if not np.isfinite(values).all():
            raise ConfigError(f"{folder.directory}: {piece.name} holds values that are not finite")
        return values

    def parts() -> Iterator[tuple[tuple[int | slice, ...], np.ndarray]]:
        for piece in parameter.pieces:
            if leading:
                yield piece.slot, read(piece, everything)
            for start in range(0, parameter.shape[0], rows) if rows else ():
                block = slice(start, start + rows)
                yield (block,), read(piece, (block, *everything[1:]))

    return streamed.Streamed(parameter.shape, dtype, leading, parts, rows)


def export_checkpoint(
    workdir: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    model_type: str = "",
    dtype: str = "",
    fused: bool = False,
    quantized: bool = False,
) -> None:
    """Write the newest checkpoint of a workdir as a folder that open-source libraries load, a parameter at a time.

    Args:
        workdir: of a run or an import.
        directory: see :func:`moe.interop.save.save_huggingface`.
        model_type: see there.
        dtype: to cast to; empty: keep the stored one.
        fused: see there.
        quantized: write FP8 blocks where the import had them: with its scales where these give the weights exactly,
            else with the largest absolute weight of a block over 448.

    Raises:
        ConfigError: see there; or the workdir has no checkpoint, was not imported in FP8, or lacks a file that was
            written with it.
    """
    refuse_files(Path(directory))
    config = read_run_config(workdir)
    origin, source, written = open_source(workdir, config, model_type)
    encoders: Encoders = {}
    if quantized:
        encoders = _fp8_encoders(origin, source or {})
        written |= {"quantization_config": _quantization_of_export(source or {})}
    written |= _token_ids(epath.Path(workdir), written)
    if config.model.encoder_layers and source is None:  # trained here, where decoders begin with padding
        written["decoder_start_token_id"] = max(written["pad_token_id"] or 0, 0)

    step = stored.chosen_step(workdir, None)  # of all tensors: the run may save further checkpoints meanwhile

    def fetch(parameter: Parameter) -> Any:
        path = parameter.path
        if parameter.selection_bias:
            biases = get_leaf(stored.read_biases(workdir, config.model, step=step), path)
            return biases if dtype else _as_imported(biases, (source or {}).get(BIAS_DTYPE))
        tree = stored.read_parameters(workdir, config.model, dtype=dtype or None, only=path, step=step)
        return get_leaf(tree, path)

    beside = [epath.Path(workdir) / name for name in companions(workdir)]
    with new_folder(epath.Path(directory)):
        write_folder(written, config.model, fetch, Path(directory), fused=fused, encoders=encoders, copied=beside)


def _as_imported(biases: Any, dtype: object) -> Any:
    """Selection biases in the dtype of the import, unless training has given them values that it does not have."""
    if not isinstance(dtype, str) or dtype not in _NARROW:
        return biases
    narrow = np.asarray(biases).astype(_NARROW[dtype])
    return narrow if np.array_equal(narrow.astype(np.float32), biases) else biases


def open_source(
    workdir: str | os.PathLike[str], config: Config, model_type: str = ""
) -> tuple[epath.Path | None, Json | None, Json]:
    """(workdir of the import that a run comes from, its ``config.json``, the ``config.json`` of an export); the first
    two are None for a run that does not come from an import.

    Raises:
        ConfigError: no open architecture computes this model, or the import's file is missing or damaged.
    """
    origin = _origin(epath.Path(workdir), config)
    source = read_checked_object(origin / SOURCE_FILE) if origin else None
    return origin, source, keep_fields(source, config, model_type) if source else write_config(config, model_type)


def _quantization_of_export(source: Json) -> Json:
    """The import's ``quantization_config``, with the module names of the text model by itself."""
    return rename_modules(source["quantization_config"], FAMILIES[source["model_type"]].inside)


def _fp8_encoders(origin: epath.Path | None, source: Json) -> Encoders:
    """Functions that encode the FP8 tensors of an import again, by tensor name."""
    quantization = read_quantization(source)
    if origin is None or not isinstance(quantization, FP8Config) or not is_there(origin / SCALES_FILE):
        raise ConfigError("quantized: must be False for a model that was not imported in FP8")
    encoders: Encoders = {}
    for name, scales in unpack_scales(read_checked(origin / SCALES_FILE)).items():
        encoders[name] = functools.partial(_encode, name, scales, quantization)
    return encoders


def _encode(name: str, scales: np.ndarray, quantization: FP8Config, tensor: np.ndarray) -> dict[str, np.ndarray]:
    form = quantization.form(name, tensor.shape)
    return form.write(tensor, scales)


def _origin(workdir: epath.Path, config: Config) -> epath.Path | None:
    """The workdir of the import: this one, or the one it started from, or that one's, and so on. Raises ConfigError
    where the config of one of them is damaged."""
    seen = set()
    while str(workdir) not in seen:
        seen.add(str(workdir))
        if is_there(workdir / SOURCE_FILE):
            return workdir
        if not config.start.checkpoint:
            return None
        workdir = epath.Path(config.start.checkpoint)
        if not (workdir / CONFIG).exists():  # it was moved or deleted since
            return None
        config = read_run_config(workdir)
    return None


def _token_ids(workdir: epath.Path, written: Json) -> Json:
    """Token ids of begin, end and padding: those in ``written``, else the generation config's or the tokenizer's."""
    known = {name: written[name] for name in TOKEN_IDS if written.get(name) is not None}
    if is_there(workdir / GENERATION_FILE):
        source = read_checked_object(workdir / GENERATION_FILE)
        return {name: source.get(name) for name in TOKEN_IDS} | known
    try:
        tokenizer = find_tokenizer(workdir)
    except ConfigError:
        return dict.fromkeys(TOKEN_IDS) | known
    bos = tokenizer.bos_id if tokenizer.bos_id >= 0 else None
    return dict(zip(TOKEN_IDS, (bos, tokenizer.eos_id, tokenizer.pad_id), strict=True)) | known
