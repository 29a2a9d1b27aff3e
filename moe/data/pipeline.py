"""Documents to batches of packed rows, and back to the same place after a restart.

In: a :class:`~moe.config.schema.DataConfig`. Out: a Grain iterator of training batches whose state Orbax saves
(:class:`moe.data.streams.StreamsSave`), and a fixed list of held-out batches per domain.

Letters: B rows of this process, T sequence_length, V vocab_size.

A batch is a dict of NumPy arrays, all int32:
  tokens       [B,T]  token ids; each document is ``bos text eos``
  targets      [B,T]  the next token of the same document; -1 where there is none (after eos, and in padding)
  segment_ids  [B,T]  1, 2, ... per document within the row; 0 = padding
  positions    [B,T]  0, 1, ... within the segment
  domain       [B]    index into Prepared.domains; a row is of one domain

Rows are cut every T + 1 tokens from the documents laid end to end, tokens = row[:-1] and targets = row[1:]. A document
that a cut divides goes on in the next row as a new segment with positions from 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from etils import epath

from moe.atomic_files import write_atomic
from moe.config import EMBEDDED_DOMAINS, ConfigError, DataConfig
from moe.data import corpora, datasets, folders, json_tokenizer, streams
from moe.data.tokenizer import TRAINER_VERSION, Tokenizer, train_tokenizer

TOKENIZER_CHARACTERS = 10_000_000  # of text a tokenizer is trained on, an equal share from each domain
HELDOUT_STRETCH = 16  # rows read for every held-out row that is kept
UNIGRAM_TOKENS = 2_000_000  # of the train split of each domain that unigram_nll counts

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything that is on disk by now. Documents are ``str``, by index."""

    tokenizer: Tokenizer
    domains: tuple[str, ...]
    train: dict[str, Sequence[str]]
    heldout: dict[str, Sequence[str]]
    versions: dict[str, str] = dataclasses.field(default_factory=dict)  # of each domain's documents
    _unigram_counts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, repr=False, compare=False)


# --- Preparation -----------------------------------------------------------------------------------------------------
def prepare(
    data: DataConfig,
    vocab_size: int,
    *,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[str], None] = print,
) -> Prepared:
    """Fetches, builds and trains under data.directory what is not there yet, and opens it.

    Args:
      data: of a TFDS dataset the name is the domain; for folders see :mod:`moe.data.folders`.
      vocab_size: V; a tokenizer of exactly that size is trained unless there is one.
      tokenizer: use this one (say, a checkpoint's) instead of data.tokenizer or a trained one.
      progress: told in a line what takes long.

    Raises:
      ConfigError: of the domains, weights, dataset, tokenizer or lengths, whichever is impossible.
    """
    directory = epath.Path(data.directory).expanduser()
    # In a bucket nothing is built or trained, so there is nothing to lock.
    local = "://" not in os.fspath(directory)
    lock = datasets.locked(Path(directory)) if local else contextlib.nullcontext()
    with lock, datasets.disk(directory):
        found = _open(data, directory, progress)
        domains = tuple(data.domains) or tuple(found)
        train, heldout = ({domain: found[domain][part] for domain in domains} for part in (0, 1))
        versions = {domain: found[domain][2] for domain in domains}
        _weights(data, domains)
        if tokenizer is None and data.tokenizer:
            tokenizer = json_tokenizer.named_tokenizer(data.tokenizer, directory, progress)
        if tokenizer is None:
            text = hashlib.sha256(json.dumps([data.dataset, versions]).encode()).hexdigest()[:12]
            readable = re.sub(r"[^\w.-]", "_", "-".join([data.dataset, *domains]))[:80]
            path = directory / "tokenizers" / f"{readable}-{text}-v{vocab_size}-{TRAINER_VERSION}.model"
            tokenizer = _cached_tokenizer(path, train, vocab_size, progress)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens; use at least that"
        )

    prepared = Prepared(tokenizer, domains, train, heldout, versions)
    for domain in domains:  # too long a row should fail here, not at the first evaluation
        _heldout_rows(prepared, data, domain)
    return prepared


def _open(
    data: DataConfig, directory: epath.Path, progress: Callable[[str], None]
) -> dict[str, tuple[Sequence[str], Sequence[str], str]]:
    """Returns domain → (train, heldout, version) of all datasets that data.dataset names."""
    names = data.dataset.split(",")
    found: dict[str, tuple[Sequence[str], Sequence[str], str]] = {}
    for name in names:
        if folders.is_folder(name):
            parts, version = folders.open_folder(name, directory, progress)
            added = {domain: (*splits, version) for domain, splits in parts.items()}
        else:
            added = {} if name == "embedded" else {name: datasets.open_tfds(name, directory)}
        if twice := sorted(added.keys() & (found.keys() | (corpora.DOMAINS if "embedded" in names else {}))):
            raise ConfigError(f"data.dataset={data.dataset!r}: two of them have a domain {twice[0]!r}; rename a folder")
        found |= added
    embedded = tuple(corpora.DOMAINS) if "embedded" in names else ()
    if unknown := sorted(set(data.domains) - {*found, *embedded}):
        raise ConfigError(f"data.domains: unknown {unknown}; allowed are {sorted([*found, *embedded])}")
    for domain in [name for name in data.domains or EMBEDDED_DOMAINS if name in embedded]:
        found[domain] = (*corpora.open_embedded(domain, directory, progress), str(corpora.EmbeddedCorpus.VERSION))
    return found


def _weights(data: DataConfig, domains: tuple[str, ...]) -> tuple[float, ...]:
    """Returns a weight per domain, or raises ConfigError."""
    weights = tuple(data.weights) or (1.0,) * len(domains)
    if len(weights) != len(domains):
        raise ConfigError(f"data.weights={weights}: give one for each of the {len(domains)} domains {domains}, or none")
    if not all(np.isfinite(weight) and weight > 0 for weight in weights):
        raise ConfigError(
            f"data.weights={weights}: each must be a positive number; leave a domain out of data.domains instead"
        )
    return weights


def _cached_tokenizer(
    path: epath.Path, train: dict[str, Sequence[str]], vocab_size: int, progress: Callable[[str], None]
) -> Tokenizer:
    """Reads the tokenizer at `path`; trains and writes it if there is none."""
    if path.exists():
        return Tokenizer.from_bytes(path.read_bytes())
    progress(f"training a tokenizer of {vocab_size} tokens")
    tokenizer = train_tokenizer(_tokenizer_sample(train), vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, tokenizer.model_bytes)
    return tokenizer


def _tokenizer_sample(train: dict[str, Sequence[str]]) -> Iterator[str]:
    """Documents spread evenly over each domain, up to its share of TOKENIZER_CHARACTERS."""
    for documents in train.values():
        left = TOKENIZER_CHARACTERS // len(train)
        order = np.random.default_rng(0).permutation(min(len(documents), 1_000_000))
        for index in order:
            text = documents[int(index)][:left]
            left -= len(text)
            yield text
            if not left:
                break


# --- Rows ------------------------------------------------------------------------------------------------------------
def _tokenise(text: str, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """``bos text eos``."""
    bos = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    return {"row": np.concatenate([bos, tokenizer.encode(text), [tokenizer.eos_id]]).astype(np.int32)}


def _shift(packed: dict[str, np.ndarray], domain_index: int, pad_id: int) -> Batch:
    """One packed row of T + 1 tokens → tokens and targets of T."""
    row, segments = packed["row"], packed["row_segment_ids"].astype(np.int32)
    same_document = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
    return {
        "tokens": np.where(segments > 0, row, pad_id)[:-1].astype(np.int32),
        "targets": np.where(same_document, row[1:], -1).astype(np.int32),
        "segment_ids": segments[:-1],
        "positions": packed["row_positions"][:-1].astype(np.int32),
        "domain": np.int32(domain_index),  # pyright: ignore[reportReturnType]
    }


def _rows(documents: grain.MapDataset, prepared: Prepared, data: DataConfig, domain: str) -> grain.IterDataset:
    """Documents of one domain, in their order → rows; the last one of a finite dataset is padded."""
    # No threads of its own: `streams.run` reads ahead of the train step, once for all streams and domains.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    tokens = documents.map(functools.partial(_tokenise, tokenizer=prepared.tokenizer)).to_iter_dataset(options)
    packed = grain.experimental.ConcatThenSplitIterDataset(tokens, length_struct={"row": data.sequence_length + 1})
    index = prepared.domains.index(domain)
    return streams.ExactState(packed).map(
        functools.partial(_shift, domain_index=index, pad_id=prepared.tokenizer.pad_id)
    )


def train_dataset(
    prepared: Prepared, data: DataConfig, *, batch_size: int, seed: int, rows: Sequence[int] | np.ndarray | None = None
) -> grain.IterDataset:
    """Returns the endless dataset of this process's rows of the training batches; see the module for their fields.

    A batch is made of n = data.streams streams: stream i gives its i-th n-th of the rows. Each domain's documents are
    shuffled anew every epoch and dealt to the streams like cards; a stream packs its own, mixes the domains so that
    their shares of its rows follow data.weights exactly, and shuffles over data.shuffle_window / n rows. The same
    arguments give the same batches, on however many processes; another seed another order.

    Args:
      batch_size: B, rows of all processes together.
      rows: numbers of the rows of a batch that this process holds (:func:`moe.parallel.mesh.local_rows`); None: all.

    Raises:
      ConfigError: these rows are not those of whole streams.
    """
    count = data.streams or math.gcd(8, batch_size)
    per_stream = batch_size // count
    if batch_size % count:
        raise ConfigError(f"data.streams={count}: must divide train.batch_size={batch_size}")
    here = np.arange(batch_size) if rows is None else np.asarray(rows)
    numbers = np.unique(here // per_stream)
    if len(numbers) * per_stream != len(here):
        raise ConfigError(
            f"data.streams={count}: must be a multiple of the number of processes that hold different rows, so that "
            f"one holds whole streams; train.batch_size={batch_size} and the mesh give this one {len(here)} rows"
        )
    parts = {int(i): _stream(prepared, data, int(i), count, seed).batch(per_stream) for i in numbers}
    return streams.run(parts, _digest(prepared))


def _stream(prepared: Prepared, data: DataConfig, number: int, count: int, seed: int) -> grain.IterDataset:
    """The endless rows of one of `count` streams."""
    rows = {}
    for domain in prepared.domains:
        # crc32, not hash(): the latter differs from one Python process to the next.
        documents = grain.MapDataset.source(prepared.train[domain]).shuffle(
            seed=_seed(seed, zlib.crc32(domain.encode()))
        )
        rows[domain] = _rows(documents.repeat()[number::count], prepared, data, domain)
    # All streams mix in the same order, so each shuffles in its own: a batch of one row a stream is not of one domain.
    mixed = grain.IterDataset.mix(rows, dict(zip(prepared.domains, _weights(data, prepared.domains), strict=True)))
    window = max(data.shuffle_window // count, 1)
    return streams.WindowShuffle(mixed, window, _seed(seed, number))


def _seed(*numbers: int) -> int:
    """31 bits: Grain adds the number of an epoch or a window to it, and takes 32."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) >> 1


def _digest(prepared: Prepared) -> str:
    """Of what a position in the streams means: the tokenizer, and the documents by number and version."""
    parts = [f"{domain} {prepared.versions.get(domain)} {len(prepared.train[domain])}" for domain in prepared.domains]
    tokenizer = b"".join(content for _, content in sorted(prepared.tokenizer.files.items()))
    return hashlib.sha256("\n".join(parts).encode() + tokenizer).hexdigest()[:16]


def train_iterator(
    prepared: Prepared, data: DataConfig, *, batch_size: int, seed: int, rows: Sequence[int] | np.ndarray | None = None
) -> grain.DatasetIterator:
    """Returns an iterator over `train_dataset` that can be saved and restored exactly, at any batch."""
    return iter(train_dataset(prepared, data, batch_size=batch_size, seed=seed, rows=rows))


# --- Held-out --------------------------------------------------------------------------------------------------------
def _heldout_rows(prepared: Prepared, data: DataConfig, domain: str) -> list[Batch]:
    """Up to data.heldout_rows rows, the last one padded where the split ends in it."""
    if domain not in prepared.domains:
        raise ConfigError(f"no domain {domain!r}; allowed are {list(prepared.domains)}")
    documents = grain.MapDataset.source(prepared.heldout[domain])
    # Rows next to each other come from the same few documents, so evenly spaced ones of a longer stretch are taken;
    # the stretch is bounded because a web corpus would take minutes to read.
    stretch = itertools.islice(_rows(documents, prepared, data, domain), HELDOUT_STRETCH * data.heldout_rows)
    rows = list(stretch)
    # A first row that ends in padding means that all tokens there are lie in it.
    if not rows or rows[0]["segment_ids"][-1] == 0:
        tokens = int((rows[0]["segment_ids"] > 0).sum()) if rows else 0
        raise ConfigError(
            f"data.sequence_length={data.sequence_length}: the held-out split of {domain!r} gives only {tokens} "
            f"tokens; use at most {tokens}"
        )
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), data.heldout_rows)).astype(int)
    return [rows[index] for index in chosen]


def heldout_batches(prepared: Prepared, data: DataConfig, *, domain: str, batch_size: int) -> list[Batch]:
    """Returns data.heldout_rows evenly spaced rows of a domain's held-out text, in ceil(heldout_rows / B) batches.

    Always the same rows in the same order. Where the split or the last batch is short, rows of padding fill it
    (segment_ids 0, targets -1), so that all batches have one shape, [batch_size, T].

    Raises:
      ConfigError: unknown domain, or the split does not fill a single row.
    """
    rows = _heldout_rows(prepared, data, domain)
    padding: Batch = {
        key: np.full_like(value, {"tokens": prepared.tokenizer.pad_id, "targets": -1}.get(key, 0))
        for key, value in rows[0].items()
    }
    padding["domain"] = rows[0]["domain"]
    rows += [padding] * (-(-data.heldout_rows // batch_size) * batch_size - len(rows))
    return [
        {key: np.stack([row[key] for row in rows[start : start + batch_size]]) for key in padding}
        for start in range(0, len(rows), batch_size)
    ]


def unigram_nll(prepared: Prepared, data: DataConfig, domain: str | None = None) -> float:
    """Returns the nats per target token of a unigram model on exactly the rows of `heldout_batches`.

    The model is p(v) = (count(v) + 1) / (sum of counts + V), counted over the train split, eos included, bos not (it
    is never a target): the first documents of it up to UNIGRAM_TOKENS tokens. With no domain, the counts of all
    domains are pooled and all their held-out rows are scored. Counts are kept in memory with `prepared`.
    """
    domains = prepared.domains if domain is None else (domain,)
    targets = np.concatenate([row["targets"] for name in domains for row in _heldout_rows(prepared, data, name)])
    targets = targets[targets >= 0]
    counts: Any = sum(_unigram_counts(prepared, name) for name in domains)
    log_probs = np.log(counts + 1) - np.log(counts.sum() + len(counts))
    return float(-log_probs[targets].mean())


def _unigram_counts(prepared: Prepared, domain: str) -> np.ndarray:
    """[V] int64."""
    if domain not in prepared._unigram_counts:
        counts = np.zeros(prepared.tokenizer.vocab_size, np.int64)
        for text in prepared.train[domain]:
            counts += np.bincount(_tokenise(text, prepared.tokenizer)["row"], minlength=len(counts))
            if counts.sum() >= UNIGRAM_TOKENS:
                break
        if prepared.tokenizer.bos_id >= 0:
            counts[prepared.tokenizer.bos_id] = 0
        prepared._unigram_counts[domain] = counts
    return prepared._unigram_counts[domain]
