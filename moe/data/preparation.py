"""Documents and tokenizer of a run, opened after what is missing is downloaded, built or trained in data.directory."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from etils import epath

from moe.config import EMBEDDED_DOMAINS, ConfigError, DataConfig
from moe.config.objectives import Objective
from moe.data import chat, corpora, folders, tfds_datasets
from moe.data.directory import LOCK, disk_errors, locked_directory
from moe.data.documents import PAIR
from moe.data.json_tokenizer import JsonTokenizer
from moe.data.sentinels import check_sentinels
from moe.data.tokenizer import TRAINER_VERSION, Tokenizer, train_tokenizer
from moe.data.tokenizer_files import named_tokenizer
from moe.system.atomic_files import in_bucket, write_atomic
from moe.system.reading import read_small_file
from moe.system.waiting import first_answer

TOKENIZER_CHARACTERS = 10_000_000  # text that a tokenizer is trained on, an equal share from each domain


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Tokenizer and documents (``str``, by index) of every domain."""

    tokenizer: Tokenizer
    domains: tuple[str, ...]
    train: dict[str, Sequence[str]]
    heldout: dict[str, Sequence[str]]
    versions: dict[str, str] = dataclasses.field(default_factory=dict)  # version of each domain's documents
    objective: Objective | None = None  # of the run; None: the one that the data section names
    examples: str = ""  # digest of the first examples of a user's objective
    _unigram_counts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, repr=False, compare=False)


def domain_weights(data: DataConfig, domains: tuple[str, ...]) -> tuple[float, ...]:
    """Return data.weights, or equal ones; ConfigError unless there is one per domain."""
    weights = tuple(data.weights) or (1.0,) * len(domains)
    if len(weights) != len(domains):
        raise ConfigError(
            f"data.weights={weights}: give one for each of the {len(domains)} domains {domains}, or leave it empty"
        )
    return weights


def row_shares(data: DataConfig, domains: tuple[str, ...]) -> dict[str, float]:
    """Return domain → share of the rows of all batches: Grain mixes by whole numbers, the smallest of which is 100."""
    weights = domain_weights(data, domains)
    parts = [int(weight * (100 / min(weights))) for weight in weights]
    return {domain: part / sum(parts) for domain, part in zip(domains, parts, strict=True)}


def describe_shares(data: DataConfig, domains: tuple[str, ...]) -> str:
    """One line: the share of the rows that each domain has."""
    shares = (f"{domain} {share:.1%}" for domain, share in row_shares(data, domains).items())
    return f"shares of the rows (data.weights): {', '.join(shares)}"


def open_data(
    data: DataConfig,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    progress: Callable[[str], None],
    objective: Objective,
) -> Prepared:
    """Open documents and tokenizer, after downloading, building and training what is missing.

    Args:
      data: settings; the domain of a TFDS dataset is its name; for folders see :mod:`moe.data.folders`.
      vocab_size: V; a tokenizer of that size, less the objective's sentinels, is trained unless one is cached.
      tokenizer: replaces data.tokenizer and the trained one, for example by a checkpoint's.
      progress: called with a line before each slow step.
      objective: of the run.

    Raises:
      ConfigError: invalid domains, weights, dataset or tokenizer.
    """
    directory = _reach(data.directory)
    # In a bucket nothing is built or trained, so no lock is needed.
    local = not in_bucket(directory)
    if local and (directory / LOCK).exists():
        # Perhaps nothing is missing: then any number of processes opens the data at the same time.
        with (
            contextlib.suppress(_NotPreparedError),
            locked_directory(Path(directory), shared=True),
            disk_errors(directory),
        ):
            return _open_all(data, vocab_size, tokenizer, directory, _refuse_to_prepare, objective)
    lock = locked_directory(Path(directory)) if local else contextlib.nullcontext()
    with lock, disk_errors(directory):
        return _open_all(data, vocab_size, tokenizer, directory, progress, objective)


class _NotPreparedError(Exception):
    """Something is missing in data.directory."""


def _refuse_to_prepare(step: str) -> None:
    """Stand in for ``progress``, which is called before each step that writes."""
    raise _NotPreparedError(step)


def _open_all(
    data: DataConfig,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    directory: epath.Path,
    progress: Callable[[str], None],
    objective: Objective,
) -> Prepared:
    """See :func:`open_data`."""
    found = _open(data, directory, progress)
    domains = tuple(data.domains) or tuple(found)
    train, heldout = ({domain: found[domain][part] for domain in domains} for part in (0, 1))
    versions = {domain: found[domain][2] for domain in domains}
    domain_weights(data, domains)
    if tokenizer is None and data.tokenizer:
        tokenizer = named_tokenizer(data.tokenizer, directory, progress)
    if objective.conversations:
        tokenizer = _chat_tokenizer(tokenizer, data.chat_template)
    if tokenizer is None and objective.holds_ids:
        raise ConfigError("data.tokenizer='': must name that of the rollouts, or start from a checkpoint with it")
    if tokenizer is None:
        refuse_unseen(train)
        text = hashlib.sha256(json.dumps([data.dataset, versions]).encode()).hexdigest()[:12]
        readable = re.sub(r"[^a-zA-Z0-9_.-]", "_", "-".join([data.dataset, *domains]))[:80]
        size = vocab_size - objective.sentinels
        path = directory / "tokenizers" / f"{readable}-{text}-v{size}-{TRAINER_VERSION}.model"
        tokenizer = _cached_tokenizer(path, train, size, progress)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens; use at least that"
        )
    check_sentinels(tokenizer, vocab_size, objective)
    return Prepared(tokenizer, domains, train, heldout, versions)


def refuse_unseen(train: Mapping[str, Sequence[str]]) -> None:
    """Raise ConfigError for a domain without training text, which can only be evaluated."""
    if unseen := [domain for domain, documents in train.items() if not len(documents)]:
        raise ConfigError(f"data.domains: {unseen[0]!r} has only held-out text; train on other domains")


def _reach(name: str) -> epath.Path:
    """Return the path of data.directory; if it is in a bucket, check that the bucket answers."""
    try:
        directory = epath.Path(name).expanduser()
        if in_bucket(name):
            first_answer(name, directory.exists)
    except Exception as error:  # a bucket's library may be missing, or raise other types
        raise ConfigError(f"data.directory={name!r}: cannot be reached ({error})") from error
    return directory


def _open(
    data: DataConfig, directory: epath.Path, progress: Callable[[str], None]
) -> dict[str, tuple[Sequence[str], Sequence[str], str]]:
    """Return domain → (train, heldout, version) of the datasets in data.dataset."""
    names = data.dataset.split(",")
    found: dict[str, tuple[Sequence[str], Sequence[str], str]] = {}
    for name in names:
        if folders.is_folder(name):
            parts, version = folders.open_folder(name, directory, progress, data.text_suffixes, data.domains)
            added = {domain: (*splits, version) for domain, splits in parts.items()}
        else:
            added = {} if name == "embedded" else {name: tfds_datasets.open_tfds(name, directory)}
        if twice := sorted(added.keys() & (found.keys() | (corpora.DOMAINS if "embedded" in names else {}))):
            raise ConfigError(f"data.dataset={data.dataset!r}: two of these have a domain {twice[0]!r}; rename one")
        found |= added
    embedded = tuple(corpora.DOMAINS) if "embedded" in names else ()
    if unknown := sorted(set(data.domains) - {*found, *embedded}):
        raise ConfigError(f"data.domains: unknown {unknown}; allowed are {sorted([*found, *embedded])}")
    for domain in [name for name in data.domains or EMBEDDED_DOMAINS if name in embedded]:
        found[domain] = (*corpora.open_embedded(domain, directory, progress), str(corpora.EmbeddedCorpus.VERSION))
    return found


def _chat_tokenizer(tokenizer: Tokenizer | None, template: str) -> Tokenizer:
    """The tokenizer with data.chat_template, if that is set. Raises ConfigError if it then has no chat template."""
    if tokenizer is None:
        raise ConfigError(
            "conversations: a tokenizer trained on the text has no chat template; start from an import "
            "(start.checkpoint), or set data.tokenizer to a tokenizer.json"
        )
    if template and isinstance(tokenizer, JsonTokenizer):
        tokenizer = tokenizer.with_template(read_small_file(template, f"data.chat_template={template!r}"))
    chat.chat_template(tokenizer)
    return tokenizer


def _cached_tokenizer(
    path: epath.Path, train: dict[str, Sequence[str]], vocab_size: int, progress: Callable[[str], None]
) -> Tokenizer:
    """Read the tokenizer at `path`, after training it if the file is missing.

    A file beside it holds its hash, since an edited letter would be read as another vocabulary; earlier versions wrote
    none.
    """
    hashed = path.with_name(f"{path.name}.sha256")
    if path.exists():
        content = path.read_bytes()
        try:
            if hashed.exists() and hashed.read_text().strip() != hashlib.sha256(content).hexdigest():
                raise ConfigError("its hash does not match")
            return Tokenizer.from_bytes(content)
        except ConfigError as error:
            raise ConfigError(f"{path}: a damaged cached tokenizer; delete it to train it again") from error
    progress(f"training a tokenizer of {vocab_size} tokens")
    tokenizer = train_tokenizer(_tokenizer_sample(train), vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(hashed, f"{hashlib.sha256(tokenizer.model_bytes).hexdigest()}\n")
    write_atomic(path, tokenizer.model_bytes)
    return tokenizer


def _tokenizer_sample(train: dict[str, Sequence[str]]) -> Iterator[str]:
    """Yield random documents of each domain, up to its share of TOKENIZER_CHARACTERS."""
    for documents in train.values():
        left = TOKENIZER_CHARACTERS // len(train)
        order = np.random.default_rng(0).permutation(min(len(documents), 1_000_000))
        for index in order:
            text = documents[int(index)][:left].replace(PAIR, "\n")
            left -= len(text)
            yield text
            if not left:
                break
