"""Batches of packed rows: an endless training iterator that saves and restores its position, and held-out batches.

A batch is a dict of int32 arrays, for B rows of this process, T = sequence_length and U = input_length:
  tokens       [B,T]  token ids; a document is ``bos text eos``
  targets      [B,T]  the next token of the same document; -1 where there is none (after eos, and in padding)
  segment_ids  [B,T]  1, 2, ... per document within the row; 0 = padding
  positions    [B,T]  0, 1, ... within the segment
  domain       [B]    index into Prepared.domains; a row is of one domain
  prefix       [B,T]  1 where attention goes in both directions; only with data.objective "prefix_lm"

Documents are concatenated and cut into rows of T + 1 tokens; tokens = row[:-1] and targets = row[1:]. A document that
a cut divides continues in the next row as a new segment with positions from 0.

With data.objective "chat" a row holds whole conversations and padding (:mod:`moe.data.chat`), with targets only in
answers; with "preferences" pairs of them (:mod:`moe.data.preferences`); with "policy" completions with their
advantages (:mod:`moe.data.policy`).

With an encoder (data.input_length above 0) a row holds whole examples (:mod:`moe.data.objectives`) and padding:
  encoder_tokens, encoder_segment_ids, encoder_positions  [B,U]; segment i is the input of segment i of the decoder
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
from moe.data import chat, objectives, policy, preferences, sizes, streams
from moe.data.documents import CONVERSATION
from moe.data.preparation import Prepared, domain_weights, open_data, refuse_unseen, row_shares
from moe.data.rollouts import ROLLOUTS
from moe.data.sentinels import sentinel_ids
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
    reader: policy.Reader | None = None,
) -> Prepared:
    """Open documents and tokenizer (:func:`moe.data.preparation.open_data`) and check the held-out splits.

    Args:
      reader: of rollouts, for data.objective "policy"; all rollouts are read once, to refuse those that do not fit.

    Raises:
      ConfigError: also for rows longer than a held-out split.
    """
    objectives.check_lengths(data)
    prepared = dataclasses.replace(open_data(data, vocab_size, tokenizer, progress), reader=reader)
    for domain in prepared.domains:
        if reader is not None:
            reader.check(prepared.train[domain])
            reader.check(prepared.heldout[domain])
        _stretch(prepared, data, domain, 1)
    return prepared


def prepare_run(
    config: Config, *, tokenizer: Tokenizer | None = None, progress: Callable[[str], None] = print
) -> Prepared:
    """Open the data of a run (:func:`prepare`), and check that each embedding has a row for every id of its batches.

    Raises:
      ConfigError: see :func:`prepare`; or the encoder's own embedding has too few rows.
    """
    reader = None
    if config.data.objective == "policy":
        reader = policy.Reader(config.model, config.policy, config.data.sequence_length)
    prepared = prepare(config.data, config.model.vocab_size, tokenizer=tokenizer, progress=progress, reader=reader)
    ids = prepared.tokenizer.vocab_size
    if config.data.objective == "span_corruption":
        ids = max(ids, int(sentinel_ids(prepared.tokenizer).max()) + 1)
    if 0 < config.model.encoder_vocab_size < ids:
        raise ConfigError(
            f"model.encoder_vocab_size={config.model.encoder_vocab_size}: the encoder's rows hold ids up to {ids - 1}; "
            f"use at least {ids}, or 0 to share model.vocab_size={config.model.vocab_size}"
        )
    return prepared


# --- Rows ------------------------------------------------------------------------------------------------------------
def _tokenise(text: str, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Encode a document as ``bos text eos``.

    Raises:
      ConfigError: it is a conversation, or rollouts.
    """
    if text.startswith(CONVERSATION):
        raise ConfigError("data.dataset: holds conversations (messages); set data.objective=chat to train on them")
    if text.startswith(ROLLOUTS):
        raise ConfigError("data.dataset: holds rollouts (completions); set data.objective=policy to train on them")
    bos = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    return {"row": np.concatenate([bos, tokenizer.encode(text), [tokenizer.eos_id]]).astype(np.int32)}


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
    def flat_map(self, element: list[objectives.Example]) -> list[objectives.Example]:
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
    if data.input_length:
        encode = functools.partial(objectives.examples, data=data, tokenizer=tokenizer)
        found = documents.random_map(encode, seed=seed).to_iter_dataset(options)
        packed = _pack(found, {"encoder": data.input_length, "decoder": data.sequence_length}, data)
        rows = packed.map(functools.partial(objectives.encoder_decoder_row, tokenizer=tokenizer))
        return rows.map(lambda row: {**row, "domain": np.int32(index)})
    if data.conversations:
        names, row = ["tokens", "targets"], chat.chat_row
        if data.objective == "preferences":
            names, row = [*names, "rejected"], preferences.row
        found = documents.map(_conversation_encoder(prepared, data)).to_iter_dataset(options)
        packed = _pack(found, dict.fromkeys(names, data.sequence_length), data)
        return packed.map(functools.partial(row, domain=index, pad_id=tokenizer.pad_id))
    if prepared.reader is not None:
        reader = prepared.reader
        packed = _pack(
            documents.map(reader.examples).to_iter_dataset(options), dict.fromkeys(reader.keys, reader.length), data
        )
        return packed.map(functools.partial(policy.row, domain=index, pad_id=tokenizer.pad_id))
    tokens = documents.map(functools.partial(_tokenise, tokenizer=tokenizer)).to_iter_dataset(options)
    packed = grain.experimental.ConcatThenSplitIterDataset(tokens, length_struct={"row": data.sequence_length + 1})
    rows = streams.ExactState(packed).map(functools.partial(_shift, domain_index=index, pad_id=tokenizer.pad_id))
    return rows.random_map(objectives.prefix_row, seed=seed) if data.objective == "prefix_lm" else rows


def _conversation_encoder(prepared: Prepared, data: DataConfig) -> Callable[[str], list[Batch]]:
    """Function from a document to its examples."""
    examples = preferences.example if data.objective == "preferences" else chat.examples
    return functools.partial(examples, length=data.sequence_length, tokenizer=prepared.tokenizer, dataset=data.dataset)


def _refuse_no_examples(prepared: Prepared, data: DataConfig) -> None:
    """Refuse a domain without an example, since packing its first row would never end. Raises ConfigError."""
    rng = np.random.default_rng(0)
    for domain in prepared.domains if data.input_length or data.conversations else ():
        if data.input_length:
            found = (objectives.examples(text, rng, data, prepared.tokenizer) for text in prepared.train[domain])
        else:
            found = map(_conversation_encoder(prepared, data), prepared.train[domain])
        if not any(found):
            raise ConfigError(_no_example(data, domain, "training"))


def _no_example(data: DataConfig, domain: str, split: str) -> str:
    answer = " with an answer of the role assistant" if data.conversations else ""
    return (
        f"data.sequence_length={data.sequence_length}: no document of the {split} split of {domain!r} has an example "
        f"that fits{answer}"
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
    if config.data.whole_examples:
        return {}
    epochs, read = {}, config.train.batch_size * (config.data.sequence_length + 1)  # a row is cut from T + 1 tokens
    for domain, share in row_shares(config.data, prepared.domains).items():
        documents = prepared.train[domain]
        count = min(len(documents), max(EPOCH_SAMPLE // len(prepared.domains), 1))
        sample = [documents[int(i)] for i in np.linspace(0, len(documents) - 1, count)]
        tokens = np.mean([len(_tokenise(text, prepared.tokenizer)["row"]) for text in sample]) * len(documents)
        epochs[domain] = float(read * share / tokens)
    return epochs


def describe_sizes(prepared: Prepared, data: DataConfig) -> Iterator[str]:
    """Lines on the size of the data, and on what is left out of it (:mod:`moe.data.sizes`)."""
    rng = np.random.default_rng(0)

    def count(text: str) -> tuple[int, int]:
        if not data.whole_examples:
            size = len(_tokenise(text, prepared.tokenizer)["row"])
            return size, size
        if data.input_length:
            found = objectives.examples(text, rng, data, prepared.tokenizer)
            lengths = [
                (len(example["encoder"]) + len(example["decoder"]), len(example["decoder"])) for example in found
            ]
        else:
            read = prepared.reader.examples if prepared.reader is not None else _conversation_encoder(prepared, data)
            lengths = [(len(example["tokens"]), int((example["targets"] >= 0).sum())) for example in read(text)]
        return sum(tokens for tokens, _ in lengths), sum(targets for _, targets in lengths)

    train = [prepared.train[domain] for domain in prepared.domains]
    heldout = [prepared.heldout[domain] for domain in prepared.domains]
    return sizes.describe(data, train, heldout, count)


# --- Held-out rows ---------------------------------------------------------------------------------------------------
def _stretch(prepared: Prepared, data: DataConfig, domain: str, length: int) -> list[Batch]:
    """Return up to `length` rows from the start of a held-out split; the row in which the split ends is padded."""
    if domain not in prepared.domains:
        raise ConfigError(f"no domain {domain!r}; allowed are {list(prepared.domains)}")
    documents = grain.MapDataset.source(prepared.heldout[domain])
    rows = list(itertools.islice(_rows(documents, prepared, data, domain, seed=0), length))
    # If the first row ends in padding, the split has no more tokens than this row. Examples may be shorter than a row.
    if not rows and data.whole_examples:
        raise ConfigError(_no_example(data, domain, "held-out"))
    if not rows or (rows[0]["segment_ids"][-1] == 0 and not data.whole_examples):
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
    rows = [rows[index] for index in chosen]
    return [preferences.without_rejected(row) for row in rows] if data.objective == "preferences" else rows


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
        tokenizer, rng = prepared.tokenizer, np.random.default_rng(0)
        size = tokenizer.vocab_size
        if data.objective == "span_corruption":
            size = max(size, int(sentinel_ids(tokenizer).max()) + 1)
        elif prepared.reader is not None:  # a model may have sampled ids that its tokenizer does not use
            size = prepared.reader.model.vocab_size
        counts, read = np.zeros(size, np.int64), 0
        for text in prepared.train[domain]:
            for ids in _targets(text, prepared, data, rng):
                counts += np.bincount(ids, minlength=len(counts))
                read += len(ids)
            if read >= UNIGRAM_TOKENS:
                break
        prepared._unigram_counts[domain] = counts
    return prepared._unigram_counts[domain]


def _targets(text: str, prepared: Prepared, data: DataConfig, rng: np.random.Generator) -> list[np.ndarray]:
    """Return the possible targets of a document, by example."""
    tokenizer = prepared.tokenizer
    if data.input_length:
        return [example["decoder"] for example in objectives.examples(text, rng, data, tokenizer)]
    if data.conversations:
        examples = chat.examples(text, data.sequence_length, tokenizer, data.dataset)
    elif prepared.reader is not None:
        examples = prepared.reader.examples(text)
    else:
        return [_tokenise(text, tokenizer)["row"][int(tokenizer.bos_id >= 0) :]]  # bos is no target
    return [example["targets"][example["targets"] >= 0] for example in examples]
