"""Hugging Face's ``tokenizer.json``, read by their `tokenizers` library, behind the interface of a SentencePiece model;
and the one place that finds a tokenizer: beside a checkpoint, by file, or in a package.

In: a file or a workdir. Out: a :class:`moe.data.tokenizer.Tokenizer`.
"""

from __future__ import annotations

import functools
import json
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import tokenizers
from etils import epath

from moe.config import ConfigError
from moe.data import corpora
from moe.data.tokenizer import Tokenizer

#: Carries Mixtral's own SentencePiece model; only that file of it is read.
MISTRAL_COMMON = corpora.Wheel(
    "mistral-common", "1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af"
)
_MIXTRAL_MODEL = "mistral_common/data/tokenizer.model.v1"

SENTENCEPIECE_FILE, JSON_FILE, JSON_CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
#: How open tokenizers call the end and the beginning of a text, where no tokenizer_config.json says it.
_END_NAMES = ("</s>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "<|im_end|>", "<eos>")
_BEGIN_NAMES = ("<s>", "<｜begin▁of▁sentence｜>", "<bos>")
_SPACE = "\u2581"


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json``, with the ``tokenizer_config.json`` beside it if there is one.

    Texts are encoded without the special tokens that it would add; the pipeline adds its own bos and eos.
    """

    def __init__(self, model_bytes: bytes, settings: bytes | None = None):
        """Parses both files.

        Raises:
          ConfigError: it is no tokenizer.json, or it has no end-of-text token.
        """
        self.model_bytes, self._settings = model_bytes, settings
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(model_bytes)
            named = json.loads(settings) if settings else {}
        except Exception as error:  # the library raises bare Exceptions
            raise ConfigError(f"data.tokenizer: not a {JSON_FILE}: {error}") from error
        self._eos = self._special(named.get("eos_token"), _END_NAMES)
        self._bos = self._special(named.get("bos_token"), () if "bos_token" in named else _BEGIN_NAMES)
        self._pad = self._special(named.get("pad_token"), ())
        if self._eos < 0:
            raise ConfigError(
                f"data.tokenizer: {JSON_FILE} has no end-of-text token; put eos_token in {JSON_CONFIG_FILE}"
            )

    def _special(self, token: str | dict[str, str] | None, names: Iterable[str]) -> int:
        if isinstance(token, dict):  # older files spell a token out with its options
            token = token.get("content")
        found = (self._tokenizer.token_to_id(name) for name in ([token] if token else names))
        return next((i for i in found if i is not None), -1)

    @property
    def files(self) -> dict[str, bytes]:
        """Name → content of what a workdir keeps of it."""
        return {JSON_FILE: self.model_bytes} | ({JSON_CONFIG_FILE: self._settings} if self._settings else {})

    @property
    def vocab_size(self) -> int:
        """V, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def pad_id(self) -> int:
        """0 where it has none."""
        return max(self._pad, 0)

    @property
    def bos_id(self) -> int:
        """-1 where it has none."""
        return self._bos

    @property
    def eos_id(self) -> int:
        """Ends every document."""
        return self._eos

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids [n] int32 of the text alone."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Returns the text of ids [n]; special tokens give no text."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """[V] int32: UTF-8 bytes of text that each id stands for; 0 for special tokens."""
        source = json.loads(self.model_bytes)
        special = {token["id"] for token in source.get("added_tokens", []) if token["special"]}
        added = {token["id"] for token in source.get("added_tokens", [])}
        # Byte-level tokens are written in an alphabet of one character a byte; others as text, spaces as "▁".
        byte_level = "ByteLevel" in json.dumps(source.get("decoder"))
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if i in special:
                continue
            if byte_level and i not in added:
                sizes[i] = len(token)
            elif len(token) == 6 and token.startswith("<0x"):
                sizes[i] = 1
            else:
                sizes[i] = len(token.replace(_SPACE, " ").encode())
        return sizes


def read_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Of a SentencePiece model or a ``tokenizer.json``, local or in a bucket.

    Raises:
      ConfigError: there is no such file, or it is neither.
    """
    file = epath.Path(path).expanduser()
    if file.suffix != ".json":
        return Tokenizer.from_file(file)
    if not file.is_file():
        raise ConfigError(f"data.tokenizer={os.fspath(path)!r}: no such file")
    settings = file.parent / JSON_CONFIG_FILE
    return JsonTokenizer(file.read_bytes(), settings.read_bytes() if settings.is_file() else None)


def find_tokenizer(workdir: str | os.PathLike[str]) -> Tokenizer:
    """The one that a run or an import left beside its checkpoints.

    Raises:
      ConfigError: it left none.
    """
    for name in (SENTENCEPIECE_FILE, JSON_FILE):
        if (epath.Path(workdir) / name).is_file():
            return read_tokenizer(epath.Path(workdir) / name)
    raise ConfigError(f"{os.fspath(workdir)}: holds neither {SENTENCEPIECE_FILE} nor {JSON_FILE}; put one there")


def named_tokenizer(name: str, directory: epath.Path, progress: Callable[[str], None]) -> Tokenizer:
    """That of ``data.tokenizer``: "mixtral" is Mixtral's own 32,000 tokens, fetched once; all else is a file."""
    if name != "mixtral":
        return read_tokenizer(name)
    wheel = corpora.fetch_wheel(MISTRAL_COMMON, Path(directory) / "downloads", progress)
    with zipfile.ZipFile(wheel) as archive:
        return Tokenizer.from_bytes(archive.read(_MIXTRAL_MODEL))
