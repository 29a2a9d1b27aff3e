"""A folder of text as documents: `.txt` files, cut where they are long, and `.jsonl` files of one document a line.

In: a folder, local or in a bucket. Out: for each domain two disjoint sequences of documents (``str``), ``train`` and
``heldout``, read at random by their places in the files.

The places are an index under data.directory, made once by reading every file from beginning to end; of the text
nothing is copied. A document's domain is its ``domain`` in the JSON, or else the first folder below the given one, or
else the given one's name. Held out is what has a small hash of its text: equal texts are on the same side.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from etils import epath

from moe.config import ConfigError
from moe.data.datasets import HELDOUT_FRACTION

TARGET, LIMIT, TAIL = 10_000, 18_000, 2_000  # bytes of a section, as in moe.data.datasets.sections
#: Where a document is: number of its file, first byte and bytes there, number of its domain, 32 bits of a hash.
PLACE = np.dtype([("file", "<u4"), ("start", "<u8"), ("length", "<u4"), ("domain", "<u2"), ("hash", "<u4")])


class FolderDocuments(Sequence[str]):
    """Texts by index, each read from its file when it is asked for."""

    def __init__(self, files: list[epath.Path], places: np.ndarray, chosen: np.ndarray):
        """Of `places` [n] PLACE, those of the indices `chosen`."""
        self._files, self._places, self._chosen = files, places, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < len(self):  # what ends iteration over a Sequence
            raise IndexError(index)
        place = self._places[self._chosen[index]]
        path, start, length = self._files[place["file"]], int(place["start"]), int(place["length"])
        try:
            with path.open("rb") as file:
                file.seek(start)
                return _parse(file.read(length), path)[0]
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}, byte {start}: cannot be read as it was when it was indexed: {error}") from error


def is_folder(name: str) -> bool:
    """Whether a value of data.dataset says where a folder is, and not what a TFDS dataset is called."""
    return name.startswith(("/", "~", ".")) or "://" in name


def open_folder(
    name: str, directory: epath.Path, progress: Callable[[str], None]
) -> tuple[dict[str, tuple[FolderDocuments, FolderDocuments]], str]:
    """Returns domain → (train, heldout) of a folder, and a digest of its content; indexes it if that is not done.

    Args:
      name: the folder; ``~`` is the home.
      directory: data.directory; the index is written under it.
      progress: told when all is read.

    Raises:
      ConfigError: no text there, a broken record, or files that are not those that were indexed; the file is named.
    """
    root = epath.Path(name).expanduser()
    root = root if "://" in name else epath.Path(os.path.abspath(root))
    try:
        exists = root.is_dir()
    except Exception as error:  # a bucket's library may be missing, or raise whatever it meets
        raise ConfigError(f"data.dataset={name!r}: cannot be reached ({error})") from error
    if not exists:
        raise ConfigError(f"data.dataset={name!r}: no such folder")
    index = directory / "folders" / hashlib.sha256(os.fspath(root).encode()).hexdigest()[:16]
    if not (index / "files.json").exists():
        if "://" in os.fspath(directory):
            raise ConfigError(f"data.directory={os.fspath(directory)!r}: must be local, for the index of {root}")
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


# --- The index -------------------------------------------------------------------------------------------------------
def _listing(root: epath.Path) -> list[str]:
    """Names of the text files below the root, sorted; what is hidden is left out."""

    def place(path: epath.Path) -> PurePosixPath:
        # A bucket is walked without its gs://, and some without a slash before its name.
        return PurePosixPath("/", os.fspath(path).rpartition("://")[2].lstrip("/"))

    names = []
    for folder, _, files in root.walk():
        for file in files:
            path = (place(folder) / file).relative_to(place(root))
            if path.suffix in (".txt", ".jsonl") and not any(part.startswith(".") for part in path.parts):
                names.append(os.fspath(path))
    return sorted(names)


def _write_index(root: epath.Path, index: epath.Path) -> None:
    """Reads all files; files.json and places.npy appear together or not at all."""
    names = _listing(root)
    domains: dict[str, int] = {}
    files, arrays = [], []
    for number, name in enumerate(names):
        path, digest, places = root / name, hashlib.sha256(), []
        parts = Path(name).parts
        folder = parts[0] if len(parts) > 1 else root.name
        try:
            stat = path.stat()
            for start, blob, text, domain in _documents(path, digest):
                own = domains.setdefault(folder if domain is None else domain, len(domains))
                hashed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
                places.append((number, start, len(blob), own, hashed))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
        arrays.append(np.array(places, PLACE))
        files.append({"name": name, "size": stat.length, "time": stat.mtime, "sha256": digest.hexdigest()})
    if len(domains) > 1 << 16:
        raise ConfigError(f"{root}: {len(domains)} domains; at most {1 << 16} can be told apart")
    places = np.concatenate([np.zeros(0, PLACE), *arrays])
    if not len(places):
        raise ConfigError(f"data.dataset={os.fspath(root)!r}: holds no text in .txt or .jsonl files")
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
    remedy = f"since it was indexed; put it back, or delete {index} to index the folder as it is now"
    known = {entry["name"] for entry in files}
    if new := [name for name in _listing(root) if name not in known]:
        raise ConfigError(f"{root / new[0]}: was added {remedy}")
    for entry in files:
        path = root / entry["name"]
        if not path.exists():
            raise ConfigError(f"{path}: was lost {remedy}")
        stat = path.stat()
        # A copy of the folder has other times: then the content decides.
        same = stat.length == entry["size"] and (stat.mtime == entry["time"] or _sha256(path) == entry["sha256"])
        if not same:
            raise ConfigError(f"{path}: was changed {remedy}")


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# --- One file --------------------------------------------------------------------------------------------------------
def _documents(path: epath.Path, digest: Any) -> Iterator[tuple[int, bytes, str, str | None]]:
    """(first byte, bytes, text, domain or None) of each document of a file; `digest` is fed with the whole file."""
    start, line = 0, 1
    with path.open("rb") as file:
        for blob in _sections(file) if path.suffix == ".txt" else file:
            digest.update(blob)
            if blob.strip():
                try:
                    text, domain = _parse(blob, path)
                except UnicodeDecodeError as error:
                    at = line + blob[: error.start].count(b"\n")
                    raise ConfigError(f"{path}, line {at}: is not UTF-8 text ({error.reason})") from error
                except ValueError as error:
                    raise ConfigError(f"{path}, line {line}: {error}") from error
                if text.strip():
                    yield start, blob, text, domain
            start, line = start + len(blob), line + blob.count(b"\n")


def _sections(file: Any) -> Iterator[bytes]:
    """A text file cut as :func:`moe.data.datasets.sections` cuts, without holding it in memory."""
    before, current, size = b"", [], 0
    while line := _line(file):
        current.append(line)
        size += len(line)
        if size >= LIMIT or (size >= TARGET and not line.strip()):
            if before:
                yield before
            before, current, size = b"".join(current), [], 0
    tail = b"".join(current)
    if len(tail) < TAIL:
        before, tail = before + tail, b""
    yield from (part for part in (before, tail) if part)


def _line(file: Any) -> bytes:
    """The next line, or LIMIT bytes of a longer one and what is left of their last character."""
    line = file.readline(LIMIT)
    if not line.endswith(b"\n"):
        for back in range(1, min(4, len(line)) + 1):
            byte = line[-back]
            if byte >= 0xC0:  # begins a character of 2 to 4 bytes
                return line + file.read(max(0, 2 + (byte >= 0xE0) + (byte >= 0xF0) - back))
            if byte < 0x80:
                break
    return line


def _parse(blob: bytes, path: epath.Path) -> tuple[str, str | None]:
    """(text, domain or None) of a document's bytes; a ValueError says what is wrong with them."""
    if path.suffix == ".txt":
        return blob.decode("utf-8"), None
    try:
        record = json.loads(blob.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg} in column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("is not JSON that can be read: nested too deeply") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError("needs an object with a string 'text'")
    domain = record.get("domain")
    if not (domain is None or (isinstance(domain, str) and domain)):
        raise ValueError(f"domain={domain!r}: must be a string that is not empty")
    try:
        record["text"].encode()
    except UnicodeEncodeError as error:
        raise ValueError("has half a character (a lone surrogate) in its text") from error
    return record["text"], domain
