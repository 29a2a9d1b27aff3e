"""Batches of packed rows: an endless training iterator that saves and restores its position, and held-out batches.

A batch is a dict of int32 arrays, for B rows of this process, T = sequence_length and U = input_length:
  tokens       [B,T]  token ids; a document is ``bos text eos``
  targets      [B,T]  the next token of the same document; -1 where there is none (after eos, and in padding)
  segment_ids  [B,T]  1, 2, ... per document within the row; 0 = padding
  positions    [B,T]  0, 1, ... within the segment
  domain       [B]    index into Prepared.domains; a row is of one domain

An objective (:mod:`moe.config.objectives`) adds arrays, and says how rows are made:

Of text, documents are concatenated and cut into rows of T + 1 tokens; tokens = row[:-1] and targets = row[1:]. A
document that a cut divides continues in the next row as a new segment with positions from 0.

Of examples, such as conversations, a row holds whole ones and padding.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from moe.config import Config, ConfigError, DataConfig
from moe.config.objectives import Arrays, Objective, find_objective
from moe.data import own_objectives, sizes, streams
from moe.data.preparation import Prepared, domain_weights, open_data, refuse_unseen, row_shares
from moe.data.tokenizer import Tokenizer

HELDOUT_STRETCH = 16  # rows read for every held-out row that is kept
MAX_STRETCH_TOKENS = 1 << 24  # limit of the tokens read for them, unless more are kept
UNIGRAM_TOKENS = 2_000_000  # tokens of each domain's train split that unigram_nll counts
PACKED_ROWS = 32  # rows that are packed together: an example goes to the first with room for it

Batch = dict[str, np.ndarray]


def prepare(
    data: DataConfig,
    vocab_size: int,
    *,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[str], None] = print,
    objective: Objective | None = None,
) -> Prepared:
    """Open documents and tokenizer (:func:`moe.data.preparation.open_data`) and check the held-out splits.

    Args:
      objective: of the run; None: the one that the data section names, for one that reads no other section.

    Raises:
      ConfigError: also for rows longer than a held-out split, and for documents that the objective refuses.
    """
    own = objective or find_objective(data.objective).bound(data)
    own.check_rows(data)
    opened = open_data(data, vocab_size, tokenizer, progress, own)
    prepared = dataclasses.replace(opened, objective=objective)
    prepared = dataclasses.replace(prepared, examples=own_objectives.probe(own, prepared, data))
    for domain in prepared.domains:
        own.check_documents(prepared.train[domain])
        own.check_documents(prepared.heldout[domain])
        _stretch(prepared, data, domain, 1)
    return prepared


def prepare_run(
    config: Config, *, tokenizer: Tokenizer | None = None, progress: Callable[[str], None] = print
) -> Prepared:
    """Open the data of a run (:func:`prepare`), and check that each embedding has a row for every id of its batches.

    Raises:
      ConfigError: see :func:`prepare`; or the encoder's own embedding has too few rows.
    """
    objective = config.objective
    prepared = prepare(
        config.data, config.model.vocab_size, tokenizer=tokenizer, progress=progress, objective=objective
    )
    ids = objective.ids(prepared.tokenizer)
    if 0 < config.model.encoder_vocab_size < ids:
        raise ConfigError(
            f"model.encoder_vocab_size={config.model.encoder_vocab_size}: the encoder's rows hold ids up to {ids - 1}; "
            f"use at least {ids}, or 0 to share model.vocab_size={config.model.vocab_size}"
        )
    return prepared


# --- Rows ------------------------------------------------------------------------------------------------------------
def _objective(prepared: Prepared, data: DataConfig) -> Objective:
    """The objective of a run, or of a data section."""
    return prepared.objective or find_objective(data.objective).bound(data)


def _encode(text: str, objective: Objective, tokenizer: Tokenizer) -> Arrays:
    """A document to cut rows from, under the name by which Grain joins them."""
    return {"row": objective.encode(text, tokenizer)}


def _shift(packed: dict[str, np.ndarray], domain_index: int, pad_id: int) -> Batch:
    """Split a packed row of T + 1 tokens into tokens and targets of T."""
    row, segments = packed["row"], packed["row_segment_ids"].astype(np.int32)
    same_document = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
    return {
        "tokens": np.where(segments > 0, row, pad_id)[:-1].astype(np.int32),
        "targets": np.where(same_document, row[1:], -1).astype(np.int32),
        "segment_ids": segments[:-1],
        "positions": packed["row_positions"][:-1].astype(np.int32),
        "domain": np.int32(domain_index),  # pyright: ignore[reportReturnType]
    }


class _Flat(grain.experimental.FlatMapTransform):
    def flat_map(self, element: list[Arrays]) -> list[Arrays]:
        """Return the examples of a document."""
        return element


def _pack(documents: grain.IterDataset, lengths: dict[str, int], data: DataConfig) -> grain.IterDataset:
    """Pack whole examples into rows of these lengths; each document is a list of examples."""
    return grain.experimental.FirstFitPackIterDataset(
        grain.experimental.FlatMapIterDataset(documents, _Flat()),
        length_struct=lengths,
        num_packing_bins=PACKED_ROWS if data.pack else 1,
        max_sequences_per_bin=None if data.pack else 1,
        shuffle_bins=False,
    )


def _rows(
    documents: grain.MapDataset, prepared: Prepared, data: DataConfig, domain: str, seed: int
) -> grain.IterDataset:
    """Pack documents of one domain into rows, in order; the last row of a finite dataset is padded."""
    # No threads here: one thread in `streams.run` prefetches for all streams and domains.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    tokenizer, index = prepared.tokenizer, prepared.domains.index(domain)
    objective = _objective(prepared, data)
    if lengths := objective.lengths(data):
        read = functools.partial(objective.examples, data=data, tokenizer=tokenizer)
        if objective.draws:
            found = documents.random_map(read, seed=seed)
        else:
            found = documents.map(lambda text: read(text, np.random.default_rng(0)))
        packed = _pack(found.to_iter_dataset(options), lengths, data)
        rows = packed.map(functools.partial(objective.row, pad_id=tokenizer.pad_id))
        return rows.map(lambda row: {**row, "domain": np.int32(index)})
    encode = functools.partial(_encode, objective=objective, tokenizer=tokenizer)
    tokens = documents.map(encode).to_iter_dataset(options)
    packed = grain.experimental.ConcatThenSplitIterDataset(tokens, length_struct={"row": data.sequence_length + 1})
    rows = streams.ExactState(packed).map(functools.partial(_shift, domain_index=index, pad_id=tokenizer.pad_id))
    return rows.random_map(objective.divide, seed=seed) if objective.draws else rows


def _refuse_no_examples(prepared: Prepared, data: DataConfig) -> None:
    """Refuse a domain without an example, since packing its first row would never end. Raises ConfigError."""
    objective, rng = _objective(prepared, data), np.random.default_rng(0)
    for domain in prepared.domains if objective.lengths(data) else ():
        if not any(objective.examples(text, rng, data, prepared.tokenizer) for text in prepared.train[domain]):
            raise _no_example(objective, data, domain, "training")


def _no_example(objective: Objective, data: DataConfig, domain: str, split: str) -> ConfigError:
    return ConfigError(
        f"data.sequence_length={data.sequence_length}: no document of the {split} split of {domain!r} has an example "
        f"that fits{objective.answers}"
    )


def train_iterator(
    prepared: Prepared, data: DataConfig, *, batch_size: int, seed: int, rows: Sequence[int] | np.ndarray | None = None
) -> grain.DatasetIterator:
    """Return an endless iterator over this process's rows of the training batches, whose position can be saved and
    restored at any batch.

    A batch consists of n = data.streams equal parts, one per stream. Each domain's documents are reshuffled every epoch
    and distributed round-robin over the streams. A stream packs its documents, mixes the domains with the shares of
    :func:`moe.data.preparation.row_shares`, and shuffles over data.shuffle_window / n rows. The batches depend only on
    the arguments, not on the number of processes.

    Args:
      prepared: tokenizer and documents.
      data: settings.
      batch_size: rows of all processes together.
      seed: order of documents and rows.
      rows: numbers of the rows of a batch that this process holds (:func:`moe.parallel.mesh.local_rows`); None: all.

    Raises:
      ConfigError: `rows` are not the rows of whole streams, or a domain has no training text.
    """
    refuse_unseen(prepared.train)
    _refuse_no_examples(prepared, data)
    count = data.streams or streams.default_number(batch_size)
    per_stream = batch_size // count
    if batch_size % count:
        raise ConfigError(f"data.streams={count}: must divide train.batch_size={batch_size}")
    here = np.arange(batch_size) if rows is None else np.asarray(rows)
    numbers = streams.whole(here, per_stream)
    if not len(numbers):
        raise ConfigError(
            f"data.streams={count}: must be a multiple of the number of processes that hold different rows, so that "
            f"each holds whole streams; train.batch_size={batch_size} and the mesh give this one {len(here)} rows, "
            f"for which {streams.least_number(batch_size, [here])} would do; a run that has begun keeps its "
            f"streams and needs a number of processes that divides {count}"
        )
    parts = {int(i): _stream(prepared, data, int(i), count, seed).batch(per_stream) for i in numbers}
    return iter(streams.run(parts, digest(prepared)))


def _stream(prepared: Prepared, data: DataConfig, number: int, count: int, seed: int) -> grain.IterDataset:
    """Return the endless rows of stream `number` of `count`."""
    rows = {}
    for domain in prepared.domains:
        # crc32, because hash() differs between Python processes.
        documents = grain.MapDataset.source(prepared.train[domain]).shuffle(
            seed=_seed(seed, zlib.crc32(domain.encode()))
        )
        noise = _seed(seed, zlib.crc32(domain.encode()), number)
        rows[domain] = _rows(documents.repeat()[number::count], prepared, data, domain, noise)
    # All streams mix domains in the same order; different shuffles keep a batch from having only one domain.
    mixed = grain.IterDataset.mix(
        rows, dict(zip(prepared.domains, domain_weights(data, prepared.domains), strict=True))
    )
    window = max(data.shuffle_window // count, 1)
    return streams.WindowShuffle(mixed, window, _seed(seed, number))


def _seed(*numbers: int) -> int:
    """Derive a 31-bit seed: Grain adds the epoch to it and accepts 32 bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) >> 1


def digest(prepared: Prepared) -> str:
    """Hash what a stream position refers to: the tokenizer, and number and version of the documents."""
    parts = [f"{domain} {prepared.versions.get(domain)} {len(prepared.train[domain])}" for domain in prepared.domains]
    tokenizer = b"".join(content for _, content in sorted(prepared.tokenizer.files.items()))
    return hashlib.sha256("\n".join(parts).encode() + tokenizer).hexdigest()[:16]


EPOCH_SAMPLE = 32  # documents whose length estimates that of an epoch


def epochs_per_step(prepared: Prepared, config: Config) -> dict[str, float]:
    """Return domain → share of its training tokens that a step reads, from the mean length of some documents.

    Empty where rows hold examples and padding.
    """
    objective = _objective(prepared, config.data)
    if objective.lengths(config.data):
        return {}
    epochs, read = {}, config.train.batch_size * (config.data.sequence_length + 1)  # a row is cut from T + 1 tokens
    for domain, share in row_shares(config.data, prepared.domains).items():
        documents = prepared.train[domain]
        count = min(len(documents), max(EPOCH_SAMPLE // len(prepared.domains), 1))
        sample = [documents[int(i)] for i in np.linspace(0, len(documents) - 1, count)]
        tokens = np.mean([len(objective.encode(text, prepared.tokenizer)) for text in sample]) * len(documents)
        epochs[domain] = float(read * share / tokens)
    return epochs


def describe_sizes(prepared: Prepared, data: DataConfig) -> Iterator[str]:
    """Lines on the size of the data, and on what is left out of it (:mod:`moe.data.sizes`)."""
    objective, rng = _objective(prepared, data), np.random.default_rng(0)

    def count(text: str) -> tuple[int, int]:
        if not objective.lengths(data):
            size = len(objective.encode(text, prepared.tokenizer))
            return size, size
        found = objective.examples(text, rng, data, prepared.tokenizer)
        return sum(map(objective.tokens, found)), sum(len(objective.targets(example)) for example in found)

    train = [prepared.train[domain] for domain in prepared.domains]
    heldout = [prepared.heldout[domain] for domain in prepared.domains]
    return sizes.describe(data, objective, train, heldout, count)


# --- Held-out rows ---------------------------------------------------------------------------------------------------
def _stretch(prepared: Prepared, data: DataConfig, domain: str, length: int) -> list[Batch]:
    """Return up to `length` rows from the start of a held-out split; the row in which the split ends is padded."""
    if domain not in prepared.domains:
        raise ConfigError(f"no domain {domain!r}; allowed are {list(prepared.domains)}")
    documents = grain.MapDataset.source(prepared.heldout[domain])
    rows = list(itertools.islice(_rows(documents, prepared, data, domain, seed=0), length))
    # If the first row ends in padding, the split has no more tokens than this row. Examples may be shorter than a row.
    objective = _objective(prepared, data)
    whole = bool(objective.lengths(data))
    if not rows and whole:
        raise _no_example(objective, data, domain, "held-out")
    if not rows or (rows[0]["segment_ids"][-1] == 0 and not whole):
        tokens = int((rows[0]["segment_ids"] > 0).sum()) if rows else 0
        raise ConfigError(
            f"data.sequence_length={data.sequence_length}: the held-out split of {domain!r} has only {tokens} "
            f"tokens; use at most {tokens}"
        )
    return rows


def _heldout_rows(prepared: Prepared, data: DataConfig, domain: str) -> list[Batch]:
    """Return up to data.heldout_rows rows."""
    # Neighbouring rows are of the same few documents, so evenly spaced rows of a longer stretch are taken. The stretch
    # is bounded because reading a whole web corpus would take minutes.
    most = max(MAX_STRETCH_TOKENS // data.sequence_length, data.heldout_rows)
    rows = _stretch(prepared, data, domain, min(HELDOUT_STRETCH * data.heldout_rows, most))
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), data.heldout_rows)).astype(int)
    objective = _objective(prepared, data)
    return [objective.heldout_row(rows[index]) for index in chosen]


def heldout_batches(prepared: Prepared, data: DataConfig, *, domain: str, batch_size: int) -> list[Batch]:
    """Return up to data.heldout_rows evenly spaced rows of a domain's held-out text, in batches.

    The rows and their order are fixed. Rows of padding (segment_ids 0, targets -1) fill up the last batch, so that all
    batches have the shape [batch_size, T].

    Raises:
      ConfigError: unknown domain, or a split shorter than one row.
    """
    rows = _heldout_rows(prepared, data, domain)
    padding: Batch = {
        key: np.full_like(value, -1 if key == "targets" else prepared.tokenizer.pad_id if "tokens" in key else 0)
        for key, value in rows[0].items()
    }
    padding["domain"] = rows[0]["domain"]
    rows += [padding] * (-len(rows) % batch_size)
    return [
        {key: np.stack([row[key] for row in rows[start : start + batch_size]]) for key in padding}
        for start in range(0, len(rows), batch_size)
    ]


def unigram_nll(prepared: Prepared, data: DataConfig, domain: str | None = None) -> float:
    """Return the nats per target token of a unigram model on the rows of `heldout_batches`.

    The model is p(v) = (count(v) + 1) / (sum of counts + V), with counts over those of the first UNIGRAM_TOKENS tokens
    of the train split that can be targets: all but bos, or the decoder's part of an encoder-decoder's examples.
    Without a domain, counts and held-out rows of all domains are pooled. Counts are cached in `prepared`.
    """
    domains = prepared.domains if domain is None else (domain,)
    targets = np.concatenate([row["targets"] for name in domains for row in _heldout_rows(prepared, data, name)])
    targets = targets[targets >= 0]
    counts: Any = sum(_unigram_counts(prepared, data, name) for name in domains)
    log_probs = np.log(counts + 1) - np.log(counts.sum() + len(counts))
    return float(-log_probs[targets].mean())


def _unigram_counts(prepared: Prepared, data: DataConfig, domain: str) -> np.ndarray:
    """Count the possible targets of a train split, [V] int64."""
    if domain not in prepared._unigram_counts:
        objective = _objective(prepared, data)
        tokenizer = prepared.tokenizer
        rng = np.random.default_rng(0)
        counts, read = np.zeros(objective.ids(tokenizer), np.int64), 0
        for text in prepared.train[domain]:
            for ids in objective.unigram_targets(text, rng, data, tokenizer):
                counts += np.bincount(ids, minlength=len(counts))
                read += len(ids)
            if read >= UNIGRAM_TOKENS:
                break
        prepared._unigram_counts[domain] = counts
    return prepared._unigram_counts[domain]
