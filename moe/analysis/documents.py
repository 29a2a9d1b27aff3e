"""Whole documents as rows of tokens, with the byte span of every token and labels (marks) beside the tokens."""

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
        tokens: [m] int32: bos if the tokenizer has one, the text's tokens, eos.
        spans: [m,2] int32, byte range [start, end) of each token in the UTF-8 text; empty for bos and eos.
    """

    text: str
    tokens: np.ndarray
    spans: np.ndarray


def read_document(text: str, tokenizer: Tokenizer) -> Document | None:
    """Tokenise a text and locate its tokens; None if the tokens' bytes do not add up to the text.

    With a tokenizer that puts a space before every text (Mixtral's), the first token still begins at byte 0.
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
    """Concatenates documents and cuts them into rows of T tokens; the last batch is padded.

    Args:
        documents: the documents, in order.
        marks: name → [m] integers for each document.
        sequence_length: T.
        batch_size: B.
        keep: number of evenly spaced rows to keep; 0: all.

    Returns:
        batches of [B,T] int32: tokens, segment_ids (1, 2, … within the row; 0 = padding), positions (from 0 in every
        segment), document (its number), and the marks; document and marks are −1 in padding.
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
    """Read documents until they have `max_tokens` tokens in total; skips those that fail to tokenise.

    Args:
        texts: the texts, in order.
        tokenizer: the model's tokenizer.
        max_tokens: total number of tokens after which reading stops.
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
