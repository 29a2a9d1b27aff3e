"""Objectives of encoder-decoders: examples of an input and a target.

An example is ``input eos`` for the encoder and ``target eos`` for the decoder, whose tokens are the target shifted
right. An example longer than a row is cut to the row's length and then has no eos.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from moe.config import Config, DataConfig
from moe.config.objectives import Ability, Arrays, Models
from moe.data.tokenizer import Tokenizer
from moe.models.sampling import Sampling
from moe.objectives.text import NextToken


class EncoderDecoder(NextToken):
    """Base of objectives on pairs of input and target.

    An example has ``encoder`` [n] and ``decoder`` [m], int32; a row has, besides the arrays of every model,
    ``encoder_tokens``, ``encoder_segment_ids`` and ``encoder_positions`` [U]. Segment i is the input of segment i
    of the decoder.
    """

    models: ClassVar[Models] = "encoder-decoder"
    abilities: ClassVar[frozenset[Ability]] = frozenset({"prediction"})
    draws: ClassVar[bool] = True

    def pairs(
        self, text: str, rng: np.random.Generator, data: DataConfig, tokenizer: Tokenizer
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Inputs and targets of a document, without eos."""
        raise NotImplementedError

    def lengths(self, data: DataConfig) -> dict[str, int]:
        """U of the input and T of the target."""
        return {"encoder": data.input_length, "decoder": data.sequence_length}

    def examples(self, text: str, rng: np.random.Generator, data: DataConfig, tokenizer: Tokenizer) -> list[Arrays]:
        """Inputs and targets with eos, cut to their rows."""
        ends = np.asarray([tokenizer.eos_id], np.int32)
        lengths = self.lengths(data)
        return [
            {
                part: np.concatenate([ids, ends]).astype(np.int32)[: lengths[part]]
                for part, ids in zip(lengths, pair, strict=True)
            }
            for pair in self.pairs(text, rng, data, tokenizer)
        ]

    def row(self, packed: Arrays, pad_id: int) -> Arrays:
        """The arrays of a batch, padding included."""
        known, filled = packed["decoder_segment_ids"] > 0, packed["encoder_segment_ids"] > 0
        tokens = shift_right(packed["decoder"], packed["decoder_positions"], pad_id)
        row = {
            "tokens": np.where(known, tokens, pad_id),
            "targets": np.where(known, packed["decoder"], -1),
            "segment_ids": packed["decoder_segment_ids"],
            "positions": packed["decoder_positions"],
            "encoder_tokens": np.where(filled, packed["encoder"], pad_id),
            "encoder_segment_ids": packed["encoder_segment_ids"],
            "encoder_positions": packed["encoder_positions"],
        }
        return {name: np.asarray(values, np.int32) for name, values in row.items()}

    def tokens(self, example: Arrays) -> int:
        """Tokens of input and target."""
        return len(example["encoder"]) + len(example["decoder"])

    def targets(self, example: Arrays) -> np.ndarray:
        """The target."""
        return example["decoder"]

    def prompt(self, text: str, data: DataConfig, tokenizer: Tokenizer) -> Any:
        """The first example of a document; None if it has none."""
        return next(iter(self.examples(text, np.random.default_rng(0), data, tokenizer)), None)

    def prompt_ids(self, prompt: Any) -> np.ndarray:
        """The input."""
        return prompt["encoder"]

    def sampling(self, config: Config, tokenizer: Tokenizer) -> Sampling:
        """The likeliest target."""
        del config
        return Sampling(temperature=0, stop_tokens=(tokenizer.eos_id,), start_token=tokenizer.pad_id)

    def title(self) -> str:
        """A target."""
        return "a target"

    def show(self, prompt: Any, written: np.ndarray, tokenizer: Tokenizer) -> str:
        """The input, and the target that was written."""
        return f"{tokenizer.decode(prompt['encoder'])} >>> {tokenizer.decode(written)}"


def shift_right(targets: np.ndarray, positions: np.ndarray, start_id: int) -> np.ndarray:
    """Return the decoder's tokens [T]: the start token, then the targets but the last, in each segment.

    The start token is the tokenizer's padding, as in T5.
    """
    return np.where(positions == 0, start_id, np.roll(targets, 1)).astype(np.int32)


def pieces(ids: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """Consecutive parts [length] of a document; the last may be shorter."""
    return (ids[start : start + length] for start in range(0, len(ids), length))
