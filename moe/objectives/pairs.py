"""Pairs: a target text from a source text, as in translation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from moe.config import ConfigError, DataConfig
from moe.data.documents import PAIR
from moe.data.tokenizer import Tokenizer
from moe.objectives.encoder_decoder import EncoderDecoder


class Pairs(EncoderDecoder):
    """Documents with a source, which the encoder reads, and a target."""

    def pairs(
        self, text: str, rng: np.random.Generator, data: DataConfig, tokenizer: Tokenizer
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The one pair of a document. Raises ConfigError for a plain text."""
        del rng
        source, found, target = text.partition(PAIR)
        if not found:
            raise ConfigError(
                f"data.objective='pairs': needs documents with source and target, and {data.dataset!r} has texts; "
                "docs/data.md says how to write pairs"
            )
        yield tokenizer.encode(source), tokenizer.encode(target)

    def show(self, prompt: Any, written: np.ndarray, tokenizer: Tokenizer) -> str:
        """The source, the target that was written, and the document's."""
        return f"{super().show(prompt, written, tokenizer)} (reference: {tokenizer.decode(prompt['decoder'])})"
