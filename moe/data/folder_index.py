"""The index of a folder of text: which documents its files hold, and where.

A NumPy array under data.directory, made once by reading every file, with a description of the files. A folder that
changes is indexed again, beside the earlier index.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import os
import shutil
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic
from etils import epath

from moe.config import ConfigError
from moe.data import columns
from moe.data.directory import remove_unfinished
from moe.data.documents import file_documents
from moe.data.folder_files import SPLITS_FILE, SUFFIXES, Source, describe_left_out, find_sources, suffix_of
from moe.system.atomic_files import from_checked_json, in_bucket, to_checked_json, write_atomic
from moe.system.foreign_files import Fields, first_sentence
from moe.system.reading import read_small_file

INDEX_VERSION = 7  # part of the index's path: raise it when the index's format, or splits by name, change
MAX_DOMAINS = 4_096  # each domain is evaluated by itself

#: Errors that only writing has.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

#: A document: number of its file, first byte and size in bytes (of a table: its row and 0), number of its domain,
#: split of its file, and 32 bits of its text's hash.
PLACE = np.dtype(
    [("file", "<u4"), ("start", "<u8"), ("length", "<u4"), ("domain", "<u2"), ("split", "u1"), ("hash", "<u4")]
)

_FileName = Annotated[str, pydantic.Field(pattern=r"^[^/\\\x00.][^/\\\x00]*$")]


class Entry(Fields):
    """A file of text. Names and copies of tables lie within their folders."""

    name: str
    size: Annotated[int, pydantic.Field(ge=0)]
    time: int
    sha256: str
    table: _FileName | None
    table_time: int = 0
    table_sha256: str = ""


class About(Fields):
    """Content of index.json."""

    root: str
    domains: Annotated[list[str], pydantic.Field(max_length=MAX_DOMAINS)]
    files: list[Entry]
    places_sha256: str


_ABOUT = pydantic.TypeAdapter(About)


def find_index(
    root: epath.Path, directory: epath.Path, suffixes: Sequence[str], progress: Callable[[str], None]
) -> tuple[epath.Path, About, np.ndarray]:
    """Return the folder, the content and the places of the index that matches the files; write it if none does."""
    kind = [os.fspath(root), *sorted(suffixes), *([SPLITS_FILE] if (root / SPLITS_FILE).exists() else [])]
    key = hashlib.sha256(os.fsencode("\0".join(kind))).hexdigest()[:16]
    folder = directory / "folders"
    change = ""
    newest = -1
    sources = find_sources(root, suffixes)
    if not sources:
        left_out = describe_left_out(root, suffixes)
        raise ConfigError(_no_text(root) + (f"; left out: {left_out}" if left_out else ""))
    while (index := folder / f"{key}-v{INDEX_VERSION}.{newest + 1}").exists():
        newest += 1
        about, places = read_index(root, index)
        change = _change(root, sources, about.files, index)
        if not change:
            return index, about, places
    if in_bucket(directory):
        raise ConfigError(f"data.directory={os.fspath(directory)!r}: must be local to hold the index of {root}")
    progress(f"indexing {root}{f' again, because {change}' if change else ''}")
    _write_index(root, index, sources)
    return (index, *read_index(root, index))


def _no_text(root: epath.Path) -> str:
    return (
        f"data.dataset={os.fspath(root)!r}: has no text in {', '.join(SUFFIXES)} files; data.text_suffixes names "
        "further ones"
    )


def read_index(root: epath.Path, index: epath.Path) -> tuple[About, np.ndarray]:
    """Return the content of index.json and the places, memory-mapped, both checked by their checksums."""
    path = index / "places.npy"
    if not in_bucket(index) and not os.access(index, os.R_OK | os.X_OK):
        raise _unreadable(index)
    try:
        about = _ABOUT.validate_python(from_checked_json(read_small_file(index / "index.json").decode()))
        refuse_special(path)
        if _sha256(path) != about.places_sha256:
            raise ValueError("the checksum of places.npy does not match")
        remote = io.BytesIO(path.read_bytes()) if in_bucket(path) else None
        places = np.load(remote or path, mmap_mode=None if remote else "r", allow_pickle=False)
        if places.dtype != PLACE or places.ndim != 1:
            raise ValueError("places.npy holds something else")
        if not (places["domain"] < len(about.domains)).all() or not (places["file"] < len(about.files)).all():
            raise ValueError("places.npy names a file or a domain that index.json lacks")
        return about, places
    except PermissionError as error:
        raise _unreadable(index) from error
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(f"{index}: a damaged index of {root}; delete it ({first_sentence(error)})") from error


def _unreadable(index: epath.Path) -> ConfigError:
    return ConfigError(
        f"{index}: cannot be read by this user, who may share data.directory with its owner; let the owner allow it "
        "(chmod -R a+rX), or use another data.directory"
    )


def _write_index(root: epath.Path, index: epath.Path, sources: Sequence[Source]) -> None:
    """Read all files, and write the index folder atomically."""
    index.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(Path(index.parent), "unfinished-*")
    unfinished = Path(index.parent) / f"unfinished-{os.getpid()}"
    unfinished.mkdir()  # with the permissions of the user's umask: others may share data.directory
    try:
        builder = _IndexBuilder(root, unfinished)
        for source in sources:
            builder.add(source)
        builder.write()
        os.replace(unfinished, index)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not os.listdir(index.parent):
            index.parent.rmdir()


@dataclasses.dataclass
class _IndexBuilder:
    """The index of a folder, file by file."""

    root: epath.Path
    folder: Path
    domains: dict[str, int] = dataclasses.field(default_factory=dict)
    files: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    places: list[np.ndarray] = dataclasses.field(default_factory=list)

    def add(self, source: Source) -> None:
        """Read a file."""
        path = self.root / source.name
        refuse_special(path)
        try:
            about = path.stat()
            table = None
            if suffix_of(path) in columns.SUFFIXES:
                table, digest = self._table_name(path), _sha256(path)
                rows = self._table(path, table).rows(os.fspath(path))
                places = np.fromiter((self._place(row, 0, text, domain, source) for row, text, domain in rows), PLACE)
            else:
                running = hashlib.sha256()
                parts = file_documents(path, running)
                found = (self._place(start, len(blob), text, domain, source) for start, blob, text, domain in parts)
                places = np.fromiter(found, PLACE)
                digest = running.hexdigest()
        except OSError as error:
            if error.errno in _FULL:  # of data.directory, to which a table is copied
                raise
            raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
        self.places.append(places)
        entry = {"name": source.name, "size": about.length, "time": _time(path), "sha256": digest, "table": table}
        if table:
            copy = epath.Path(self.folder / table)
            entry |= {"table_time": _time(copy), "table_sha256": _sha256(copy)}
        self.files.append(entry)

    def _table_name(self, path: epath.Path) -> str | None:
        """Name of a file's copy in the index; None for a local Arrow file, which is read in place."""
        local = not in_bucket(self.root)
        return None if local and suffix_of(path) == ".arrow" else f"table-{len(self.files):05d}.arrow"

    def _table(self, path: epath.Path, copy: str | None) -> columns.TextTable:
        if copy is None:
            return columns.TextTable(path)
        columns.copy_columns(path, self.folder / copy)
        return columns.TextTable(self.folder / copy)

    def _place(self, start: int, length: int, text: str, domain: str | None, source: Source) -> tuple[int, ...]:
        number = self.domains.setdefault(source.domain if domain is None else domain, len(self.domains))
        if number >= MAX_DOMAINS:
            raise ConfigError(f"{self.root}: has more than {MAX_DOMAINS} domains, the maximum")
        return len(self.files), start, length, number, source.split, text_hash(text)

    def write(self) -> None:
        """Write index.json and places.npy."""
        places = np.concatenate([np.zeros(0, PLACE), *self.places])
        if not len(places):
            raise ConfigError(_no_text(self.root))
        np.save(self.folder / "places.npy", places, allow_pickle=False)
        about = {
            "root": os.fspath(self.root),
            "domains": list(self.domains),
            "files": self.files,
            "places_sha256": _sha256(epath.Path(self.folder / "places.npy")),
        }
        write_atomic(self.folder / "index.json", to_checked_json(about))


def _change(root: epath.Path, sources: Sequence[Source], files: Sequence[Entry], index: epath.Path) -> str:
    """Return what differs between the files and those that were indexed, in words; empty: nothing."""
    known, names = {entry.name for entry in files}, {source.name for source in sources}
    for change, differing in (("added", names - known), ("removed", known - names)):
        if differing:
            return f"{root / min(differing)} was {change}"
    for entry in files:
        path = root / entry.name
        refuse_special(path)
        about = path.stat()
        # A copy of the folder has other times; then the content is compared.
        same = about.length == entry.size and (_time(path) == entry.time or _sha256(path) == entry.sha256)
        if not same:
            return f"{path} was changed"
    for entry in files:
        if not entry.table:
            continue
        copy = index / entry.table
        if not copy.exists():
            raise ConfigError(f"{copy}: is missing; delete {index} to index the folder again")
        if _time(copy) != entry.table_time and _sha256(copy) != entry.table_sha256:
            raise ConfigError(f"{copy}: was changed; delete {index} to index the folder again")
    return ""


def text_hash(text: str) -> int:
    """32 bits of a document's hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def _time(path: epath.Path) -> int:
    """Time of the last change: in nanoseconds where the file system says so, since edits follow one another fast."""
    return path.stat().mtime if in_bucket(path) else os.stat(path).st_mtime_ns


def refuse_special(path: epath.Path) -> None:
    """Refuse FIFOs, sockets and devices, whose reading may never end. Raises ConfigError."""
    if in_bucket(path):
        return
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{path}: is not a regular file (a FIFO, socket or device); move it out of the folder")


def _sha256(path: epath.Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
