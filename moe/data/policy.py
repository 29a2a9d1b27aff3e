"""Rows of rollouts for reinforcement learning (data.objective policy): completions with their advantages.

Each completion is one segment, with its prompt before it and targets only in the completion. Besides the arrays of
:mod:`moe.data.pipeline` a batch has:

    log_probs   [B,T] float32      log-probability of each target when it was sampled
    advantages  [B,T] float32      advantage of each target's completion
    experts     [B,T,L,K] int16    experts of each token in the MoE layers; with policy.replay and MoE layers
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe.config import ConfigError, ModelConfig, PolicyConfig, sparse_layers
from moe.data import chat, rollouts
from moe.data.engines import ABSENT, read_experts
from moe.data.folders import FolderDocuments
from moe.system.foreign_files import first_sentence

Arrays = dict[str, np.ndarray]

#: Added to the deviation of a group's rewards, as TRL, verl and Tunix do.
_TINY = 1e-6


@dataclasses.dataclass(frozen=True)
class Reader:
    """Rollouts as examples for a model.

    Attributes:
        model: config of the model; its ids, layers and experts must be those of the rollouts.
        policy: settings.
        length: T, tokens of a row.
    """

    model: ModelConfig
    policy: PolicyConfig
    length: int

    @property
    def replays(self) -> bool:
        """Whether examples have experts."""
        return self.policy.replay and any(sparse_layers(self.model))

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of an example's arrays."""
        return ("tokens", "targets", "log_probs", "advantages", *(("experts",) if self.replays else ()))

    def examples(self, text: str) -> list[Arrays]:
        """An example for each completion of a document.

        Raises:
            ConfigError: the document holds no rollouts, or not of this model; the field is named.
        """
        try:
            group = rollouts.read(text)
        except ValueError as error:
            raise ConfigError(f"data.objective='policy': {first_sentence(error)}; see docs/finetuning.md") from error
        return self.of_group(group)

    def of_group(self, group: rollouts.Group) -> list[Arrays]:
        """An example for each completion of a group. Raises ConfigError; see :meth:`examples`."""
        if group.engine and self.policy.replay and not self.replays:
            raise ConfigError(f"engine={group.engine!r}: belongs to a model with MoE layers; set policy.replay=False")
        rewards = np.array([completion.reward for completion in group.completions])
        values = advantages(rewards, divide=self.policy.divide_by_deviation)
        parts = zip(group.completions, values, strict=True)
        return [self._example(group, i, completion, value) for i, (completion, value) in enumerate(parts)]

    def _example(self, group: rollouts.Group, number: int, completion: rollouts.Completion, advantage: float) -> Arrays:
        name = f"completions.{number}"
        ids, start = np.array(group.prompt_tokens + completion.tokens), len(group.prompt_tokens) - 1
        if len(ids) - 1 > self.length:
            allowed = f"data.sequence_length={self.length} holds at most {self.length + 1}"
            raise ConfigError(f"{name}.tokens: is {len(ids)} tokens with its prompt, and {allowed}")
        if ids.max() >= self.model.vocab_size:
            raise ConfigError(
                f"{name}.tokens: token {ids.max()} must be below model.vocab_size={self.model.vocab_size}"
            )

        def at_targets(values: Any, outside: float) -> np.ndarray:
            return np.concatenate([np.full(start, outside), values])

        count = len(completion.tokens)
        example = {
            "tokens": ids[:-1].astype(np.int32),
            "targets": at_targets(completion.tokens, -1).astype(np.int32),
            "log_probs": at_targets(completion.log_probs, 0).astype(np.float32),
            "advantages": at_targets(np.full(count, advantage), 0).astype(np.float32),
        }
        return example | ({"experts": self._experts(group, completion, name)} if self.replays else {})

    def _experts(self, group: rollouts.Group, completion: rollouts.Completion, name: str) -> np.ndarray:
        """[tokens,L,K] int16."""
        if group.engine is None:
            raise ConfigError(f"{name}.experts: is missing; record them, or set policy.replay=False")
        length = len(group.prompt_tokens) + len(completion.tokens) - 1
        try:
            (experts,) = read_experts(group.engine, [completion.experts], self.model, length)
        except ConfigError as error:
            raise ConfigError(f"{name}.experts: {error}") from error
        absent = (experts == ABSENT).any((1, 2))
        if absent.any():
            raise ConfigError(f"{name}.experts: token {absent.argmax()} of {length} has none")
        return experts.astype(np.int16)

    def check(self, documents: Sequence[str]) -> None:
        """Raise ConfigError for the first document that this model cannot be trained on; file and line are named."""
        for i, text in enumerate(documents):
            try:
                self.examples(text)
            except ConfigError as error:
                where = documents.where(i) if isinstance(documents, FolderDocuments) else f"document {i}"
                raise ConfigError(f"{where}: {error}") from error


def advantages(rewards: np.ndarray, *, divide: bool) -> np.ndarray:
    """Advantages of a group's completions: rewards less their mean, over their deviation (DeepSeekMath, section 4.1.2).

    Args:
        rewards: [N].
        divide: by the deviation, of N - 1 degrees of freedom; False: as in Dr. GRPO (Liu et al. 2025, section 3.2).
    """
    centred = rewards - rewards.mean()
    return centred / (rewards.std(ddof=1) + _TINY) if divide else centred


def row(packed: Arrays, domain: int, pad_id: int) -> Arrays:
    """The arrays of a batch from packed examples; log-probabilities, advantages and experts are 0 in padding."""
    own = {key: packed[key] for key in ("log_probs", "advantages", "experts") if key in packed}
    return chat.chat_row(packed, domain, pad_id) | own


def batch(examples: Sequence[Arrays], length: int, pad_id: int) -> Arrays:
    """A batch with one example in each row."""

    def row_of(example: Arrays) -> Arrays:
        size = len(example["tokens"])

        def padded(values: np.ndarray) -> np.ndarray:
            return np.pad(values, [(0, length - size)] + [(0, 0)] * (values.ndim - 1))

        columns = np.arange(length)
        places = {"tokens_segment_ids": columns < size, "tokens_positions": np.where(columns < size, columns, 0)}
        return row({key: padded(values) for key, values in example.items()} | places, 0, pad_id)

    rows = [row_of(example) for example in examples]
    return {key: np.stack([one[key] for one in rows]) for key in rows[0]}
