"""Safetensors files of a checkpoint: reading from one or several of them, and writing."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from absl import logging
from etils import epath
from safetensors.numpy import save_file

from moe.atomic_files import write_atomic
from moe.config import ConfigError, read_small_file
from moe.interop.families.family import Family
from moe.interop.layout import Parameter
from moe.interop.schema import Json, parse_index

CONFIG_FILE, INDEX_FILE, SINGLE_FILE = "config.json", "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_PICKLED = (
    "; pickled weights (*.bin) can run code and are not read: where you trust them, convert them once with "
    "transformers, by CLASS.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), the CLASS that config.json names"
)


def read_json(path: Path | epath.Path) -> Json:
    """The JSON object in a file.

    Raises:
        ConfigError: no such file, no JSON, or JSON that is no object.
    """
    content = read_small_file(path)
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:  # ValueError: malformed JSON, bytes that are not UTF-8
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a JSON object, not {type(tree).__name__}")
    return tree


class TensorFolder:
    """Tensors of ``model.safetensors``, or of the files that ``model.safetensors.index.json`` names."""

    def __init__(self, directory: str | os.PathLike[str]):
        """Reads the headers.

        Raises:
            ConfigError: no safetensors there, a damaged file, or an index that disagrees with its files.
        """
        self.directory = Path(directory)
        self._file: dict[str, Path] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        self._dtype: dict[str, str] = {}
        index = self.directory / INDEX_FILE
        if index.exists():
            weight_map = parse_index(read_json(index), index)
            files = sorted(set(weight_map.values()))
        elif (self.directory / SINGLE_FILE).exists():
            weight_map, files = {}, [SINGLE_FILE]
        else:
            hint = _PICKLED if list(self.directory.glob("*.bin")) else ""
            raise ConfigError(f"{self.directory}: holds neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
        for file in files:
            self._read_header(self.directory / file)
        for name, file in weight_map.items():
            if self._file.get(name) != self.directory / file:
                raise ConfigError(f"{index}: {name} is not in {file}")
        for name, file in self._file.items():
            if weight_map and name not in weight_map:
                raise ConfigError(f"{index}: does not list {name}, which is in {file.name}")

    def _read_header(self, path: Path) -> None:
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name in self._file:
                    raise ConfigError(f"{path}: {name} is in {self._file[name].name} too")
                tensor = file.get_slice(name)
                self._file[name] = path
                self._shape[name], self._dtype[name] = tuple(tensor.get_shape()), tensor.get_dtype()

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file)

    def dtype(self, name: str) -> np.dtype[Any]:
        """Type of a tensor. Raises ConfigError for one that is no float of 16 or 32 bits."""
        if self._dtype[name] not in DTYPES:
            raise ConfigError(f"{name}: is {self._dtype[name]}; only {', '.join(DTYPES)} are read")
        return DTYPES[self._dtype[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._shape[name]

    def read(self, name: str, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Copy of a part of a tensor; empty index: all of it.

        The file is mapped for this read only: pages of a mapping count as this process's memory while it lasts.
        """
        with _open(self._file[name]) as file:
            return file.get_slice(name)[index or (slice(None),) * len(self._shape[name])]

    def skip_layers(self, after: range) -> None:
        """Ignore layers of these numbers: multi-token prediction (DeepSeek-V3), which no model here computes."""
        skipped = [name for name in self._file if _layer_number(name) in after]
        for name in skipped:
            del self._file[name], self._shape[name], self._dtype[name]
        if skipped:
            logging.warning("%s: %d tensors of multi-token prediction are skipped", self.directory, len(skipped))

    def differ(self, copy: str, original: str) -> bool:
        """Whether a tensor that should be a copy of another is none."""
        found = {copy, original} <= self._file.keys()
        return found and not np.array_equal(self.read(original), self.read(copy))

    def check(self, parameters: Sequence[Parameter], family: Family) -> None:
        """Checks that tensors and parameters match one to one, in shape, with a float type.

        Raises:
            ConfigError: naming the first few that do not.
        """
        wanted = {piece.name: parameter.file_shape for parameter in parameters for piece in parameter.pieces}
        found = {name for name in self.names() if not name.endswith("rotary_emb.inv_freq")} - set(family.unread)
        for copy in (family.copies.keys() & found) - wanted.keys():
            # Some writers store the tied matrix twice. It must be the same.
            if self.differ(copy, family.copies[copy]):
                raise ConfigError(
                    f"{copy}: differs from {family.copies[copy]}, though config.json says tie_word_embeddings"
                )
            found.discard(copy)
        if not family.copies.keys().isdisjoint(wanted):  # with a table for each stack, nobody reads the shared one
            found -= set(family.copies.values()) - wanted.keys()
        problems = [f"missing {name}" for name in _by_number(wanted.keys() - found)]
        problems += [f"surplus {name}" for name in _by_number(found - wanted.keys())]
        for name in _by_number(found & wanted.keys()):
            self.dtype(name)
            if self.shape(name) != wanted[name]:
                problems.append(f"{name} has shape {list(self.shape(name))}, config.json asks for {list(wanted[name])}")
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ConfigError(f"{self.directory}: {'; '.join(problems[:5])}{more}")


class TensorWriter:
    """Writes tensors into safetensors files of bounded size; the index, if there are several, comes last."""

    def __init__(self, directory: Path, max_shard_bytes: int):
        """Args: directory, made with the first file; max_shard_bytes, of one file unless one tensor is larger."""
        self.directory, self.max_shard_bytes = directory, max_shard_bytes
        self.dtypes: set[np.dtype[Any]] = set()
        self._shard: dict[str, np.ndarray] = {}
        self._files: list[list[str]] = []  # names of the tensors in each file
        self._size = self._total = 0

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Appends a tensor."""
        if self._shard and self._size + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        self._shard[name] = tensor
        self._size, self._total = self._size + tensor.nbytes, self._total + tensor.nbytes
        self.dtypes.add(tensor.dtype)

    def finish(self) -> None:
        """Writes what is left and gives the files their final names."""
        self._flush()
        if len(self._files) == 1:
            self._temporary(1).replace(self.directory / SINGLE_FILE)
            return
        weight_map = {}
        for number, names in enumerate(self._files, 1):
            final = f"model-{number:05d}-of-{len(self._files):05d}.safetensors"
            self._temporary(number).replace(self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        write_atomic(self.directory / INDEX_FILE, json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        self._files.append(list(self._shard))
        self.directory.mkdir(parents=True, exist_ok=True)
        save_file(self._shard, self._temporary(len(self._files)), metadata={"format": "pt"})
        self._shard, self._size = {}, 0

    def _temporary(self, number: int) -> Path:
        return self.directory / f"model-{number:05d}.safetensors.tmp"


def _layer_number(name: str) -> int:
    """Number of the layer that a tensor belongs to; -1 outside the layers."""
    number = name.removeprefix("model.layers.").partition(".")[0]
    return int(number) if name.startswith("model.layers.") and number.isdecimal() and len(number) < 9 else -1


def _by_number(names: set[str]) -> list[str]:
    """Sorted names, layer 2 before layer 10."""
    return sorted(names, key=lambda name: [part.zfill(8) for part in name.split(".")])


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{path}: damaged: {error}") from error
