"""Whole documents as rows, where every token keeps its place in the text.

In: texts and a tokenizer. Out: batches for :class:`moe.analysis.record.Recorder`, with marks beside the tokens.

Letters: B batch, T sequence, m tokens of one document.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from moe.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and its tokens.

    Attributes:
        text: the source.
        tokens: [m] int32: bos if the tokenizer has one, the text's, eos.
        spans: [m,2] int32, first and behind-last byte of the UTF-8 text that a token stands for; empty for bos and eos.
    """

    text: str
    tokens: np.ndarray
    spans: np.ndarray


def read_document(text: str, tokenizer: Tokenizer) -> Document | None:
    """Tokens and their places; None if the tokenizer does not give the text back byte for byte.

    A token that is one byte of a character has a span of that byte. A tokenizer that puts a space before every text
    (Mixtral's) has its first token begin at 0 all the same.
    """
    ids = tokenizer.encode(text)
    ends = np.cumsum(tokenizer.token_bytes[ids])
    size = len(text.encode())
    surplus = int(ends[-1]) - size if len(ids) else -1
    if surplus not in (0, 1):  # 1: the space before the text
        return None
    ends = ends - surplus
    spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
    begin = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    return Document(
        text,
        np.concatenate([begin, ids, [tokenizer.eos_id]]).astype(np.int32),
        np.concatenate([np.zeros((len(begin), 2)), spans, [[size, size]]]).astype(np.int32),
    )


def document_batches(
    documents: Sequence[Document],
    marks: dict[str, Sequence[np.ndarray]],
    sequence_length: int,
    batch_size: int,
    keep: int = 0,
) -> list[dict[str, np.ndarray]]:
    """Documents end to end, cut into rows of T tokens; the last batch is padded.

    Args:
        documents: in order.
        marks: name → [m] integers for each document.
        sequence_length: T.
        batch_size: B.
        keep: evenly spaced rows, of all; 0: every one.

    Returns:
        batches of [B,T] int32: tokens, segment_ids (1, 2, … within the row; 0 = padding), positions (from 0 in every
        segment), document (its number), and the marks; these are −1 in padding.
    """
    numbers = [np.full(len(d.tokens), i) for i, d in enumerate(documents)]
    values = {"tokens": [d.tokens for d in documents], "document": numbers, **marks}
    # documents of [m] → [rows·T] → [rows,T] → [B,T] each
    flat = {name: np.concatenate(list(parts)).astype(np.int32) for name, parts in values.items()}
    rows = -(-len(flat["tokens"]) // sequence_length)
    kept = np.linspace(0, rows - 1, min(keep or rows, rows)).astype(int)
    empty = -len(kept) % batch_size

    def cut(name: str, values: np.ndarray) -> np.ndarray:
        padding = 0 if name == "tokens" else -1
        values = np.pad(values, (0, rows * sequence_length - len(values)), constant_values=padding)
        chosen = values.reshape(rows, sequence_length)[kept]
        return np.pad(chosen, ((0, empty), (0, 0)), constant_values=padding)

    filled = {name: cut(name, values) for name, values in flat.items()}
    document = filled["document"]
    begins = np.ones(document.shape, bool)
    begins[:, 1:] = document[:, 1:] != document[:, :-1]
    where = np.broadcast_to(np.arange(sequence_length), document.shape)
    filled["segment_ids"] = np.where(document >= 0, np.cumsum(begins, axis=1), 0).astype(np.int32)
    filled["positions"] = (where - np.maximum.accumulate(np.where(begins, where, 0), axis=1)).astype(np.int32)
    return [
        {name: x[start : start + batch_size] for name, x in filled.items()}
        for start in range(0, len(document), batch_size)
    ]


def first_documents(texts: Iterable[str], tokenizer: Tokenizer, max_tokens: int) -> list[Document]:
    """The first documents up to that many tokens, at least one; those that do not come back exactly are left out.

    Args:
        texts: in order.
        tokenizer: of the model.
        max_tokens: of all together; no further document is read once there are as many.
    """
    found, size = [], 0
    for text in texts:
        document = read_document(text, tokenizer)
        if document is not None:
            found.append(document)
            size += len(document.tokens)
        if size >= max_tokens:
            break
    return found
