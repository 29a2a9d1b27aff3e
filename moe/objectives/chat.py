"""Conversations: answers of the role assistant, from what is before them.

A row holds whole conversations and padding, with targets only in answers (:mod:`moe.data.chat`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from moe.config import Config, DataConfig
from moe.config.objectives import Ability, Arrays
from moe.data import chat
from moe.data.tokenizer import Tokenizer
from moe.models.sampling import Sampling
from moe.objectives.text import NextToken


class Chat(NextToken):
    """Answers in conversations that the tokenizer's chat template renders."""

    abilities: ClassVar[frozenset[Ability]] = frozenset({"pipeline", "prediction"})
    conversations: ClassVar[bool] = True
    answers: ClassVar[str] = " with an answer of the role assistant"

    def lengths(self, data: DataConfig) -> dict[str, int]:
        """T tokens and targets."""
        return {"tokens": data.sequence_length, "targets": data.sequence_length}

    def examples(self, text: str, rng: np.random.Generator, data: DataConfig, tokenizer: Tokenizer) -> list[Arrays]:
        """Examples of a conversation (:func:`examples`)."""
        del rng
        return examples(text, data.sequence_length, tokenizer, data.dataset)

    def prompt(self, text: str, data: DataConfig, tokenizer: Tokenizer) -> Any:
        """A conversation up to its first answer, and the generation prompt of that answer."""
        messages, tools = chat.read_conversation(text, data.dataset)
        answers = [i for i, message in enumerate(messages) if i and message.get("role") == "assistant"]
        return chat.prompt_ids(tokenizer, messages[: answers[0]] if answers else messages, tools)

    def sampling(self, config: Config, tokenizer: Tokenizer) -> Sampling:
        """Draws that end with the answer."""
        return dataclasses.replace(super().sampling(config, tokenizer), stop_tokens=chat.stop_ids(tokenizer))


def examples(text: str, length: int, tokenizer: Tokenizer, dataset: str) -> list[Arrays]:
    """``tokens`` and ``targets`` [n], n ≤ length, of a document; targets are -1 outside answers.

    A longer conversation is cut at ``length`` tokens. Texts without a target are left out.

    Raises:
        ConfigError: see :func:`moe.data.chat.encoded_answers` and :func:`moe.data.chat.read_conversation`.
    """
    messages, tools = chat.read_conversation(text, dataset)
    encoded = chat.encoded_answers(messages, tokenizer, tools)
    cut = [{key: values[:length] for key, values in one.items()} for one in encoded]
    return [one for one in cut if (one["targets"] >= 0).any()]
