"""Any text dataset that TFDS has prepared, as documents.

In: its name and a directory. Out: two disjoint sequences of documents (``str``), ``train`` and ``heldout``, read at
random from array_record files. Also what everything that prepares text shares: how long texts are cut, the directory's
lock, and its disk's errors.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import importlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging
from etils import epath

from moe.config import ConfigError

HELDOUT_FRACTION = 0.05  # of the documents of a domain
FEW = 1_000  # documents of a foreign dataset, below which long ones are cut
HELDOUT_SCAN = 50_000  # documents from which a foreign dataset without a held-out split gives up some


def sections(text: str, target: int, limit: int) -> list[str]:
    """Cuts text at the first blank line after `target` characters, or any line end after `limit`; loses nothing.

    A tail shorter than 2,000 characters stays with the section before it.
    """
    parts, current, size = [], [], 0
    for line in text.splitlines(keepends=True):
        current.append(line)
        size += len(line)
        if size >= limit or (size >= target and not line.strip()):
            parts.append("".join(current))
            current, size = [], 0
    if tail := "".join(current):
        if parts and len(tail) < 2_000:
            parts[-1] += tail
        else:
            parts.append(tail)
    return parts


class Documents(Sequence[str]):
    """The texts of one split of a prepared TFDS dataset by index; with `indices`, only those of it."""

    def __init__(self, builder: Any, split: str, indices: np.ndarray | None = None):
        """Opens the split's shards.

        Raises:
          ConfigError: a shard is lost or broken, here or when a document is read; the file is named.
        """
        self._split, self._indices = builder.info.splits[split], indices
        try:
            self._source = builder.as_data_source(split=split)
            # It opens a shard when something of it is first read, which may be hours later. On local disk an early
            # look costs a tenth of a millisecond a shard.
            if "://" not in os.fspath(builder.data_dir):
                for last in np.cumsum(self._split.shard_lengths) - 1:
                    self._source[int(last)]
        except NotImplementedError:  # tfrecord: no random access; open_tfds says so
            raise
        except Exception as error:  # TFDS and its reader raise whatever they meet
            raise ConfigError(self._broken(error, None)) from error

    def __len__(self) -> int:
        return len(self._source) if self._indices is None else len(self._indices)

    def __getitem__(self, index: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < len(self):  # what ends iteration over a Sequence
            raise IndexError(index)
        number = index if self._indices is None else int(self._indices[index])
        try:
            text = self._source[number]["text"]
            return text.decode("utf-8") if isinstance(text, bytes) else str(text)
        except Exception as error:
            raise ConfigError(self._broken(error, number)) from error

    def _broken(self, error: Exception, number: int | None) -> str:
        paths = [os.fspath(path) for path in self._split.filepaths]
        if number is None:
            missing = [path for path in paths if not epath.Path(path).exists()]
            where = missing[0] if missing else f"a shard of {', '.join(paths[:3])}"
        else:
            ends = np.cumsum(self._split.shard_lengths)
            where = f"{paths[int(np.searchsorted(ends, number, side='right'))]}, document {number}"
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return f"{where}: lost, or changed since it was prepared ({reason}); prepare the dataset again"

    def only(self, indices: np.ndarray) -> Documents:
        """The same split, these documents of it."""
        chosen = copy.copy(self)
        chosen._indices = indices
        return chosen


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences TFDS's bars and INFO lines: `progress` already tells what happens."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)


@contextlib.contextmanager
def disk(directory: epath.Path, raised: type[Exception] = OSError) -> Iterator[None]:
    """A full or failing disk under data.directory, which shows as `raised`, becomes a ConfigError of one sentence."""
    try:
        yield
    except ConfigError:
        raise
    except raised as error:
        strerror, filename = getattr(error, "strerror", None), getattr(error, "filename", None)
        reason = strerror or " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            f"data.directory={os.fspath(directory)!r}: nothing can be prepared there ({reason}"
            f"{f': {filename}' if filename else ''}); make room or repair it, and give the same command again"
        ) from error


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the directory's lock: of several processes one prepares and the others find its work done.

    The directory is made if missing; if an error leaves nothing in it, it goes again.

    Raises:
      ConfigError: it cannot be made or written.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"data.directory={os.fspath(directory)!r}: cannot be written ({error.strerror})") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, however the process ends
        try:
            yield
        except ConfigError:
            if made and os.listdir(directory) == [".lock"]:
                (directory / ".lock").unlink()
                for path in made:
                    path.rmdir()
            raise


def open_tfds(name: str, directory: epath.Path) -> tuple[Sequence[str], Sequence[str], str]:
    """Returns (train, heldout, version) of a TFDS dataset prepared as array_record with a field ``text``.

    It is looked for under `directory`, then where TFDS keeps datasets by default. ``heldout`` is its split
    ``heldout``, ``validation`` or ``test``, the first there is. If it has none, about HELDOUT_FRACTION of the first
    HELDOUT_SCAN documents of ``train`` are held out by a hash of their text (equal texts fall on the same side, among
    those); the scan reads these documents once. The version covers the sizes of the files.

    A split of fewer than FEW documents is read whole and cut by `sections`: tiny_shakespeare's is one document.

    Raises:
      ConfigError: there is no such dataset, or it is not prepared, or not as text in array_record files.
    """
    prefix = f"data.dataset={name!r}: "
    with quiet():
        builder = _find_builder(name, directory)
        if builder is None:
            raise ConfigError(
                f"{prefix}none is prepared under data.directory={os.fspath(directory)} or TFDS's default directory; "
                "use 'embedded', a folder (written with / or ./ at its start), or prepare it where there is a network: "
                f'python -c \'import tensorflow_datasets.text, tensorflow_datasets as tfds; tfds.builder("{name}", '
                f'data_dir="{os.fspath(directory)}").download_and_prepare(file_format="array_record")\''
            )
        try:
            features: Any = builder.info.features
            splits = {
                split: [os.fspath(path) for path in info.filepaths] for split, info in builder.info.splits.items()
            }
        except Exception as error:  # TFDS reads its JSON files here
            raise ConfigError(f"{prefix}{builder.data_dir} is broken ({error}); prepare it again") from error
        if not hasattr(features, "keys") or "text" not in features:
            raise ConfigError(f"{prefix}needs a field 'text'; it has {features}")
        if "train" not in splits:
            raise ConfigError(f"{prefix}needs a split 'train'; it has {sorted(splits)}")
        try:
            train = Documents(builder, "train")
        except NotImplementedError as error:
            raise ConfigError(
                f'{prefix}is not in array_record files; prepare it with file_format="array_record"'
            ) from error
        heldout = next((split for split in ("heldout", "validation", "test") if split in splits), None)
        used = [*splits["train"], *(splits[heldout] if heldout else ())]
        sizes = [(os.path.basename(path), epath.Path(path).stat().length) for path in used]
        version = f"{builder.info.version}-{hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:8]}"
        if heldout:
            return _cut(train), _cut(Documents(builder, heldout)), version
    documents = _cut(train)
    scanned = range(min(len(documents), HELDOUT_SCAN))
    hashes = [int.from_bytes(hashlib.sha256(documents[i].encode()).digest()[:4]) for i in scanned]
    # The smallest hash is always held out, so that a dataset of a few documents has a held-out one.
    limit = max(min(hashes, default=0), int(HELDOUT_FRACTION * 2**32))
    chosen = np.asarray(hashes) <= limit
    kept = np.concatenate([np.flatnonzero(~chosen), np.arange(len(hashes), len(documents))])
    if not len(kept):
        raise ConfigError(f"{prefix}its {len(documents)} document(s) cannot be divided into train and held-out")
    held = np.flatnonzero(chosen)
    if isinstance(documents, Documents):
        return documents.only(kept), documents.only(held), version
    return [documents[int(i)] for i in kept], [documents[int(i)] for i in held], version


def _cut(documents: Documents) -> Sequence[str]:
    """The documents, or the sections of a few long ones; nothing blank."""
    if len(documents) >= FEW:
        return documents
    return [part for text in documents for part in sections(text, 10_000, 18_000) if part.strip()]


def _find_builder(name: str, directory: epath.Path) -> Any:
    """Returns the first prepared builder of that name, or None."""
    for import_builders in (False, True):
        if import_builders:
            # Builders that ship with TFDS are registered on import, which takes seconds; a dataset prepared by one
            # ("c4/en") is found by its files alone unless its code is newer.
            with contextlib.suppress(ImportError):
                importlib.import_module("tensorflow_datasets.text")
        for data_dir in (os.fspath(directory), None):
            try:
                builder = tfds.builder(name, data_dir=data_dir)
                if builder.is_prepared():
                    return builder
            except (tfds.core.DatasetNotFoundError, ValueError, AssertionError):
                continue
            except Exception as error:  # TFDS reads its JSON files here
                reason = " ".join(str(error).split())
                raise ConfigError(f"data.dataset={name!r}: cannot be opened ({reason}); prepare it again") from error
    return None
