"""Prediction of each token from those before it, and with it the defaults of all objectives."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from moe.config import Config, ConfigError, DataConfig
from moe.config.objectives import Ability, Arrays, Objective
from moe.data.documents import CONVERSATION
from moe.data.rollouts import ROLLOUTS
from moe.data.sentinels import sentinel_ids
from moe.data.tokenizer import Tokenizer
from moe.models.decoder import Output
from moe.models.factory import Model
from moe.models.prediction import further_targets
from moe.models.sampling import Sampling
from moe.training.losses import Sums, linear_cross_entropy, soft_cross_entropy

_PROMPT = 31  # tokens of the report's prompts, without bos
_PROMPT_CHARACTERS = 2000  # of a document that are tokenised for one


class NextToken(Objective):
    """Next-token prediction in rows that are cut from texts.

    An objective on examples derives from it, with :meth:`lengths` and :meth:`examples` of ``tokens``, ``targets`` (-1:
    none) and its further arrays.
    """

    def about(self, config: Config) -> str:
        """No line: a run on text says nothing of its objective."""
        del config
        return ""

    # --- Reading -----------------------------------------------------------------------------------------------------
    def lengths(self, data: DataConfig) -> dict[str, int]:
        """No arrays: rows are cut from texts."""
        del data
        return {}

    def encode(self, text: str, tokenizer: Tokenizer) -> np.ndarray:
        """Encode a document as ``bos text eos``. Raises ConfigError if it is a conversation, or rollouts."""
        if text.startswith(CONVERSATION):
            raise ConfigError("data.dataset: holds conversations (messages); set data.objective=chat to train on them")
        if text.startswith(ROLLOUTS):
            raise ConfigError("data.dataset: holds rollouts (completions); set data.objective=policy to train on them")
        bos = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
        return np.concatenate([bos, tokenizer.encode(text), [tokenizer.eos_id]]).astype(np.int32)

    def row(self, packed: Arrays, pad_id: int) -> Arrays:
        """The arrays of a batch; further arrays of the examples are 0 in padding."""
        segments = packed["tokens_segment_ids"].astype(np.int32)
        positions = packed["tokens_positions"].astype(np.int32)
        places = [f"{name}_{place}" for name in packed for place in ("segment_ids", "positions")]
        further = {name: values for name, values in packed.items() if name not in ("tokens", "targets", *places)}
        return {
            "tokens": np.where(segments > 0, packed["tokens"], pad_id).astype(np.int32),
            "targets": np.where(segments > 0, packed["targets"], -1).astype(np.int32),
            "segment_ids": segments,
            "positions": positions,
            **further,
        }

    def heldout_row(self, row: Arrays) -> Arrays:
        """The same row."""
        return row

    def tokens(self, example: Arrays) -> int:
        """Length of ``tokens``."""
        return len(example["tokens"])

    def targets(self, example: Arrays) -> np.ndarray:
        """``targets`` without those that are -1."""
        return example["targets"][example["targets"] >= 0]

    def unigram_targets(
        self, text: str, rng: np.random.Generator, data: DataConfig, tokenizer: Tokenizer
    ) -> list[np.ndarray]:
        """Targets of the examples, or all tokens of a text but bos."""
        if self.lengths(data):
            return [self.targets(example) for example in self.examples(text, rng, data, tokenizer)]
        return [self.encode(text, tokenizer)[int(tokenizer.bos_id >= 0) :]]

    def ids(self, tokenizer: Tokenizer) -> int:
        """Ids of the tokenizer and the sentinels."""
        if not self.sentinels:
            return tokenizer.vocab_size
        return max(tokenizer.vocab_size, int(sentinel_ids(tokenizer, self.sentinels).max()) + 1)

    # --- Training ----------------------------------------------------------------------------------------------------
    def arrays(self, config: Config) -> dict[str, tuple[tuple[int, ...], Any]]:
        """No further arrays."""
        del config
        return {}

    def count(self, batch: dict[str, Array]) -> Array:
        """Number of targets."""
        return jnp.sum(batch["targets"] >= 0)

    def sums(
        self,
        config: Config,
        model: Model,
        output: Output,
        batch: dict[str, Array],
        teacher: tuple[Model, Output] | None,
    ) -> Sums:
        """Cross-entropy of the targets, in nats; with a teacher also of its probabilities, and with multi-token
        prediction also of later tokens."""
        matrix = model.output_matrix()
        nll, _ = linear_cross_entropy(output.hidden, matrix, batch["targets"])
        loss, terms = nll, {}
        if teacher is not None:
            soft = soft_cross_entropy(output.logits, teacher[1].logits, batch["targets"])
            loss = loss + config.distill.soft_share * (soft - nll)
        depths = output.report.handed.get("prediction", ())
        for depth, hidden in enumerate(depths, start=1):  # DeepSeek-V3, equations 24 and 25
            targets = further_targets(batch["targets"], batch["segment_ids"], depth)
            further, _ = linear_cross_entropy(hidden, matrix, targets)
            loss = loss + config.model.prediction_weight / len(depths) * further
            terms[f"cross_entropy_{depth}_further"] = further
        return Sums(loss, nll, terms)

    # --- Report ------------------------------------------------------------------------------------------------------
    def prompt(self, text: str, data: DataConfig, tokenizer: Tokenizer) -> Any:
        """The first tokens of a document; None if it has none."""
        del data
        start = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
        ids = np.concatenate([start, tokenizer.encode(text[:_PROMPT_CHARACTERS])[:_PROMPT]]).astype(np.int32)
        return ids if len(ids) else None

    def prompt_ids(self, prompt: Any) -> np.ndarray:
        """The prompt itself."""
        return prompt

    def sampling(self, config: Config, tokenizer: Tokenizer) -> Sampling:
        """Draws from the run's seed."""
        del tokenizer
        return Sampling(seed=config.seed, prefix=self.prefix)

    def title(self) -> str:
        """A continuation."""
        return "a continuation"

    def show(self, prompt: Any, written: np.ndarray, tokenizer: Tokenizer) -> str:
        """The prompt, and the text after it."""
        return f"{tokenizer.decode(prompt)} >>> {tokenizer.decode(written)}"


class Causal(NextToken):
    """Next-token prediction on plain text."""

    abilities: ClassVar[frozenset[Ability]] = frozenset({"context", "pipeline", "prediction", "page"})
