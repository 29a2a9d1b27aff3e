"""SentencePiece tokenizers: text to int32 ids and back, and the bytes of text per id (for bits per byte).

A model is a protocol buffer that SentencePiece parses; loading one executes no code.
"""

from __future__ import annotations

import functools
import io
import os
import re
from collections.abc import Iterable

import numpy as np
import sentencepiece
from etils import epath

from moe.config import ConfigError
from moe.system.sealed_folder import read_checked

# Part of the file name of cached tokenizers: raise it when train_tokenizer changes.
TRAINER_VERSION = 1
_SPACE = "\u2581"  # SentencePiece's symbol for a space


class Tokenizer:
    """A SentencePiece model.

    For models of `train_tokenizer`, ``decode(encode(text)) == text`` and
    ``token_bytes[encode(text)].sum() == len(text.encode())`` hold for every text. A model that puts a space before
    each text, such as Mixtral's, counts one byte more per document; one without byte fallback counts 0 bytes for
    unknown characters.
    """

    def __init__(self, model_bytes: bytes, source: str = "data.tokenizer"):
        """Parse a serialized model.

        Args:
          model_bytes: the model.
          source: field or file of the model, for messages.

        Raises:
          ConfigError: the bytes are not a SentencePiece model, or it has no end-of-text token.
        """
        self.model_bytes = model_bytes
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model_bytes)
        except RuntimeError as error:
            raise ConfigError(f"{source}: not a SentencePiece model") from error
        if self._processor.eos_id() < 0:
            raise ConfigError(f"{source}: the SentencePiece model has no end-of-text token")

    @classmethod
    def from_bytes(cls, model_bytes: bytes) -> Tokenizer:
        """Parse a serialized model."""
        return cls(model_bytes)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a model from a local or bucket path; ConfigError if there is no such file."""
        name = f"data.tokenizer={os.fspath(path)!r}"
        return cls(read_checked(epath.Path(path).expanduser(), name), name)

    @property
    def files(self) -> dict[str, bytes]:
        """File name → content, to store in a workdir."""
        return {"tokenizer.model": self.model_bytes}

    @property
    def vocab_size(self) -> int:
        """Vocabulary size V."""
        return self._processor.vocab_size()

    @property
    def pad_id(self) -> int:
        """Id of padding; 0 if the model has none. ``segment_ids`` mark padding, not this id."""
        return max(self._processor.pad_id(), 0)

    @property
    def bos_id(self) -> int:
        """Id at the start of a document; -1 if the model has none, and documents start without it."""
        return self._processor.bos_id()

    @property
    def eos_id(self) -> int:
        """Id at the end of every document."""
        return self._processor.eos_id()

    def encode(self, text: str) -> np.ndarray:
        """Return the ids [n] int32 of the text, without bos and eos."""
        if _SPACE not in text or not self._byte_ids:
            return np.asarray(self._processor.encode(text), np.int32)
        # SentencePiece would read this character as a space, so it is encoded as bytes.
        ids: list[int] = []
        for number, part in enumerate(text.split(_SPACE)):
            ids += [self._byte_ids[byte] for byte in _SPACE.encode()] if number else []
            ids += self._processor.encode(part)
        return np.asarray(ids, np.int32)

    def encode_with_special(self, text: str, *, added: bool = False) -> np.ndarray:
        """Return the ids [n] int32 of the text, in which names of control tokens such as ``<s>`` are these tokens, as
        the transformers library reads a text; if ``added`` after bos, as its LlamaTokenizer begins texts."""
        ids = [np.asarray([self.bos_id] * (added and self.bos_id >= 0), np.int32)]
        if not self._controls:
            return np.concatenate([*ids, self.encode(text)], dtype=np.int32)
        parts = re.split(f"({'|'.join(map(re.escape, self._controls))})", text)
        ids += [[self._controls[part]] if part in self._controls else self.encode(part) for part in parts if part]
        return np.concatenate(ids, dtype=np.int32)

    @functools.cached_property
    def _controls(self) -> dict[str, int]:
        """Name → id of each control token."""
        ids = (i for i in range(self.vocab_size) if self._processor.is_control(i))
        return {self._processor.id_to_piece(i): i for i in ids}

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of ids [n]; control tokens, and ids beyond the vocabulary, are skipped."""
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size])

    def piece_id(self, piece: str) -> int:
        """Id of a piece; -1 if there is none."""
        number = self._processor.piece_to_id(piece)
        return number if self._processor.id_to_piece(number) == piece else -1

    @functools.cached_property
    def _byte_ids(self) -> dict[int, int]:
        """Id of each byte; empty for a model without them, or one that would put a space before each part of a text."""
        if self._processor.encode("a", out_type=str)[0].startswith(_SPACE):
            return {}
        pieces = (f"<0x{byte:02X}>" for byte in range(256))
        ids = {byte: self._processor.piece_to_id(piece) for byte, piece in enumerate(pieces)}
        return ids if all(self._processor.is_byte(i) for i in ids.values()) else {}

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each id's text, [V] int32; 0 for control and unknown tokens."""
        processor, sizes = self._processor, np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if processor.is_byte(i):
                sizes[i] = 1
            elif not (processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i)):
                sizes[i] = len(processor.id_to_piece(i).replace(_SPACE, " ").encode())
        return sizes


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-pair encoding with pad 0, bos 1, eos 2, unknown 3 and the 256 bytes; deterministic.

    Text is not normalised and no space is added or removed, so decoding returns the text exactly. Runs of spaces may
    merge, so that indentation is one token.

    Raises:
      ConfigError: `vocab_size` is too small for the bytes and the characters, or too large for the texts.
    """
    # A sentence is a line, which bounds its length; "\n" is a token of its own, so no merge crosses it.
    lines = [line for text in texts for line in text.split("\n") if line and _SPACE not in line]
    error = None
    # Characters outside the coverage become bytes. A smaller coverage is tried where the text has more characters than
    # the vocabulary has ids.
    for coverage in (0.9995, 0.999, 0.995, 0.98):
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                character_coverage=coverage,
                pad_id=0,
                bos_id=1,
                eos_id=2,
                unk_id=3,
                byte_fallback=True,
                split_digits=False,  # splitting would cost one token for the space and one per digit
                allow_whitespace_only_pieces=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                user_defined_symbols=["\n"],
                max_sentence_length=1 << 20,
                num_threads=os.cpu_count() or 1,
                minloglevel=2,  # errors only: the trainer writes pages to stderr
            )
            return Tokenizer(model.getvalue())
        except RuntimeError as failure:
            error = failure
    reason = str(error).strip().splitlines()[-1] if str(error).strip() else "no reason given"
    raise ConfigError(f"model.vocab_size={vocab_size}: no tokenizer of that size from this text ({reason})") from error
