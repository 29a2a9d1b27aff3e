"""Safetensors files of a checkpoint: reading from one or several of them, and writing."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from absl import logging
from safetensors.numpy import save_file

from moe.config import ConfigError
from moe.interop.families.family import Family
from moe.interop.layout import Parameter
from moe.interop.quantization_config import ACTIVATION_SCALES, Quantization
from moe.interop.quantized import Form, FP8Blocks
from moe.interop.schema import parse_index
from moe.system.atomic_files import write_atomic
from moe.system.foreign_files import read_object

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_PICKLED = (
    "; pickled weights (*.bin) can run code and are not read: if you trust them, convert them once with "
    "transformers, by CLASS.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), the CLASS that config.json names"
)


#: Types that safetensors' NumPy reader does not know; their bytes are read.
_BYTES = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


class StoredTensors:
    """Tensors as stored in files, by name; ``rename`` maps a name in a file to the tensor's name."""

    def __init__(self, rename: Callable[[str], str] = lambda name: name) -> None:
        self.rename = rename
        self.headers: dict[str, tuple[tuple[int, ...], str]] = {}  # name → (shape, type)
        self.files: dict[str, Path] = {}
        self._names: dict[str, str] = {}  # name → name in its file
        self._starts: dict[Path, dict[str, int]] = {}  # of files with 8-bit floats: byte at which each tensor starts

    def add_file(self, path: Path) -> None:
        """Read the header of a file. Raises ConfigError for a damaged one, or a name that another file has too."""
        with _open(path) as file:
            for stored in file.keys():  # noqa: SIM118
                name = self.rename(stored)
                if name in self.files:
                    raise ConfigError(f"{path}: {name} is in {self.files[name].name} too")
                tensor = file.get_slice(stored)
                self.files[name], self._names[name] = path, stored
                self.headers[name] = (tuple(tensor.get_shape()), tensor.get_dtype())

    def read(self, name: str, index: tuple[int | slice, ...]) -> np.ndarray:
        """Copy of a part of a tensor; empty index: all of it.

        The file is mapped for this read only: pages of a mapping count as this process's memory while it lasts.
        """
        path, (shape, kind) = self.files[name], self.headers[name]
        name = self._names[name]
        if kind in _BYTES:
            array = np.memmap(path, np.uint8, "r", self._start(path, name), shape)
            return np.array(array[index]).view(_BYTES[kind])
        with _open(path) as file:
            # A scalar has no slices.
            return file.get_slice(name)[index or (slice(None),) * len(shape)] if shape else file.get_tensor(name)

    def alias(self, name: str, other: str) -> None:
        """Give a tensor another name beside its own."""
        self.headers[other], self.files[other] = self.headers[name], self.files[name]
        self._names[other] = self._names[name]

    def _start(self, path: Path, name: str) -> int:
        if path not in self._starts:
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            starts = {key: 8 + size + entry["data_offsets"][0] for key, entry in header.items() if "dtype" in entry}
            self._starts[path] = starts
        return self._starts[path][name]


#: Numbers of two tensors that are compared at once.
_COMPARED = 2**24


class TensorFolder:
    """Tensors of floats in a folder: in ``model.safetensors`` or the files that its index names.

    Quantised tensors are dequantised when they are read.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        quantization: Quantization | None = None,
        dtype: str = "float32",
        rename: Callable[[str], str] = lambda name: name,
    ):
        """Read the headers.

        Args:
            directory: holds the files.
            quantization: of the weights.
            dtype: of the floats that quantised weights are read as.
            rename: maps the name in a file to the tensor's name.

        Raises:
            ConfigError: no safetensors there, a damaged file, an index that disagrees with its files, or codes and
                scales that do not belong together.
        """
        self.directory = Path(directory)
        self._stored = stored = StoredTensors(rename)
        index = self.directory / INDEX_FILE
        if (self.directory / SINGLE_FILE).exists():  # an index beside it belongs to earlier shards
            weight_map, files = {}, [SINGLE_FILE]
        elif index.exists():
            weight_map = {rename(name): file for name, file in parse_index(read_object(index), index).items()}
            files = sorted(set(weight_map.values()))
        else:
            hint = _PICKLED if list(self.directory.glob("*.bin")) else ""
            raise ConfigError(f"{self.directory}: holds neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
        for file in files:
            stored.add_file(self.directory / file)
        for name, file in weight_map.items():
            if stored.files.get(name) != self.directory / file:
                raise ConfigError(f"{index}: {name} is not in {file}")
        for name, file in stored.files.items():
            if weight_map and name not in weight_map:
                raise ConfigError(f"{index}: does not list {name}, which is in {file.name}")
        self.forms: dict[str, Form] = quantization.forms(stored.headers) if quantization else {}
        parts = {part for form in self.forms.values() for part in form.parts}
        parts |= {name for name in stored.headers if quantization and name.endswith(ACTIVATION_SCALES)}
        kind = "BF16" if dtype == "bfloat16" else "F32"
        self._headers = {name: header for name, header in stored.headers.items() if name not in parts}
        self._headers |= {name: (form.shape, kind) for name, form in self.forms.items()}

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._headers)

    def dtype(self, name: str) -> np.dtype[Any]:
        """Type of a tensor. Raises ConfigError unless it is a 16- or 32-bit float."""
        kind = self._headers[name][1]
        if kind not in DTYPES:
            raise ConfigError(f"{name}: is {kind}; only {', '.join(DTYPES)} are read")
        return DTYPES[kind]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._headers[name][0]

    def read(self, name: str, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Copy of a part of a tensor; empty index: all of it."""
        if name in self.forms:
            return self.forms[name].read(self._stored, index, self.dtype(name))
        return self._stored.read(name, index)

    def scales(self) -> dict[str, np.ndarray]:
        """Scales of all FP8 tensors, by the names of the tensors."""
        forms = {name: form for name, form in self.forms.items() if isinstance(form, FP8Blocks)}
        return {name: self._stored.read(form.scales, ()) for name, form in forms.items()}

    def skip_layers(self, after: range) -> None:
        """Ignore the layers with these numbers: multi-token prediction (DeepSeek-V3) that was not asked for."""
        self._skip([name for name in self._headers if _layer_number(name) in after], "multi-token prediction")

    def skip_parts(self, parts: Mapping[str | re.Pattern[str], str]) -> None:
        """Ignore parts that no model here has: prefix of their tensors, or pattern of the names → what they are."""
        for part, what in parts.items():
            found = part if isinstance(part, re.Pattern) else re.compile(re.escape(part))
            self._skip([name for name in self._headers if found.match(name)], what)

    def _skip(self, names: Sequence[str], what: str) -> None:
        for name in names:
            del self._headers[name]
            self.forms.pop(name, None)
        if names:
            logging.warning("%s: %d tensors of %s are skipped", self.directory, len(names), what)

    def drop_copies(self, originals: dict[str, str]) -> None:
        """Ignore tensors that must equal another one of this folder (copy → original).

        Raises:
            ConfigError: a copy differs.
        """
        for copy, original in originals.items():
            if self.differ(copy, original):
                raise ConfigError(f"{copy}: differs from {original}, which layers of multi-token prediction share here")
            self._headers.pop(copy, None)

    def fill_originals(self, copies: Mapping[str, str]) -> None:
        """Read each absent original from its first copy (copy → original): a file may hold tied tensors under any
        one of their names."""
        for copy, original in copies.items():
            if copy in self._headers and original not in self._headers:
                self._headers[original] = self._headers.pop(copy)
                if copy in self.forms:
                    self.forms[original] = self.forms.pop(copy)
                else:
                    self._stored.alias(copy, original)

    def differ(self, copy: str, original: str) -> bool:
        """Whether a tensor that should equal another one differs from it; False if either is absent."""
        if not {copy, original} <= self._headers.keys():
            return False
        shape = self.shape(original)
        if self.shape(copy) != shape:
            return True
        # A block of rows at a time: embedding tables are among the largest tensors.
        rows = max(1, _COMPARED // max(1, math.prod(shape[1:])))
        blocks = [(slice(start, min(start + rows, shape[0])),) for start in range(0, shape[0], rows)] if shape else [()]
        return any(not np.array_equal(self.read(original, block), self.read(copy, block)) for block in blocks)

    def check(self, parameters: Sequence[Parameter], family: Family) -> None:
        """Check that tensors and parameters match one to one, in shape, with a float type.

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
        if not family.copies.keys().isdisjoint(wanted):  # with a table for each stack, the shared one is not used
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
        self.sizes: dict[np.dtype[Any], int] = {}  # bytes of each type
        self._shard: dict[str, np.ndarray] = {}
        self._files: list[list[str]] = []  # names of the tensors in each file
        self._size = self._total = 0

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Append a tensor."""
        if self._shard and self._size + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        self._shard[name] = tensor
        self._size, self._total = self._size + tensor.nbytes, self._total + tensor.nbytes
        self.sizes[tensor.dtype] = self.sizes.get(tensor.dtype, 0) + tensor.nbytes

    def finish(self) -> None:
        """Write what is left and give the files their final names."""
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
        path = self._temporary(len(self._files))
        path.touch()  # with the mode of the umask: safetensors renames a file of mode 0600 to the path
        mode = path.stat().st_mode
        save_file(self._shard, path, metadata={"format": "pt"})
        path.chmod(mode)
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
