"""Prepared TFDS text datasets as sequences of documents, read at random from array_record files."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import json
import os
import re
import resource
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging
from etils import epath
from tensorflow_datasets.core import constants

from moe.config import ConfigError
from moe.data.documents import HELDOUT_FRACTION, SECTION_LIMIT, SECTION_TARGET, sections
from moe.system.atomic_files import in_bucket
from moe.system.reading import read_small_file

CUT_BELOW = 1_000  # datasets with fewer documents have their long documents cut into sections
HELDOUT_SCAN = 50_000  # first documents from which some are held out where a dataset has no held-out split


class TfdsDocuments(Sequence[str]):
    """Texts of one split of a prepared TFDS dataset, or of a part of it (:meth:`only`)."""

    def __init__(self, builder: Any, split: str):
        """Open the split's shards.

        Raises:
          ConfigError: a shard is missing or damaged, now or when a document is read; the file is named.
        """
        self._split = builder.info.splits[split]
        self._numbers, self._rest = np.zeros(0, np.int64), 0
        _allow_files(len(self._split.filepaths))
        try:
            self._source = builder.as_data_source(split=split)
            # The source opens a shard at its first read, possibly hours later. On local disk an early read costs
            # 0.1 ms per shard.
            if not in_bucket(builder.data_dir):
                for last in np.cumsum(self._split.shard_lengths) - 1:
                    self._source[int(last)]
        except NotImplementedError:  # tfrecord has no random access; open_tfds reports it
            raise
        except Exception as error:  # TFDS and its reader raise many types
            raise ConfigError(self._broken(error, None)) from error

    def __len__(self) -> int:
        return len(self._numbers) + len(self._source) - self._rest

    def __getitem__(self, index: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < len(self):  # ends iteration over a Sequence
            raise IndexError(index)
        beyond = index - len(self._numbers)
        number = int(self._numbers[index]) if beyond < 0 else self._rest + beyond
        try:
            text = self._source[number]["text"]
            return text.decode("utf-8") if isinstance(text, bytes) else str(text)
        except Exception as error:
            raise ConfigError(self._broken(error, number)) from error

    def _broken(self, error: Exception, number: int | None) -> str:
        paths = [os.fspath(path) for path in self._split.filepaths]
        if "Too many open files" in str(error):
            what = f"one of {len(paths)} shards, of which each stays open"
            return f"{paths[0]}: {what}; allow more open files (ulimit -n)"
        if number is None:
            missing = [path for path in paths if not epath.Path(path).exists()]
            where = missing[0] if missing else f"a shard of {', '.join(paths[:3])}"
        else:
            ends = np.cumsum(self._split.shard_lengths)
            where = f"{paths[int(np.searchsorted(ends, number, side='right'))]}, document {number}"
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return f"{where}: missing, or changed since it was prepared ({reason}); prepare the dataset again"

    def only(self, numbers: np.ndarray, rest: int) -> TfdsDocuments:
        """The split's documents with these numbers, then all from ``rest`` on, of which there may be billions."""
        chosen = copy.copy(self)
        chosen._numbers, chosen._rest = numbers, rest
        return chosen


def _allow_files(more: int) -> None:
    """Let this process open more files, as far as it may: the reader of a shard keeps its file open, and processes can
    often open 1024, the number of C4's shards."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = allowed + more if most == resource.RLIM_INFINITY else min(allowed + more, most)
    if allowed != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError):  # macOS has a further limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences TFDS's progress bars and INFO lines; `progress` callbacks replace them."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)


def open_tfds(name: str, directory: epath.Path) -> tuple[Sequence[str], Sequence[str], str]:
    """Return (train, heldout, version) of a TFDS dataset prepared as array_record with a field ``text``.

    Searches `directory`, then TFDS's default directory. ``heldout`` is the first existing split of ``heldout``,
    ``validation`` and ``test``. Without one, about HELDOUT_FRACTION of the first HELDOUT_SCAN documents of ``train``
    are held out by a hash of their text, so that equal texts among them are on the same side. The version depends on
    the sizes of the files.

    A split of fewer than CUT_BELOW documents is read whole and cut by `sections`: tiny_shakespeare's is one document.

    Raises:
      ConfigError: no such dataset is prepared, or it is not text in array_record files.
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
        except Exception as error:  # TFDS parses its JSON files here
            raise ConfigError(f"{prefix}{builder.data_dir} is damaged ({error}); prepare it again") from error
        if not hasattr(features, "keys") or "text" not in features:
            raise ConfigError(f"{prefix}needs a field 'text'; it has {features}")
        if "train" not in splits:
            raise ConfigError(f"{prefix}needs a split 'train'; it has {sorted(splits)}")
        try:
            train = TfdsDocuments(builder, "train")
        except NotImplementedError as error:
            raise ConfigError(
                f'{prefix}is not in array_record files; prepare it with file_format="array_record"'
            ) from error
        heldout = next((split for split in ("heldout", "validation", "test") if split in splits), None)
        used = [*splits["train"], *(splits[heldout] if heldout else ())]
        sizes = [(os.path.basename(path), epath.Path(path).stat().length) for path in used]
        version = f"{builder.info.version}-{hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:8]}"
        if heldout:
            return _cut(train), _cut(TfdsDocuments(builder, heldout)), version
    documents = _cut(train)
    scanned = range(min(len(documents), HELDOUT_SCAN))
    hashes = [int.from_bytes(hashlib.sha256(documents[i].encode()).digest()[:4]) for i in scanned]
    # The smallest hash is always held out, so that a dataset of few documents has a held-out one.
    limit = max(min(hashes, default=0), int(HELDOUT_FRACTION * 2**32))
    chosen = np.asarray(hashes) <= limit
    kept, held = np.flatnonzero(~chosen), np.flatnonzero(chosen)
    if not len(kept) and len(documents) == len(hashes):
        raise ConfigError(f"{prefix}its {len(documents)} document(s) cannot be divided into train and held-out")
    if isinstance(documents, TfdsDocuments):
        return documents.only(kept, len(hashes)), documents.only(held, len(documents)), version
    train = [*(documents[int(i)] for i in kept), *documents[len(hashes) :]]
    return train, [documents[int(i)] for i in held], version


def _cut(documents: TfdsDocuments) -> Sequence[str]:
    """Return the documents, or, if there are fewer than CUT_BELOW, their sections that are not blank."""
    if len(documents) >= CUT_BELOW:
        return documents
    return [part for text in documents for part in sections(text, SECTION_TARGET, SECTION_LIMIT) if part.strip()]


def _find_builder(name: str, directory: epath.Path) -> Any:
    """Return the first prepared builder of that name, or None if there is none."""
    for import_builders in (False, True):
        if import_builders:
            # Importing the builders that ship with TFDS takes seconds. A prepared dataset such as "c4/en" is usually
            # found by its files alone.
            with contextlib.suppress(ImportError):
                importlib.import_module("tensorflow_datasets.text")
        for data_dir in (os.fspath(directory), None):
            _refuse_code(name, epath.Path(data_dir or constants.DATA_DIR).expanduser())
            try:
                builder = tfds.builder(name, data_dir=data_dir)
                if builder.is_prepared():
                    return builder
            except (tfds.core.DatasetNotFoundError, ValueError, AssertionError):
                continue
            except Exception as error:  # TFDS parses its JSON files here
                reason = " ".join(str(error).split())
                raise ConfigError(f"data.dataset={name!r}: cannot be opened ({reason}); prepare it again") from error
    return None


def _refuse_code(name: str, data_dir: epath.Path) -> None:
    """Refuse a dataset whose features.json names a class outside TFDS, whose module TFDS would import.

    Raises:
      ConfigError: such a class, or a features.json that cannot be read.
    """
    folder = data_dir / re.split("[/:]", name)[0]
    for pattern in ("*/features.json", "*/*/features.json"):  # version, or config and version
        for path in folder.glob(pattern):
            try:
                content = json.loads(read_small_file(path))
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"data.dataset={name!r}: {path} is damaged ({error}); prepare it again") from error
            for found in _class_names(content):
                if not found.startswith("tensorflow_datasets."):
                    raise ConfigError(
                        f"data.dataset={name!r}: {path} names the class {found!r}, code that is not TFDS's; prepare "
                        "the dataset again with features of TFDS"
                    )


def _class_names(content: Any) -> Iterator[str]:
    """Names of Python classes in a features.json, in the current form or the older one."""
    for value in content if isinstance(content, list) else content.values() if isinstance(content, dict) else ():
        yield from _class_names(value)
    for key in ("pythonClassName", "python_class_name", "type"):
        if isinstance(content, dict) and isinstance(content.get(key), str):
            yield content[key]
