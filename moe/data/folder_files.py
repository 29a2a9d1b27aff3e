"""The text files of a folder, with domain and split: plain folders, and layouts of Hugging Face ``datasets``."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import PurePath, PurePosixPath

from etils import epath

from moe.config import ConfigError
from moe.data.documents import check_domain
from moe.system.atomic_files import in_bucket
from moe.system.reading import read_small_file

#: Files that are text as they stand; .jsonl holds a document in each line, .parquet and .arrow one in each row.
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".html", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet", ".arrow")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".lz4")
_SHOWN = 6  # kinds of files in a message
#: Split of a file: none (its documents are divided by a hash), or that of a Hugging Face dataset.
UNSPLIT = 0
TRAIN = 1
HELDOUT = 2
SPLITS_FILE = "dataset_dict.json"  # its presence makes folders splits
_ABOUT = {SPLITS_FILE, "dataset_info.json", "state.json"}  # of datasets on disk
_CARD = "README.md"  # the description of a dataset of the hub
_HELDOUT_NAMES = ("heldout", "validation", "valid", "dev", "test")  # the first that exists is used
_FINGERPRINT = re.compile(r"(?<=-of-\d{5})-[0-9a-f]{16}(?=\.)")  # ends the names that the hub gave shards until 2023
_SHARD = re.compile(rf"([\w.]+)-(\d{{5}})-of-(\d{{5}})(?:{_FINGERPRINT.pattern})?\.((?i:parquet|arrow))")


@dataclasses.dataclass(frozen=True)
class Source:
    """A text file: its path below the root, the domain of its documents, and its split."""

    name: str
    domain: str
    split: int


def suffix_of(path: PurePath | epath.Path) -> str:
    """Suffix of a file in lower case: ``B.TXT`` is text, too."""
    return path.suffix.lower()


def find_sources(root: epath.Path, suffixes: Sequence[str] = ()) -> list[Source]:
    """List the text files below a folder, sorted by name, without hidden ones; ``suffixes`` mark further text files.

    Two layouts of Hugging Face have splits: folders of ``DatasetDict.save_to_disk``, and files of the hub named
    SPLIT-00000-of-00001.parquet. For each domain ``train`` and the first existing split of heldout, validation, valid,
    dev and test are used, without the card of the dataset.

    Raises:
      ConfigError: a folder's name cannot be a domain, or a part of the text is missing or cannot be read.
    """
    saved = (root / SPLITS_FILE).exists()
    names, _ = _list_files(root, suffixes)
    _refuse_missing_shards(root, names)
    found = [(name, *_domain_and_split(PurePosixPath(name), root.name, saved)) for name in names]
    by_domain: dict[str, set[str | None]] = {}
    for _, domain, split in found:
        by_domain.setdefault(domain, set()).add(split)
    if not any("train" in splits for splits in by_domain.values()):
        sources = [Source(name, domain, UNSPLIT) for name, domain, _ in found]
    else:
        numbers = {domain: _numbers(splits) for domain, splits in by_domain.items()}
        sources = [
            Source(name, domain, numbers[domain][split])
            for name, domain, split in found
            if split in numbers[domain] and not ("train" in by_domain[domain] and PurePosixPath(name).name == _CARD)
        ]
    for source in sources:
        check_domain(source.domain, os.fspath(root / source.name))
    return sources


def describe_left_out(root: epath.Path, suffixes: Sequence[str] = ()) -> str:
    """Numbers of the files whose suffixes are not read, with an example of each, such as ``2 .csv (a.csv)``.

    Of compressed files both suffixes count. Empty: there are none.
    """
    _, names = _list_files(root, suffixes)
    kinds: dict[str, list[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        inner = PurePosixPath(path.stem).suffix if suffix_of(path) in _COMPRESSED else ""
        kinds.setdefault(f"{inner}{path.suffix}" or "without a suffix", []).append(name)
    parts = [f"{len(found):,} {kind} ({found[0]})" for kind, found in sorted(kinds.items())]
    more = f" and {len(parts) - _SHOWN} kinds more" if len(parts) > _SHOWN else ""
    return ", ".join(parts[:_SHOWN]) + more


def _numbers(splits: set[str | None]) -> dict[str | None, int]:
    """Split → its number, for the splits of a domain that are used; None stands for files without a split."""
    heldout = next((name for name in _HELDOUT_NAMES if name in splits), None)
    numbers: dict[str | None, int] = {None: UNSPLIT, "train": TRAIN if heldout else UNSPLIT}
    return numbers | ({heldout: HELDOUT} if heldout else {})


def _refuse_missing_shards(root: epath.Path, names: Sequence[str]) -> None:
    """Refuse a dataset with missing shards, judged by their names or its state.json. Raises ConfigError."""
    there, seen = {_FINGERPRINT.sub("", name) for name in names}, set()
    for name in names:
        path = PurePosixPath(name)
        if shard := _SHARD.fullmatch(path.name):
            stem, _, total, suffix = shard.groups()
            dataset = path.parent, stem, total, suffix
            for number in range(0 if dataset in seen else int(total)):  # once for all of its shards
                expected = path.with_name(f"{stem}-{number:05d}-of-{total}.{suffix}")
                if os.fspath(expected) not in there:
                    raise ConfigError(f"{root / os.fspath(expected)}: is missing, one of the {int(total)} shards")
            seen.add(dataset)
            if int(shard[2]) >= int(total):
                raise ConfigError(f"{root / name}: is shard {int(shard[2])} of {int(total)}; remove it")
    for folder in {PurePosixPath(name).parent for name in names if name.lower().endswith(".arrow")}:
        state = root / os.fspath(folder / "state.json")
        if not state.exists():
            continue
        try:
            listed = {file["filename"] for file in json.loads(read_small_file(state))["_data_files"]}
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ConfigError(f"{state}: does not list the files of a dataset ({error})") from error
        here = {PurePosixPath(name).name for name in names if PurePosixPath(name).parent == folder}
        if differing := listed ^ {name for name in here if name.lower().endswith(".arrow")}:
            name = min(differing)
            what = "is missing" if name in listed else "is not a part of the dataset"
            raise ConfigError(f"{root / os.fspath(folder / name)}: {what}, by state.json")


def _domain_and_split(name: PurePosixPath, root: str, saved: bool) -> tuple[str, str | None]:
    if saved and len(name.parts) > 1:  # SPLIT/data-00000-of-00001.arrow
        return root, name.parts[0]
    shard = _SHARD.fullmatch(name.name)
    split = shard[1] if shard else None
    is_known = split in ("train", *_HELDOUT_NAMES)
    folders = [part for part in name.parts[:-1] if not (is_known and part == "data")]  # the hub's folder of shards
    return (folders[0] if folders else root), split


def _list_files(root: epath.Path, suffixes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sorted names of the text files and of others, without hidden ones and what ``datasets`` writes for itself."""

    def place(path: epath.Path) -> PurePosixPath:
        # Walking a bucket gives names without gs://, on some file systems without a leading slash.
        return PurePosixPath("/", os.fspath(path).rpartition("://")[2].lstrip("/"))

    read = {suffix.lower() for suffix in (*SUFFIXES, *suffixes)}
    names, others = [], []
    for folder, folders, files in root.walk():
        if not in_bucket(root):
            # Whether a link to a folder is among the folders depends on Python's version.
            for name in (name for name in (*folders, *files) if not name.startswith(".")):
                path = os.path.join(folder, name)
                if not os.path.isdir(path):
                    continue
                if os.path.islink(path):  # could form a cycle
                    raise ConfigError(f"{path}: is a link to a folder, which is not followed; copy the folder there")
                if not os.access(path, os.R_OK | os.X_OK):
                    raise ConfigError(f"{path}: cannot be read; allow it, or move it out of the folder")
        for file in files:
            path = (place(folder) / file).relative_to(place(root))
            cache = path.name.startswith("cache-") and path.suffix == ".arrow"
            if cache or path.name in _ABOUT or any(part.startswith(".") for part in path.parts):
                continue
            (names if suffix_of(path) in read else others).append(os.fspath(path))
    return sorted(names), sorted(others)
