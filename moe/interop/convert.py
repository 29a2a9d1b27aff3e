"""From a folder to a model in memory, and back.

Letters: see :mod:`moe.models.decoder`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax import Array
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors.numpy import save_file

from moe.checkpoints import parameters as stored
from moe.config import Config, ConfigError, ModelConfig, to_dict
from moe.data.tokenizer_files import find_tokenizer
from moe.interop.families import FAMILIES, Json, family_of, read_config, write_config
from moe.interop.tensors import INDEX_FILE, SINGLE_FILE, Folder, Parameter, layout
from moe.models.decoder import Transformer
from moe.models.flops import abstract_parameters
from moe.parallel import partition_specs
from moe.routing.balancing import count_per_expert
from moe.routing.routing import Routing

#: Files that go with the weights, both ways, unread: what text means and how it ends.
COMPANIONS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "generation_config.json"),
)
GENERATION_FILE = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_huggingface(
    directory: str | os.PathLike[str], *, mesh: Mesh | None = None, dtype: str = "float32"
) -> tuple[Transformer, Config]:
    """A model that computes what the folder's does.

    Args:
        directory: holds ``config.json`` and safetensors files.
        mesh: where to put the parameters, each shard read by itself; None: on the default device.
        dtype: of activations and matmuls; parameters keep the dtype of their tensors.

    Returns:
        (model, config): ``model(tokens).logits`` are [B,T,V].

    Raises:
        ConfigError: an architecture or a setting that is not supported, or a tensor that is missing, surplus or of the
            wrong shape.
    """
    config, folder, parameters = open_folder(directory, dtype=dtype)
    arrays = place_parameters(folder, parameters, config.model, mesh)
    return module(config.model, arrays), config


def open_folder(directory: str | os.PathLike[str], *, dtype: str = "float32") -> tuple[Config, Folder, list[Parameter]]:
    """The config of a folder, its tensors, checked, and where they belong. Nothing but headers is read."""
    source = read_json(Path(directory) / "config.json")
    config = read_config(source)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    folder = Folder(directory)
    parameters = layout(config.model, family_of(source))
    folder.check(parameters, config.model.tie_embeddings)
    return config, folder, parameters


def read_json(path: Path) -> Json:
    """The object in a file.

    Raises:
        ConfigError: there is none.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such file")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error


def module(model: ModelConfig, parameters: dict[str, Any]) -> Transformer:
    """The NNX module over these parameters."""
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)))), parameters)


def parameter_dtype(folder: Folder, parameter: Parameter) -> np.dtype[Any]:
    """That of all its tensors, or float32 if they differ."""
    dtypes = {folder.dtype(piece.name) for piece in parameter.pieces}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def place_parameters(
    folder: Folder, parameters: list[Parameter], model: ModelConfig, mesh: Mesh | None
) -> dict[str, Any]:
    """Nested dict of arrays; a device's shard is put together from the slices of the files that it needs."""
    specs = partition_specs.parameter_specs(abstract_parameters(model))
    tree: dict[str, Any] = {}
    for parameter in parameters:
        spec, node = specs, tree
        for key in parameter.path:
            spec = spec[key]
        for key in parameter.path[:-1]:
            node = node.setdefault(key, {})
        where = SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else jax.NamedSharding(mesh, spec)
        node[parameter.path[-1]] = jax.make_array_from_callback(parameter.shape, where, shard_reader(folder, parameter))
    return tree


def shard_reader(folder: Folder, parameter: Parameter) -> Callable[[Any], np.ndarray]:
    """index (a slice per axis of the parameter) → that part of it."""
    dtype = parameter_dtype(folder, parameter)
    leading = len(parameter.pieces[0].slot)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = [at.indices(size)[:2] for at, size in zip(index, parameter.shape, strict=True)]
        shard = np.empty([stop - start for start, stop in bounds], dtype)
        for piece in parameter.pieces:
            slot = [at - start for at, (start, _) in zip(piece.slot, bounds[:leading], strict=True)]
            if all(0 <= at < stop - start for at, (start, stop) in zip(slot, bounds[:leading], strict=True)):
                shard[tuple(slot)] = parameter.read(folder, piece, index[leading:])
        return shard

    return read


def load_balancing_loss(routing: Routing) -> Array:
    """That library's auxiliary loss, of all MoE layers together: E·Σ_e (Σ_k f_ke)·P_e, K at perfect balance.

    f_ke is the share of tokens whose k-th choice is e and P_e the mean probability of e, both over the tokens of all
    layers; every token counts, as it does there without an attention mask.

    Args:
        routing: arrays [L,G,S,...], from ``model(tokens, return_routing=True).routing``.
    """
    num_experts = routing.router_probs.shape[-1]
    tokens = routing.router_probs.size // num_experts
    counts = count_per_expert(routing.expert_index, jnp.ones_like(routing.chosen), num_experts)
    mean_probs = jnp.mean(routing.router_probs, axis=(0, 1, 2))
    return num_experts * jnp.sum(counts / tokens * mean_probs)


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
        model_type: architecture to write it as; empty: the first that can say it.
        max_shard_bytes: of one file, unless a single tensor is larger.

    Raises:
        ConfigError: no open architecture computes this model, or the folder is not empty of weights.
    """
    parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def fetch(parameter: Parameter) -> Any:
        node = parameters
        for key in parameter.path:
            node = node[key]
        return node

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
    """As :func:`save_huggingface`, taking the parameters one by one.

    Args:
        config: of the model.
        fetch: a parameter's whole array, sliceable; called once for each, and not kept.
        directory: as there.
        model_type: as there.
        max_shard_bytes: as there.
        token_ids: of :data:`TOKEN_IDS`, those that are known.
    """
    source: Json = {**write_config(config, model_type), **dict.fromkeys(TOKEN_IDS), **(token_ids or {})}
    if (directory / SINGLE_FILE).exists() or (directory / INDEX_FILE).exists():
        raise ConfigError(f"{directory}: holds weights already")
    shard: dict[str, np.ndarray] = {}
    files: list[list[str]] = []  # names of the tensors in each file
    size = total = 0
    dtypes: set[np.dtype[Any]] = set()

    def flush() -> None:
        nonlocal shard, size
        files.append(list(shard))
        directory.mkdir(parents=True, exist_ok=True)  # not before there is something to put in it
        save_file(shard, _shard_path(directory, len(files)), metadata={"format": "pt"})
        shard, size = {}, 0

    for parameter in layout(config.model, FAMILIES[source["model_type"]]):
        array = fetch(parameter)
        for piece in parameter.pieces:
            tensor = parameter.to_file(np.asarray(array[piece.slot]))
            if shard and size + tensor.nbytes > max_shard_bytes:
                flush()
            shard[piece.name] = tensor
            size, total = size + tensor.nbytes, total + tensor.nbytes
            dtypes.add(tensor.dtype)
    flush()
    if len(files) == 1:
        _shard_path(directory, 1).replace(directory / SINGLE_FILE)
    else:
        weight_map = {}
        for number, names in enumerate(files, 1):
            final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            _shard_path(directory, number).replace(directory / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    source["torch_dtype"] = str(dtypes.pop()) if len(dtypes) == 1 else "float32"
    (directory / "config.json").write_text(json.dumps(source, indent=2) + "\n")


def import_checkpoint(
    source: str | os.PathLike[str], workdir: str | os.PathLike[str], *, dtype: str = "float32"
) -> Config:
    """Writes a folder's model as a checkpoint of ours, one tensor in memory at a time.

    Args:
        source: as in :func:`load_huggingface`.
        workdir: gets ``config.json``, ``checkpoints/0`` and the :data:`COMPANIONS`; must hold no checkpoints.
        dtype: of activations and matmuls.

    Raises:
        ConfigError: as in :func:`load_huggingface`, or the workdir is taken.
    """
    config, folder, parameters = open_folder(source, dtype=dtype)
    workdir = epath.Path(workdir)
    tree: dict[str, Any] = {}
    for parameter in parameters:
        node = tree
        for key in parameter.path[:-1]:
            node = node.setdefault(key, {})
        node[parameter.path[-1]] = _streamed(folder, parameter)
    workdir.mkdir(parents=True, exist_ok=True)
    stored.write_parameters(workdir, tree)
    for name in COMPANIONS:
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, workdir / name)
    if not (workdir / GENERATION_FILE).exists():
        written = read_json(Path(source) / "config.json")
        (workdir / GENERATION_FILE).write_text(json.dumps({name: written.get(name) for name in TOKEN_IDS}) + "\n")
    (workdir / "config.json").write_text(json.dumps(to_dict(config), indent=2))
    return config


def _streamed(folder: Folder, parameter: Parameter) -> stored.Streamed:
    dtype, everything = parameter_dtype(folder, parameter), (slice(None),) * len(parameter.slot_shape)

    def parts() -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        for piece in parameter.pieces:
            yield piece.slot, parameter.read(folder, piece, everything).astype(dtype)

    return stored.Streamed(parameter.shape, dtype, len(parameter.pieces[0].slot), parts)


def export_checkpoint(
    workdir: str | os.PathLike[str], directory: str | os.PathLike[str], *, model_type: str = "", dtype: str = ""
) -> None:
    """Writes the newest checkpoint of a workdir as a folder that open-source libraries load, a parameter at a time.

    Args:
        workdir: of a run or an import.
        directory: as in :func:`save_huggingface`.
        model_type: as there.
        dtype: to cast to; empty: as stored.

    Raises:
        ConfigError: as there, or no checkpoint.
    """
    config = stored.read_config(workdir)

    def fetch(parameter: Parameter) -> Any:
        node = stored.read_parameters(workdir, config.model, dtype=dtype or None, only=parameter.path)
        for key in parameter.path:
            node = node[key]
        return node

    write_folder(config, fetch, Path(directory), model_type=model_type, token_ids=_token_ids(epath.Path(workdir)))
    for name in COMPANIONS:
        if (epath.Path(workdir) / name).exists():
            (Path(directory) / name).write_bytes((epath.Path(workdir) / name).read_bytes())


def _token_ids(workdir: epath.Path) -> Json:
    """What begins, ends and pads a text: as an import left it, or by the tokenizer of a run."""
    if (workdir / GENERATION_FILE).exists():
        source = json.loads((workdir / GENERATION_FILE).read_text())
        return {name: source.get(name) for name in TOKEN_IDS}
    try:
        tokenizer = find_tokenizer(workdir)
    except ConfigError:
        return {}
    bos = tokenizer.bos_id if tokenizer.bos_id >= 0 else None
    return dict(zip(TOKEN_IDS, (bos, tokenizer.eos_id, tokenizer.pad_id), strict=True))


def _shard_path(directory: Path, number: int) -> Path:
    return directory / f"model-{number:05d}.safetensors.tmp"
