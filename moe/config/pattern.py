"""``model.pattern``: the token mixer of each layer, as words with repetition (Hugging Face's ``layer_types``)."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from typing import Literal, cast, get_args

from moe.system.fields import ConfigError

#: Attention to all keys, attention within the model's window, gated DeltaNet, and ``model.mixer``.
Word = Literal["attention", "sliding", "delta", "mixer"]

_WORDS = get_args(Word)
_MOST = 10_000  # layers of a model
_MOST_GROUPS = 100


@functools.cache
def parse(text: str) -> tuple[Word, ...]:
    """Words of a pattern such as ``(delta x 3 attention) x 12``, with all repetitions written out.

    Raises:
        ConfigError: the text is not a pattern, or has too many words.
    """
    if text.count("(") > _MOST_GROUPS:
        raise _error(text, f"has over {_MOST_GROUPS} groups")
    tokens = re.findall(r"[()]|x\s*\d+|[^\s(),]+", text)
    words, end = _sequence(text, tokens, 0)
    if end < len(tokens):
        raise _error(text, "has a ) without its (")
    return words


def _sequence(text: str, tokens: list[str], start: int) -> tuple[tuple[Word, ...], int]:
    """Words from one token to the end of its group, and where that is."""
    words: list[Word] = []
    last: tuple[Word, ...] = ()
    place = start
    while place < len(tokens) and tokens[place] != ")":
        token = tokens[place]
        if repeat := re.fullmatch(r"x\s*(\d+)", token):
            count = int(repeat[1][:6])
            if not last or count < 1 or len(words) + count * len(last) > _MOST:
                raise _error(text, f"{token!r} must follow a word or a group, and give 1 to {_MOST} layers")
            words += last * (count - 1)
            last = ()
        elif token == "(":
            last, place = _sequence(text, tokens, place + 1)
            if place == len(tokens):
                raise _error(text, "has a ( without its )")
            words += last
        elif token in _WORDS:
            last = (cast(Word, token),)
            words += last
        else:
            raise _error(text, f"{token!r} is none of {', '.join(_WORDS)}")
        place += 1
    return tuple(words), place


def _error(text: str, reason: str) -> ConfigError:
    example = "such as '(delta x 3 attention) x 12'"
    return ConfigError(f"model.pattern={text!r}: {reason}; must be words with repetition, {example}")


def write(words: Sequence[Word]) -> str:
    """The pattern of these layers: the shortest unit that they repeat, since a model repeats its pattern."""
    length = len(words)
    sizes = (size for size in range(1, length + 1) if length % size == 0)
    unit = next((words[:size] for size in sizes if list(words[:size]) * (length // size) == list(words)), words)
    runs = [(word, len(list(equal))) for word, equal in itertools.groupby(unit)]
    return " ".join(word if count == 1 else f"{word} x {count}" for word, count in runs)
