"""Lines on the size of a run's data: documents, different ones, tokens, answers, and what is left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from moe.config import ConfigError, DataConfig
from moe.config.objectives import Objective
from moe.data import folders
from moe.data.folders import FolderDocuments
from moe.system.escaping import terminal

#: Most documents of a split that are tokenised, of all domains together; sizes of larger splits are estimates.
_SAMPLE = 512
#: Most characters of them, since documents may be books.
_CHARACTERS = 1_000_000


@dataclasses.dataclass
class Size:
    """Size of a split; an estimate unless ``exact``.

    Attributes:
        documents: their number.
        distinct: number of different texts; None: not known.
        tokens: of all examples, each as long as it is trained.
        targets: tokens with a loss.
        left_out: documents without an example.
        example: where the first of them is.
    """

    documents: int = 0
    distinct: int | None = 0
    tokens: float = 0.0
    targets: float = 0.0
    left_out: float = 0.0
    example: str = ""
    exact: bool = True

    def add(self, documents: Sequence[str], count: Callable[[str], tuple[int, int]], domains: int) -> None:
        """Add the documents of one of several domains.

        Args:
            documents: of the domain.
            count: tokens and targets of a document; (0, 0): it has no example.
            domains: their number, which share the limits of what is read.

        Raises:
            ConfigError: a document that cannot be read; its file and line are named.
        """
        tokens = targets = empty = characters = read = 0
        for place in np.random.default_rng(0).permutation(len(documents))[: max(_SAMPLE // domains, 1)]:
            text = documents[int(place)]
            try:
                found = count(text)
            except ConfigError as error:
                raise ConfigError(f"{_where(documents, int(place))}: {error}") from error
            read += 1
            characters += len(text)
            tokens += found[0]
            targets += found[1]
            if not any(found):
                empty += 1
                self.example = self.example or _where(documents, int(place))
            if characters > _CHARACTERS // domains:
                break
        scale = len(documents) / max(read, 1)
        self.exact &= read == len(documents)
        self.documents += len(documents)
        self.tokens += tokens * scale
        self.targets += targets * scale
        self.left_out += empty * scale
        if isinstance(documents, FolderDocuments) and self.distinct is not None:
            self.distinct += documents.count_distinct()
        else:
            self.distinct = None

    def number(self, value: float) -> str:
        """A count, rounded to three digits and marked if it is an estimate."""
        return f"{round(value):,}" if self.exact else f"about {float(f'{value:.3g}'):,.0f}"


def _where(documents: Sequence[str], place: int) -> str:
    """File and line of a document, or its number."""
    return documents.where(place) if isinstance(documents, FolderDocuments) else f"document {place}"


def describe(
    data: DataConfig,
    objective: Objective,
    train: Sequence[Sequence[str]],
    heldout: Sequence[Sequence[str]],
    count: Callable[[str], tuple[int, int]],
) -> Iterator[str]:
    """Lines on the data of a run, without controls that names of files may have.

    Args:
        data: settings.
        objective: of the run.
        train: documents of the training split of each domain.
        heldout: of the held-out split.
        count: tokens and targets of a document; (0, 0): it has no example.
    """
    kind = "conversations" if objective.conversations else "documents"
    sizes = []
    for split in (train, heldout):
        size = Size()
        for documents in split:
            size.add(documents, count, len(split))
        sizes.append(size)
    parts = []
    for size, name in zip(sizes, ("", "held out: "), strict=True):
        distinct = f" ({size.distinct:,} different)" if size.distinct is not None else ""
        targets = f", {size.number(size.targets)} of them with a loss" if objective.lengths(data) else ""
        parts.append(f"{name}{size.documents:,} {kind}{distinct}, {size.number(size.tokens)} tokens{targets}")
    yield f"data: {'; '.join(parts)}"
    for size in sizes:
        if size.left_out:
            yield terminal(
                f"left out: {size.number(size.left_out)} of {size.documents:,} {kind} have no example"
                f"{objective.answers} within data.sequence_length={data.sequence_length} tokens, such as {size.example}"
            )
    for line in folders.describe_left_out_of(data.dataset, data.text_suffixes):
        yield terminal(line.replace("\n", "\\n"))
