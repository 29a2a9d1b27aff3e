"""A folder of .txt and .jsonl files as documents, read at random through an index of their byte positions.

The index is a NumPy array under data.directory, made once by reading every file; the text itself is not copied. A
document's domain is its JSON field ``domain``, or else the first folder below the given one, or else the given one's
name. Documents are held out by a hash of their text, so that equal texts are on the same side.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from etils import epath

from moe.config import ConfigError
from moe.data.documents import HELDOUT_FRACTION, file_documents, parse_document

#: A document: number of its file, its first byte and size in bytes, number of its domain, 32 bits of its text's hash.
PLACE = np.dtype([("file", "<u4"), ("start", "<u8"), ("length", "<u4"), ("domain", "<u2"), ("hash", "<u4")])


class FolderDocuments(Sequence[str]):
    """Texts by index; each access reads the file."""

    def __init__(self, files: list[epath.Path], places: np.ndarray, chosen: np.ndarray):
        """Selects the documents `chosen` (indices) of `places` [n] PLACE."""
        self._files, self._places, self._chosen = files, places, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < len(self):  # ends iteration over a Sequence
            raise IndexError(index)
        place = self._places[self._chosen[index]]
        path, start, length = self._files[place["file"]], int(place["start"]), int(place["length"])
        try:
            with path.open("rb") as file:
                file.seek(start)
                return parse_document(file.read(length), path)[0]
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}, byte {start}: no longer matches the index ({error})") from error


def is_folder(name: str) -> bool:
    """Tells a path in data.dataset from the name of a TFDS dataset."""
    return name.startswith(("/", "~", ".")) or "://" in name


def open_folder(
    name: str, directory: epath.Path, progress: Callable[[str], None]
) -> tuple[dict[str, tuple[FolderDocuments, FolderDocuments]], str]:
    """Returns domain → (train, heldout) of a folder, and a digest of its content; indexes it at the first call.

    Args:
      name: path of the folder; ``~`` is the home directory.
      directory: data.directory; the index is written under it.
      progress: called with a line before indexing.

    Raises:
      ConfigError: no text, a malformed record, or files that changed since they were indexed; the file is named.
    """
    root = epath.Path(name).expanduser()
    root = root if "://" in name else epath.Path(os.path.abspath(root))
    try:
        exists = root.is_dir()
    except Exception as error:  # a bucket's library may be missing, or raise other types
        raise ConfigError(f"data.dataset={name!r}: cannot be reached ({error})") from error
    if not exists:
        raise ConfigError(f"data.dataset={name!r}: no such folder")
    index = directory / "folders" / hashlib.sha256(os.fspath(root).encode()).hexdigest()[:16]
    if not (index / "files.json").exists():
        if "://" in os.fspath(directory):
            raise ConfigError(
                f"data.directory={os.fspath(directory)!r}: must be local, because the index of {root} is written there"
            )
        progress(f"indexing {root}")
        _write_index(root, index)
    try:
        about = json.loads((index / "files.json").read_text())
        with (index / "places.npy").open("rb") as file:
            places: np.ndarray = np.load(file, allow_pickle=False)
        paths = [root / entry["name"] for entry in about["files"]]
        domains, count = about["domains"], about["count"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{index}: a damaged index of {root}; delete it ({error})") from error
    if places.dtype != PLACE or len(places) != count:
        raise ConfigError(f"{index}: a damaged index of {root}; delete it")
    _refuse_changes(root, about["files"], index)
    limit = int(HELDOUT_FRACTION * 2**32)
    found = {}
    for number, domain in enumerate(domains):
        here = np.flatnonzero(places["domain"] == number)
        hashes = places["hash"][here]
        held = hashes <= max(limit, int(hashes.min()))  # one at least
        if held.all():
            raise ConfigError(f"{root}: the {len(here)} document(s) of {domain!r} cannot be divided into two splits")
        found[domain] = (FolderDocuments(paths, places, here[~held]), FolderDocuments(paths, places, here[held]))
    content = [[entry["name"], entry["sha256"]] for entry in about["files"]]
    return found, hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _listing(root: epath.Path) -> list[str]:
    """Sorted names of the text files below the root, without hidden ones."""

    def place(path: epath.Path) -> PurePosixPath:
        # Walking a bucket gives names without gs://, on some file systems without a leading slash.
        return PurePosixPath("/", os.fspath(path).rpartition("://")[2].lstrip("/"))

    names = []
    for folder, _, files in root.walk():
        for file in files:
            path = (place(folder) / file).relative_to(place(root))
            if path.suffix in (".txt", ".jsonl") and not any(part.startswith(".") for part in path.parts):
                names.append(os.fspath(path))
    return sorted(names)


def _write_index(root: epath.Path, index: epath.Path) -> None:
    """Reads all files, and writes files.json and places.npy atomically together."""
    names = _listing(root)
    domains: dict[str, int] = {}
    files, arrays = [], []
    for number, name in enumerate(names):
        path, digest, places = root / name, hashlib.sha256(), []
        parts = Path(name).parts
        folder = parts[0] if len(parts) > 1 else root.name
        try:
            stat = path.stat()
            for start, blob, text, domain in file_documents(path, digest):
                own = domains.setdefault(folder if domain is None else domain, len(domains))
                hashed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
                places.append((number, start, len(blob), own, hashed))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
        arrays.append(np.array(places, PLACE))
        files.append({"name": name, "size": stat.length, "time": stat.mtime, "sha256": digest.hexdigest()})
    if len(domains) > 1 << 16:
        raise ConfigError(f"{root}: has {len(domains)} domains; the maximum is {1 << 16}")
    places = np.concatenate([np.zeros(0, PLACE), *arrays])
    if not len(places):
        raise ConfigError(f"data.dataset={os.fspath(root)!r}: has no text in .txt or .jsonl files")
    index.parent.mkdir(parents=True, exist_ok=True)
    about = {"root": os.fspath(root), "count": len(places), "domains": list(domains), "files": files}
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=index.parent))
    try:
        np.save(unfinished / "places.npy", places, allow_pickle=False)
        (unfinished / "files.json").write_text(json.dumps(about))
        os.replace(unfinished, index)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _refuse_changes(root: epath.Path, files: list[dict[str, Any]], index: epath.Path) -> None:
    """Compares the files with those that were indexed."""
    remedy = f"since it was indexed; restore it, or delete {index} to index the folder again"
    known = {entry["name"] for entry in files}
    if new := [name for name in _listing(root) if name not in known]:
        raise ConfigError(f"{root / new[0]}: was added {remedy}")
    for entry in files:
        path = root / entry["name"]
        if not path.exists():
            raise ConfigError(f"{path}: was removed {remedy}")
        stat = path.stat()
        # A copy of the folder has other times; then the content is compared.
        same = stat.length == entry["size"] and (stat.mtime == entry["time"] or _sha256(path) == entry["sha256"])
        if not same:
            raise ConfigError(f"{path}: was changed {remedy}")


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
