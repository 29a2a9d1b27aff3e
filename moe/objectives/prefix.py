"""Prefix LM: the rest of a text from its beginning, which is seen in both directions (T5, Raffel et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from moe.config import Config, DataConfig
from moe.config.layer_kinds import require_ability
from moe.config.objectives import Ability, Arrays, Models, Objective
from moe.data.tokenizer import Tokenizer
from moe.objectives.encoder_decoder import EncoderDecoder, pieces
from moe.objectives.text import NextToken
from moe.training.batches import PREFIX_KEY


class PrefixLM(NextToken):
    """Texts that are divided at random; a decoder attends in both directions in the first part.

    A row has ``prefix`` [T], 1 in the first part of each segment.
    """

    models: ClassVar[Models] = "any"
    abilities: ClassVar[frozenset[Ability]] = frozenset({"pipeline", "prediction"})
    draws: ClassVar[bool] = True
    prefix: ClassVar[bool] = True

    def bound(self, data: DataConfig, config: Config | None = None) -> Objective:
        """The objective itself, or that of an encoder-decoder."""
        del config
        return EncoderPrefixLM(name=self.name) if data.input_length else self

    def check(self, config: Config) -> None:
        """Refuse token mixers that see no prefix."""
        require_ability(config.model, "prefix", "where data.objective is prefix_lm")

    def arrays(self, config: Config) -> dict[str, tuple[tuple[int, ...], Any]]:
        """The first parts."""
        return {PREFIX_KEY: ((config.data.sequence_length,), jnp.int32)}

    def divide(self, row: Arrays, rng: np.random.Generator) -> Arrays:
        """Divide each segment at random: the first part has no targets, except that its last token predicts the first
        one of the second part."""
        segments = row["segment_ids"]
        splits = rng.integers(1, np.maximum(np.bincount(segments), 2))[segments]
        prefix = (row["positions"] < splits) & (segments > 0)
        targets = np.where(row["positions"] >= splits - 1, row["targets"], -1)
        return {**row, "targets": targets.astype(np.int32), PREFIX_KEY: prefix.astype(np.int32)}


class EncoderPrefixLM(EncoderDecoder):
    """Texts that are divided at random; the encoder reads the first part."""

    models: ClassVar[Models] = "any"
    prefix: ClassVar[bool] = True

    def pairs(
        self, text: str, rng: np.random.Generator, data: DataConfig, tokenizer: Tokenizer
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Both parts of each piece."""
        # With eos, either part fits its row wherever the piece is divided.
        for piece in pieces(tokenizer.encode(text), min(data.input_length, data.sequence_length)):
            if len(piece) > 1:
                split = int(rng.integers(1, len(piece)))
                yield piece[:split], piece[split:]
