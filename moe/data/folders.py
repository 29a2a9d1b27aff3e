"""A folder of text files, JSON lines, .parquet and .arrow files as documents, read at random through an index.

Text stays in its files; only the text of Parquet files is copied, to memory-mapped Arrow files. A document's domain is
its field ``domain``, or else the first folder below the given one, or else the given one's name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from etils import epath

from moe.config import ConfigError
from moe.data import columns
from moe.data.documents import HELDOUT_FRACTION, parse_document
from moe.data.folder_files import HELDOUT, UNSPLIT, describe_left_out, suffix_of
from moe.data.folder_index import Entry, find_index, text_hash
from moe.system.atomic_files import in_bucket
from moe.system.waiting import first_answer


class FolderDocuments(Sequence[str]):
    """Texts by index; each access reads the file."""

    def __init__(self, files: list[epath.Path | columns.TextTable], places: np.ndarray, chosen: np.ndarray):
        """Select the documents `chosen` (indices) of `places` [n] PLACE."""
        self._files = files
        self._places = places
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < len(self):  # ends iteration over a Sequence
            raise IndexError(index)
        place = self._places[self._chosen[index]]
        source = self._files[place["file"]]
        start = int(place["start"])
        length = int(place["length"])
        try:
            if isinstance(source, columns.TextTable):
                text = source[start]
            else:
                with source.open("rb") as file:
                    file.seek(start)
                    text = parse_document(file.read(length), source)[0]
            if text_hash(text) != place["hash"]:  # an edit moves the documents after it
                raise ValueError("its text was changed; touch the file and start again, which indexes it anew")
            return text
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise ConfigError(f"{source}, position {start}: no longer matches the index ({error})") from error

    def count_distinct(self) -> int:
        """Number of different texts, by 32 bits of their hashes."""
        return len(np.unique(self._places["hash"][self._chosen]))

    def where(self, index: int) -> str:
        """File, and line or row, of a document."""
        place = self._places[self._chosen[index]]
        source, start = self._files[place["file"]], int(place["start"])
        if isinstance(source, columns.TextTable):
            return f"{source}, row {start}"
        line = 1
        with source.open("rb") as file:
            while start and (chunk := file.read(min(start, 1 << 20))):
                line, start = line + chunk.count(b"\n"), start - len(chunk)
        return f"{source}, line {line}"


def describe_left_out_of(dataset: str, suffixes: Sequence[str]) -> Iterator[str]:
    """A line for each folder of data.dataset with files whose suffixes are not read."""
    for name in filter(is_folder, dataset.split(",")):
        root = _find_root(name)
        if left_out := describe_left_out(root, suffixes):
            yield f"left out of {root}, since their suffixes are not read: {left_out}"


def is_folder(name: str) -> bool:
    """Tell a path in data.dataset from the name of a TFDS dataset."""
    return name.startswith(("/", "~", ".")) or in_bucket(name)


def refuse_inside(dataset: str, workdir: str) -> None:
    """Refuse a workdir inside a folder of text, because its files would be read as text on resuming.

    Args:
      dataset: value of data.dataset.
      workdir: value of --workdir.

    Raises:
      ConfigError: it is inside one of the folders.
    """
    place = Path(os.path.realpath(os.path.expanduser(workdir)))
    for name in filter(is_folder, dataset.split(",")):
        if "://" not in name + workdir and place.is_relative_to(os.path.realpath(os.path.expanduser(name))):
            raise ConfigError(
                f"--workdir={workdir}: is inside data.dataset={name!r}, whose files are text; use another"
            )


def open_folder(
    name: str,
    directory: epath.Path,
    progress: Callable[[str], None],
    suffixes: Sequence[str] = (),
    wanted: Sequence[str] = (),
) -> tuple[dict[str, tuple[FolderDocuments, FolderDocuments]], str]:
    """Return domain → (train, heldout) of a folder, and a digest of its content.

    The folder is indexed at the first call, and again, beside the earlier index, whenever its files have changed.
    Documents of a Hugging Face train or held-out split keep that split. Others are split by a hash of their text, so
    that equal texts are on the same side.

    Args:
      name: path of the folder; ``~`` is the home directory.
      directory: data.directory; the index is written under it.
      progress: called with a line before indexing.
      suffixes: of files that are text, beside moe.data.folder_files.TEXT_SUFFIXES.
      wanted: domains, of any folder; empty: all.

    Raises:
      ConfigError: no text, a malformed record, or a domain of one document; the file or domain is named.
    """
    root = _find_root(name)
    index, about, places = find_index(root, directory, suffixes, progress)
    files = [_reader(root, index, entry) for entry in about.files]
    found = {}
    by_domain = np.argsort(places["domain"], kind="stable")
    ends = np.cumsum(np.bincount(places["domain"], minlength=len(about.domains)))
    for domain, here in zip(about.domains, np.split(by_domain, ends[:-1]), strict=False):
        held = _is_heldout(places["split"][here], places["hash"][here])
        if held.all() or not held.any():
            if wanted and domain not in wanted:
                continue
            raise ConfigError(
                f"{root}: the {len(here)} document(s) of {domain!r} cannot be divided into two splits; add more, or "
                "leave it out by data.domains"
            )
        found[domain] = (FolderDocuments(files, places, here[~held]), FolderDocuments(files, places, here[held]))
    content = [[entry.name, entry.sha256] for entry in about.files]
    return found, hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _find_root(name: str) -> epath.Path:
    try:
        root = epath.Path(name).expanduser()
        root = root if in_bucket(name) else epath.Path(os.path.abspath(root))
        exists = first_answer(name, root.is_dir) if in_bucket(name) else root.is_dir()
    except Exception as error:  # a bucket's library may be missing, or raise other types
        raise ConfigError(f"data.dataset={name!r}: cannot be reached ({error})") from error
    if not exists:
        raise ConfigError(f"data.dataset={name!r}: no such folder")
    return root


def _is_heldout(split: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Mask of the held-out documents of a domain, [n] bool, from their fields of :data:`PLACE`."""
    unsplit = split == UNSPLIT
    held = split == HELDOUT
    if unsplit.any():
        limit = max(int(HELDOUT_FRACTION * 2**32), int(hashes[unsplit].min()))  # at least one document
        held |= unsplit & (hashes <= limit)
    return held


def _reader(root: epath.Path, index: epath.Path, entry: Entry) -> epath.Path | columns.TextTable:
    if entry.table:
        return columns.TextTable(index / entry.table)
    path = root / entry.name
    return columns.TextTable(path) if suffix_of(path) in columns.SUFFIXES else path
