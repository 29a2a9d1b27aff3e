"""Preferences: pairs of conversations, the first of which was preferred to the second.

A row holds whole pairs and padding. Pair p = 1, 2, ... has segments 2p − 1 (chosen) and 2p (rejected), each with
positions from 0, so that neither attends to the other. As with conversations only answers have targets, from the first
one on in which the two differ. The loss is DPO's (Rafailov et al. 2023, arXiv 2305.18290, equation 7).
"""

from __future__ import annotations

import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe.config import Config, ConfigError, DataConfig
from moe.config.objectives import Ability, Arrays
from moe.data import chat
from moe.data.documents import CONVERSATION, PREFERENCE, TOOLS
from moe.data.tokenizer import Tokenizer
from moe.models.decoder import Output
from moe.models.factory import Model
from moe.objectives.chat import Chat, examples
from moe.system.fields import require
from moe.training.losses import Sums, token_cross_entropy

_KEYS = ("tokens", "targets")


class Preferences(Chat):
    """Mean over pairs of −log σ(beta · margin); a program's teacher is the reference model."""

    abilities: ClassVar[frozenset[Ability]] = frozenset({"pipeline"})
    section: ClassVar[str] = "preferences"
    has_reference: ClassVar[bool] = True

    def check(self, config: Config) -> None:
        """Require a reference model."""
        teacher = config.distill.teacher
        require(bool(teacher), "distill.teacher", teacher, "must be the reference model of the preferences")

    def about(self, config: Config) -> str:
        """The method, its factor and the reference model."""
        return f"preferences (DPO), beta {config.preferences.beta:g}, against {config.distill.teacher}"

    def lengths(self, data: DataConfig) -> dict[str, int]:
        """T tokens, targets and marks of the rejected conversation."""
        return dict.fromkeys([*_KEYS, "rejected"], data.sequence_length)

    def examples(self, text: str, rng: np.random.Generator, data: DataConfig, tokenizer: Tokenizer) -> list[Arrays]:
        """The pair of a document (:func:`example`)."""
        del rng
        return example(text, data.sequence_length, tokenizer, data.dataset)

    def row(self, packed: Arrays, pad_id: int) -> Arrays:
        """The arrays of a batch, with both conversations of a pair as segments of their own."""
        found = super().row(packed, pad_id)
        pairs, rejected = found["segment_ids"], found.pop("rejected")
        segments = np.where(pairs > 0, 2 * pairs - 1 + rejected, 0).astype(np.int32)
        places = np.arange(len(segments), dtype=np.int32)
        first = np.maximum.accumulate(np.where(np.diff(segments, prepend=-1) != 0, places, 0))
        positions = np.where(segments > 0, places - first, 0).astype(np.int32)
        return found | {"segment_ids": segments, "positions": positions}

    def heldout_row(self, row: Arrays) -> Arrays:
        """The row with targets only in the chosen conversations."""
        return row | {"targets": np.where(row["segment_ids"] % 2 == 1, row["targets"], -1).astype(np.int32)}

    def unigram_targets(
        self, text: str, rng: np.random.Generator, data: DataConfig, tokenizer: Tokenizer
    ) -> list[np.ndarray]:
        """Targets of the chosen conversation, which is evaluated."""
        del rng
        return [self.targets(one) for one in examples(text, data.sequence_length, tokenizer, data.dataset)]

    def count(self, batch: dict[str, Array]) -> Array:
        """Number of pairs."""
        return jnp.sum(jnp.max(batch["segment_ids"], axis=1) // 2)

    def sums(
        self,
        config: Config,
        model: Model,
        output: Output,
        batch: dict[str, Array],
        teacher: tuple[Model, Output] | None,
    ) -> Sums:
        """Loss in nats; ``preference_accuracy``: pairs of positive margin; ``preference_margin``: margins, nats."""
        assert teacher is not None, "checked with the config"
        found = token_cross_entropy(output.hidden, model.output_matrix(), batch["targets"])
        reference = token_cross_entropy(teacher[1].hidden, teacher[0].output_matrix(), batch["targets"])
        margin = margins(jax.lax.stop_gradient(reference) - found, batch["segment_ids"])
        # In a row without a pair p the margin is 0, and the pair is not counted.
        number = 1 + jnp.arange(margin.shape[1])
        present = number <= jnp.max(batch["segment_ids"], axis=1, keepdims=True) // 2
        loss = jnp.sum(jnp.where(present, -jax.nn.log_sigmoid(config.preferences.beta * margin), 0.0))
        accuracy = jnp.sum((present & (margin > 0)).astype(jnp.float32))
        return Sums(loss, loss, {"preference_accuracy": accuracy, "preference_margin": jnp.sum(margin)})


def margins(log_ratio: Float[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Float[Array, "B P"]:
    """log π/π_ref of the chosen conversation less that of the rejected one, for each pair of a row.

    Args:
        log_ratio: log π/π_ref of each target, 0 where there is none.
        segment_ids: 2p − 1 in the chosen conversation of pair p, 2p in the rejected one, 0 in padding.
    """
    signed = jnp.where(segment_ids % 2 == 1, log_ratio, -log_ratio)
    pair = (segment_ids + 1) // 2  # 0: padding
    most = segment_ids.shape[1] // 2  # pairs that fit: each has two tokens or more
    return jax.vmap(lambda values, index: jax.ops.segment_sum(values, index, most + 1)[1:])(signed, pair)


def example(text: str, length: int, tokenizer: Tokenizer, dataset: str) -> list[Arrays]:
    """``tokens``, ``targets`` and ``rejected`` (0 or 1) [n], n ≤ length, of a document; no example without answers.

    Each conversation is cut at half of the length; a pair that is equal after the cut gives no example.

    Raises:
        ConfigError: the document is no pair, or see :func:`moe.data.chat.rendered_answers`.
    """
    found = json.loads(text.removeprefix(CONVERSATION)) if text.startswith(CONVERSATION) else None
    if not isinstance(found, dict) or not set(PREFERENCE) <= found.keys():
        raise ConfigError(
            f"data.objective='preferences': needs documents with prompt, chosen and rejected, and {dataset!r} "
            "has others; docs/finetuning.md shows the formats"
        )
    parts = []
    for name in PREFERENCE:
        # Earlier answers that a template renders in separate texts belong to the prompt, which both conversations have.
        encoded = chat.encoded_answers(found[name], tokenizer, found.get(TOOLS))[-1:]
        parts += [{key: values[: length // 2] for key, values in one.items()} for one in encoded]
    if len(parts) < len(PREFERENCE) or all(np.array_equal(*(part[key] for part in parts)) for key in _KEYS):
        return []
    begin = _first_own_answer(*parts)
    for part in parts:
        part["targets"] = np.where(np.arange(len(part["targets"])) < begin, -1, part["targets"])
    if not all((part["targets"] >= 0).any() for part in parts):
        return []
    rejected = [np.full(len(part["tokens"]), number, np.int32) for number, part in enumerate(parts)]
    joined = {key: np.concatenate([part[key] for part in parts]) for key in _KEYS}
    return [joined | {"rejected": np.concatenate(rejected)}]


def _first_own_answer(chosen: Arrays, rejected: Arrays) -> int:
    """Where the first answer begins that the two conversations do not share: earlier ones are part of the prompt."""
    size = min(len(part["tokens"]) for part in (chosen, rejected))
    differs = np.any([chosen[key][:size] != rejected[key][:size] for key in _KEYS], axis=0)
    first = int(differs.argmax()) if differs.any() else size
    return int(max(np.flatnonzero(chosen["targets"][:first] < 0), default=-1)) + 1
