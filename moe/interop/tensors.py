"""Tensors of a folder of safetensors files, and where each belongs in our stacked parameters.

A :class:`Piece` is one tensor of a file and the slot of a parameter that it fills: a layer's, or a layer's expert's.
:class:`Folder` reads slices of tensors from memory-mapped files; one tensor at a time is in memory.

Letters: see :mod:`moe.models.decoder`; R repeats of a unit of layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors

from moe.config import ConfigError, ModelConfig
from moe.interop.families import OUTSIDE, Family
from moe.models.flops import abstract_parameters
from moe.models.stack import stacked_layers

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}

#: How many leading axes of a parameter are its matrix's inputs. Files hold matrices as [outputs, inputs]; what is not
#: listed is stored as it is, biases flattened.
_INPUT_AXES = {
    "attention.query": 1,
    "attention.key": 1,
    "attention.value": 1,
    "attention.out": 2,
    "dense.gate": 1,
    "dense.up": 1,
    "dense.down": 1,
    "experts.gate": 1,
    "experts.up": 1,
    "experts.down": 1,
    "router.kernel": 1,
    "shared.gate": 1,
    "unembedding.kernel": 1,
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor.

    Attributes:
        name: in the file.
        slot: its index in the leading axes of the parameter: (), (r,) or (r, e).
    """

    name: str
    slot: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One of our arrays, made of pieces.

    Attributes:
        path: keys in the nested dict of parameters.
        shape: of the whole array, stacked.
        pieces: all that fill it, in slot order.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def slot_shape(self) -> tuple[int, ...]:
        """Of one piece, as we keep it."""
        return self.shape[len(self.pieces[0].slot) :]

    @property
    def input_axes(self) -> int:
        """Leading axes of a piece that are its matrix's inputs; 0: no matrix."""
        return _INPUT_AXES.get(".".join(self.path[-2:]), 0)

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Of one piece, in the file."""
        n = self.input_axes
        if n:
            return int(np.prod(self.slot_shape[n:])), int(np.prod(self.slot_shape[:n]))
        return (int(np.prod(self.slot_shape)),) if self.path[-1].endswith("bias") else self.slot_shape

    def to_file(self, piece: np.ndarray) -> np.ndarray:
        """One whole piece as files hold it: [inputs..., outputs...] → [inputs, outputs] → [outputs, inputs]."""
        if self.input_axes:
            return np.ascontiguousarray(piece.reshape(self.file_shape[::-1]).T)
        return np.ascontiguousarray(piece.reshape(self.file_shape))

    def read(self, folder: Folder, piece: Piece, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of one piece, in the file's dtype.

        Args:
            folder: to read from.
            piece: of this parameter.
            index: a slice per axis of :attr:`slot_shape`.
        """
        shape, n = self.slot_shape, self.input_axes
        groups = [(shape[n:], index[n:]), (shape[:n], index[:n])] if n else [(shape, index)]
        if not n and len(self.file_shape) == len(shape):
            return folder.read(piece.name, index)
        # Each axis of the file is several of ours, flattened: what is contiguous in it is read, the rest cut off.
        reads, cuts, sizes = [], [], []
        for dims, slices in groups:
            inner = int(np.prod(dims[1:]))
            start, stop, _ = slices[0].indices(dims[0])
            reads.append(slice(start * inner, stop * inner))
            sizes.append((stop - start, *dims[1:]))
            cuts.append((slice(None), *slices[1:]))
        tensor = folder.read(piece.name, tuple(reads))
        if not n:
            return tensor.reshape(sizes[0])[cuts[0]]
        # [outputs, inputs] → [inputs, outputs] → [inputs..., outputs...]
        return tensor.T.reshape(*sizes[1], *sizes[0])[(*cuts[1], *cuts[0])]


def layout(model: ModelConfig, family: Family) -> list[Parameter]:
    """All parameters of a model and the tensors that make them, by the family's names."""
    parameters = []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(abstract_parameters(model)):
        path = tuple(str(key.key) for key in key_path)
        stacked = stacked_layers(model, path)
        if stacked is None:
            parameters.append(Parameter(path, leaf.shape, (Piece(OUTSIDE[".".join(path)], ()),)))
            continue
        within = ".".join(stacked[1])
        if within not in family.layer:
            raise ConfigError(f"{family.architecture}: has no tensor for {within}")
        template = family.layer[within]
        pieces = []
        for repeat, layer in enumerate(stacked[0]):
            name = f"model.layers.{layer}.{template}"
            if "{expert}" in name:
                pieces += [Piece(name.format(expert=e), (repeat, e)) for e in range(leaf.shape[1])]
            else:
                pieces.append(Piece(name, (repeat,)))
        parameters.append(Parameter(path, leaf.shape, tuple(pieces)))
    return parameters


class Folder:
    """The tensors of ``model.safetensors``, or of the files that ``model.safetensors.index.json`` names."""

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
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            files = sorted(set(weight_map.values()))
        elif (self.directory / SINGLE_FILE).exists():
            weight_map, files = {}, [SINGLE_FILE]
        else:
            hint = "; pickled weights are not read" if list(self.directory.glob("*.bin")) else ""
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
        """Of all tensors."""
        return set(self._file)

    def dtype(self, name: str) -> np.dtype[Any]:
        """Of one tensor."""
        if self._dtype[name] not in DTYPES:
            raise ConfigError(f"{name}: is {self._dtype[name]}; only {', '.join(DTYPES)} are read")
        return DTYPES[self._dtype[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self._shape[name]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A copy of a slice of a tensor.

        The file is mapped for this read only: pages of a mapping count as this process's memory while it lasts.
        """
        with _open(self._file[name]) as file:
            return file.get_slice(name)[index or (slice(None),) * len(self._shape[name])]

    def check(self, parameters: Sequence[Parameter], tied: bool) -> None:
        """Every tensor has one place, every place one tensor, of the right shape and a float type.

        Raises:
            ConfigError: naming the first few that do not.
        """
        wanted = {piece.name: parameter.file_shape for parameter in parameters for piece in parameter.pieces}
        found = {name for name in self.names() if not name.endswith("rotary_emb.inv_freq")}
        if tied and OUTSIDE["unembedding.kernel"] in found:
            # Some writers store the tied matrix twice. It must be the same.
            table, head = OUTSIDE["embedding.table"], OUTSIDE["unembedding.kernel"]
            if table in found and not np.array_equal(self.read(table), self.read(head)):
                raise ConfigError(f"{head}: differs from {table}, though config.json says tie_word_embeddings")
            found.discard(head)
        problems = [f"missing {name}" for name in _ordered(wanted.keys() - found)]
        problems += [f"surplus {name}" for name in _ordered(found - wanted.keys())]
        for name in _ordered(found & wanted.keys()):
            self.dtype(name)
            if self.shape(name) != wanted[name]:
                problems.append(f"{name} has shape {list(self.shape(name))}, config.json asks for {list(wanted[name])}")
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ConfigError(f"{self.directory}: {'; '.join(problems[:5])}{more}")


def _ordered(names: set[str]) -> list[str]:
    """By number where there are numbers: layer 2 before layer 10."""
    return sorted(names, key=lambda name: [part.zfill(8) for part in name.split(".")])


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    if not path.exists():
        raise ConfigError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{path}: damaged: {error}") from error
