"""Training objectives as values: how documents become rows, what the loss is, and what that asks of a config.

``data.objective`` names one: a line of :data:`OBJECTIVES`, whose classes are in :mod:`moe.objectives`, or a user's
``module:object``. What depends on the objective asks its value: reading, packing, the train step, the teacher, checks,
the report. Classes are imported when a config is made, since they use packages that import this one.
"""

from __future__ import annotations

import dataclasses
import pkgutil
import types
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from moe.config.guarded_objectives import FIELD, GUARDS
from moe.config.references import import_named
from moe.system.fields import check_fields
from moe.system.guarded import guard_methods

#: Abilities that not every objective has: rows split over ``mesh.context``, layers over ``mesh.pipeline``, layers that
#: predict later tokens (``model.prediction_layers``), and the playground's page.
Ability = Literal["context", "pipeline", "prediction", "page"]

#: Models that an objective trains.
Models = Literal["decoder", "encoder-decoder", "any"]

#: Arrays by name, of an example or of a row.
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Base of all objectives; :class:`moe.objectives.text.NextToken` has a default for every method.

    An example is a dict of arrays without padding; a row is a dict of arrays of a batch (:mod:`moe.data.pipeline`).

    Attributes:
        models: kind of model that it trains.
        abilities: see :data:`Ability`.
        section: section of the config that only this objective reads.
        draws: whether examples, or rows cut from text, depend on random numbers.
        conversations: whether documents are rendered by the tokenizer's chat template.
        holds_ids: whether documents hold token ids, so that a tokenizer cannot be trained on them.
        sentinels: number of token ids that stand for no text, after those of the tokenizer (:mod:`moe.data.sentinels`).
        prefix: whether a prompt is seen in both directions.
        has_reference: whether ``distill.teacher`` is a reference model of the loss, not a teacher of probabilities.
        noise: whether the model is trained with jitter, dropout and the gate's draws.
        answers: what an example must have, in messages, such as " with an answer".
    """

    models: ClassVar[Models] = "decoder"
    abilities: ClassVar[frozenset[Ability]] = frozenset()
    section: ClassVar[str] = ""
    draws: ClassVar[bool] = False
    conversations: ClassVar[bool] = False
    holds_ids: ClassVar[bool] = False
    sentinels: ClassVar[int] = 0
    prefix: ClassVar[bool] = False
    has_reference: ClassVar[bool] = False
    noise: ClassVar[bool] = True
    answers: ClassVar[str] = ""

    #: Name in configs, messages and records.
    name: str = ""

    def __init_subclass__(cls, **further: Any) -> None:
        super().__init_subclass__(**further)
        guard_methods(cls, GUARDS)

    def __post_init__(self) -> None:
        check_fields(self, f"{FIELD}.")

    # --- Config ------------------------------------------------------------------------------------------------------
    def bound(self, data: Any, config: Any = None) -> Objective:
        """The objective for a data section and, for one that reads other sections too, a config."""
        del data, config
        return self

    def check(self, config: Any) -> None:
        """Check a config's sections against the objective. Raises ConfigError."""

    def check_reference(self, config: Any, reference: Any) -> None:
        """Check the model config of the reference model. Raises ConfigError."""

    def about(self, config: Any) -> str:
        """Line that a run prints when it begins; empty: none."""
        raise NotImplementedError

    # --- Reading -----------------------------------------------------------------------------------------------------
    def check_rows(self, data: Any) -> None:
        """Refuse rows that no example fits. Raises ConfigError."""

    def check_documents(self, documents: Sequence[str]) -> None:
        """Refuse documents that this model cannot be trained on, before a run begins. Raises ConfigError."""

    def lengths(self, data: Any) -> dict[str, int]:
        """Arrays of an example, and elements of each in a row, which holds whole examples and padding; empty: rows are
        cut from the concatenated texts of :meth:`encode`."""
        raise NotImplementedError

    def encode(self, text: str, tokenizer: Any) -> np.ndarray:
        """Token ids [n] of a document from which rows are cut."""
        raise NotImplementedError

    def divide(self, row: Arrays, rng: np.random.Generator) -> Arrays:
        """A row that was cut from texts, with draws of its own; only where ``draws``."""
        raise NotImplementedError

    def examples(self, text: str, rng: np.random.Generator, data: Any, tokenizer: Any) -> list[Arrays]:
        """Examples of a document. ``rng`` is seeded by the document's place; it is fixed where ``draws`` is False."""
        raise NotImplementedError

    def row(self, packed: Arrays, pad_id: int) -> Arrays:
        """The arrays of a row.

        Args:
            packed: each array ``a`` of the examples, with ``a_segment_ids`` (1, 2, ... per example, 0 in padding) and
                ``a_positions``.
            pad_id: token of padding.
        """
        raise NotImplementedError

    def heldout_row(self, row: Arrays) -> Arrays:
        """The row that is evaluated."""
        raise NotImplementedError

    def unigram_targets(self, text: str, rng: np.random.Generator, data: Any, tokenizer: Any) -> list[np.ndarray]:
        """Ids of a document that rows of held-out text may predict, for the report's unigram baseline."""
        raise NotImplementedError

    def ids(self, tokenizer: Any) -> int:
        """Number of token ids that rows may hold."""
        raise NotImplementedError

    def tokens(self, example: Arrays) -> int:
        """Number of tokens that an example takes."""
        raise NotImplementedError

    def targets(self, example: Arrays) -> np.ndarray:
        """Ids [n] of an example that are predicted."""
        raise NotImplementedError

    # --- Training ----------------------------------------------------------------------------------------------------
    def arrays(self, config: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Further arrays of a batch, besides those of every model: name → (shape of one row, dtype)."""
        raise NotImplementedError

    def count(self, batch: Any) -> Any:
        """Number of units of a batch, such as targets, over which the loss is a mean."""
        raise NotImplementedError

    def sums(self, config: Any, model: Any, output: Any, batch: Any, teacher: Any) -> Any:
        """Sums of the loss over the units of a batch (:class:`moe.training.losses.Sums`).

        Args:
            config: of the run.
            model: with the parameters of the step.
            output: of the model for the batch (:class:`moe.models.decoder.Output`).
            batch: arrays by name.
            teacher: (model, output) of ``distill.teacher``; None without one.
        """
        raise NotImplementedError

    # --- Report ------------------------------------------------------------------------------------------------------
    def prompt(self, text: str, data: Any, tokenizer: Any) -> Any:
        """Part of a document that the model continues in the report; None: the document has none."""
        raise NotImplementedError

    def prompt_ids(self, prompt: Any) -> np.ndarray:
        """Token ids [n] of a prompt that the model reads."""
        raise NotImplementedError

    def sampling(self, config: Any, tokenizer: Any) -> Any:
        """How the report samples (:class:`moe.models.sampling.Sampling`)."""
        raise NotImplementedError

    def title(self) -> str:
        """Heading of the report's samples."""
        raise NotImplementedError

    def show(self, prompt: Any, written: np.ndarray, tokenizer: Any) -> str:
        """Text of a prompt and of what the model wrote."""
        raise NotImplementedError


#: Name of each objective → its class.
OBJECTIVES: Mapping[str, str] = types.MappingProxyType(
    {
        "causal": "moe.objectives.text:Causal",
        "prefix_lm": "moe.objectives.prefix:PrefixLM",
        "span_corruption": "moe.objectives.spans:SpanCorruption",
        "pairs": "moe.objectives.pairs:Pairs",
        "chat": "moe.objectives.chat:Chat",
        "preferences": "moe.objectives.preferences:Preferences",
        "policy": "moe.objectives.policy:Policy",
    }
)


def find_objective(name: str) -> Objective:
    """The objective of a name.

    Args:
        name: of :data:`OBJECTIVES`, or ``module:object``, an importable subclass of :class:`Objective` or an instance.

    Raises:
        ConfigError: it cannot be imported, or is something else.
    """
    if name in OBJECTIVES:
        return pkgutil.resolve_name(OBJECTIVES[name])(name=name)
    return import_named(FIELD, name, Objective)
