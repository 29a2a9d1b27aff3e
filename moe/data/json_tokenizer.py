"""Hugging Face's ``tokenizer.json`` behind the interface of :class:`moe.data.tokenizer.Tokenizer`."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import tokenizers
from tokenizers import pre_tokenizers

from moe.config import ConfigError
from moe.data.tokenizer import Tokenizer

JSON_FILE = "tokenizer.json"
JSON_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
#: Usual names of the end and the beginning of a text, tried where no tokenizer_config.json gives them.
_END_NAMES = ("</s>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "<|im_end|>", "<eos>")
_BEGIN_NAMES = ("<s>", "<｜begin▁of▁sentence｜>", "<bos>")
#: Fields of a tokenizer_config.json that name special tokens, which chat templates may use.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_VOCAB = 1 << 24
_SPACE = "\u2581"
#: Most characters that normalizer, pre-tokenizer and decoder together may produce from one.
_MAX_GROWTH = 1024
#: Number of tokens whose text is encoded again, to check that it gives ids.
_PROBED = 256
#: Most characters that a step makes of one: NFKC (Unicode's own bound), a table like T5's, one for each UTF-8 byte.
_GROWTH = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Nmt": 1, "Precompiled": 18, "ByteLevel": 4}


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json``, with an optional ``tokenizer_config.json``.

    Encoding adds no special tokens (the pipeline adds bos and eos) and treats text that looks like one as text. It
    neither truncates nor pads, whatever the file says.
    """

    def __init__(
        self,
        model_bytes: bytes,
        settings: bytes | None = None,
        source: str = "data.tokenizer",
        template: bytes | None = None,
    ):
        """Parse both files.

        Args:
          model_bytes: content of the tokenizer.json.
          settings: content of the tokenizer_config.json.
          source: field or file of the tokenizer, for messages.
          template: content of a chat_template.jinja, which precedes the one in the settings.

        Raises:
          ConfigError: the file is not a tokenizer.json, has no end-of-text token, or makes special tokens of text.
        """
        self.model_bytes = model_bytes
        self._settings = settings
        self._template = template
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(model_bytes)
            named = json.loads(settings) if settings else {}
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises plain Exceptions, and its panics derive from BaseException
            raise ConfigError(f"{source}: not a {JSON_FILE} with a valid {JSON_CONFIG_FILE}: {error}") from error
        if not isinstance(named, dict):
            raise ConfigError(f"{source}: {JSON_CONFIG_FILE} must be an object")
        self.source, self._named = source, named
        if not self._tokenizer.get_vocab_size(with_added_tokens=True):
            raise ConfigError(f"{source}: {JSON_FILE} has an empty vocabulary")
        if self.vocab_size > _MAX_VOCAB:
            raise ConfigError(f"{source}: has an id of {self.vocab_size - 1}; ids must be below {_MAX_VOCAB}")
        self._eos = self._special(named, "eos_token", _END_NAMES)
        self._bos = self._special(named, "bos_token", () if "bos_token" in named else _BEGIN_NAMES)
        self._pad = self._special(named, "pad_token", ())
        if self._eos < 0:
            raise ConfigError(f"{source}: {JSON_FILE} has no end-of-text token; put eos_token in {JSON_CONFIG_FILE}")
        self._read_text_as_text()
        self._check_ids()

    def _check_ids(self) -> None:
        """Refuse what makes ids ambiguous, random or empty. Raises ConfigError."""
        where, parts = f"{self.source}: {JSON_FILE}", json.loads(self.model_bytes)
        if parts["model"].get("dropout"):
            raise ConfigError(f"{where} drops merges at random (model.dropout={parts['model']['dropout']}); remove it")
        ids = self._tokenizer.get_vocab(with_added_tokens=False).values()
        if len(set(ids)) < self._tokenizer.get_vocab_size(with_added_tokens=False):
            raise ConfigError(f"{where} has a token twice, or two of one id")
        for token in parts.get("added_tokens", []):
            if (found := self._tokenizer.token_to_id(token["content"])) != token["id"]:
                name = token["content"][:40]
                raise ConfigError(f"{where} has the added token {name!r} with id {token['id']}, but its id is {found}")
        texts = [self.decode([number]) for number in sorted(set(ids) - self.special_ids)[:_PROBED]]
        if sum(not self.encode(text).size for text in texts) > len(texts) / 2:
            raise ConfigError(f"{where} gives no ids for most text")

    def _read_text_as_text(self) -> None:
        """Make encoding of a document depend on its text alone, and special tokens unreachable from it."""
        parts = json.loads(self.model_bytes)
        growth = math.prod(_growth(parts.get(part)) for part in ("normalizer", "pre_tokenizer", "decoder"))
        if growth > _MAX_GROWTH:
            raise ConfigError(
                f"{self.source}: steps of {JSON_FILE} may make {growth:.3g} characters of one; at most {_MAX_GROWTH}"
            )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # as text
        special = {token["content"] for token in parts.get("added_tokens", []) if token["special"]}
        special |= {self._tokenizer.id_to_token(i) for i in (self._eos, self._bos, self._pad) if i >= 0}
        special -= {self._unknown(parts["model"])}
        # A model whose own pieces include special tokens, such as T5's, still finds them in text unless it is split.
        if reached := [name for name in sorted(special) if self._reaches(name)]:
            first = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in reached)
            steps = [step for step in (self._tokenizer.pre_tokenizer,) if step is not None]
            split = pre_tokenizers.Split(tokenizers.Regex(first), "isolated")
            self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, split])
        for name in reached:
            if self._reaches(name):
                raise ConfigError(f"{self.source}: text {name!r} in a document becomes the special token {name!r}")

    @staticmethod
    def _unknown(model: dict[str, Any]) -> str | None:
        """The token that stands for text outside the vocabulary."""
        if model.get("unk_id") is not None:
            return model["vocab"][model["unk_id"]][0]
        return model.get("unk_token")

    def _reaches(self, name: str) -> bool:
        """True if encoding text that contains this name gives the special token of that name."""
        number = self._tokenizer.token_to_id(name)
        return any(number in self.encode(text) for text in (name, f"a{name}b", f" {name} ", f"{name}{name}"))

    def _special(self, named: dict[str, Any], field: str, names: Iterable[str]) -> int:
        token = named.get(field)
        if isinstance(token, dict):  # older files give a token with its options
            token = token.get("content")
        if not (token is None or isinstance(token, str)):
            raise ConfigError(f"{self.source}: {field} in {JSON_CONFIG_FILE} must be a string, not {token!r}")
        found = (self._tokenizer.token_to_id(name) for name in ([token] if token else names))
        return next((i for i in found if i is not None), -1)

    @property
    def files(self) -> dict[str, bytes]:
        """File name → content, to store in a workdir."""
        files = {JSON_FILE: self.model_bytes, JSON_CONFIG_FILE: self._settings, TEMPLATE_FILE: self._template}
        return {name: content for name, content in files.items() if content}

    def with_template(self, template: bytes) -> JsonTokenizer:
        """The same tokenizer with another chat template."""
        return JsonTokenizer(self.model_bytes, self._settings, self.source, template)

    @property
    def chat_template(self) -> str | None:
        """The chat template, or the one called "default" of several; None if there is none.

        Raises:
          ConfigError: it is not text.
        """
        found = self._template if self._template is not None else self._named.get("chat_template")
        if isinstance(found, list):
            named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
            found = named[0].get("template") if len(named) == 1 else None
        try:
            found = found.decode() if isinstance(found, bytes) else found
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.source}: {TEMPLATE_FILE} is not UTF-8 text") from error
        if not (found is None or isinstance(found, str)):
            raise ConfigError(f"{self.source}: chat_template in {JSON_CONFIG_FILE} must be a string")
        return found

    @property
    def special_tokens(self) -> dict[str, str]:
        """Name → special token of the settings, such as eos_token → </s>."""
        named = {name: self._named.get(name) for name in _SPECIAL_TOKENS}
        texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
        return {name: token for name, token in texts.items() if isinstance(token, str)}

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens."""
        added = json.loads(self.model_bytes).get("added_tokens", [])
        return frozenset(token["id"] for token in added if token["special"])

    @property
    def vocab_size(self) -> int:
        """Vocabulary size V, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def pad_id(self) -> int:
        """Id of padding; 0 if there is none."""
        return max(self._pad, 0)

    @property
    def bos_id(self) -> int:
        """Id of the beginning of a text; -1 if there is none."""
        return self._bos

    @property
    def eos_id(self) -> int:
        """Id of the end of a text."""
        return self._eos

    def encode(self, text: str) -> np.ndarray:
        """Return the ids [n] int32 of the text, without special tokens."""
        return np.asarray(self._encode(self._tokenizer, text).ids, np.int32)

    def encode_rendered(self, text: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Return the ids [n] int32 of a text from a chat template, with special tokens recognised, and the first and
        last (exclusive) character of each."""
        encoded = self._encode(self._with_special, text)
        return np.asarray(encoded.ids, np.int32), encoded.offsets

    def encode_with_special(self, text: str, *, added: bool = False) -> np.ndarray:
        """Return the ids [n] int32 of the text with special tokens recognised, as the transformers library reads it; if
        ``added`` with those that the file's post-processor puts around it. ``add_bos_token`` and ``add_eos_token`` of
        the settings count for nothing there, and a model may name a bos and be trained without it."""
        return np.asarray(self._encode(self._with_special, text, special_tokens=added).ids, np.int32)

    @functools.cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        """The tokenizer as the file has it, which finds special tokens in text."""
        tokenizer = tokenizers.Tokenizer.from_buffer(self.model_bytes)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _encode(
        self, tokenizer: tokenizers.Tokenizer, text: str, *, special_tokens: bool = False
    ) -> tokenizers.Encoding:
        try:
            return tokenizer.encode(text, add_special_tokens=special_tokens)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # panics of the library derive from BaseException
            raise ConfigError(
                f"{self.source}: {JSON_FILE} fails on the text {text[:40]!r}: {' '.join(str(error).split())}"
            ) from error

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of ids [n]; special tokens are skipped."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def piece_id(self, piece: str) -> int:
        """Id of a piece; -1 if there is none."""
        number = self._tokenizer.token_to_id(piece)
        return -1 if number is None else number

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each id's text, [V] int32; 0 for special tokens. The mark of a word's end counts as the blank
        that it stands for, that of its continuation (WordPiece's ``##``) as nothing."""
        source = json.loads(self.model_bytes)
        added = {token["id"] for token in source.get("added_tokens", [])}
        # Byte-level tokens have one character per byte; others are text with "▁" for spaces.
        byte_level = "ByteLevel" in json.dumps(source.get("decoder"))
        continuation, end = (source["model"].get(f) or "" for f in ("continuing_subword_prefix", "end_of_word_suffix"))
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if i in self.special_ids:
                continue
            if i not in added:
                token = token.removeprefix(continuation)
                token = f"{token.removesuffix(end)} " if end and token.endswith(end) else token
            if byte_level and i not in added:
                sizes[i] = len(token)
            elif len(token) == 6 and token.startswith("<0x"):
                sizes[i] = 1
            else:
                sizes[i] = len(token.replace(_SPACE, " ").encode())
        return sizes


def _growth(step: Any) -> float:
    """Upper bound on the number of characters that a step of a tokenizer.json produces from one."""
    if not isinstance(step, dict):
        return 1
    for parts in ("normalizers", "pretokenizers", "decoders"):
        if isinstance(step.get(parts), list):
            return math.prod(_growth(part) for part in step[parts])
    if step.get("type") == "Replace":
        pattern, content = step["pattern"], len(step["content"])
        return max(1, content / len(pattern["String"])) if pattern.get("String") else 1 + content
    return _GROWTH.get(str(step.get("type")), 1)
