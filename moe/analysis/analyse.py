"""Analysis of a model's routing: records held-out text, measures it, and writes tables, plots and coloured text."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from moe.analysis import explorer, passages, picture, plots, summary
from moe.analysis.documents import Document, document_batches, first_documents
from moe.analysis.markdown import markdown
from moe.analysis.record import Recorder, Records
from moe.config import ConfigError
from moe.data import pipeline

_PASSAGE = 1_200  # characters of each domain shown in colours
_STRETCH = 16  # tokens of whole documents read per token kept, so that many documents contribute
_CANDIDATES = 50  # documents of each domain from which the shown one is selected


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Result of :func:`analyse`.

    Attributes:
        summary: plain numbers (:func:`moe.analysis.summary.summarise`).
        passages: text of every domain with its first experts at the shown layers.
        shown: indices of these layers: the first, middle and last MoE layer.
    """

    summary: dict[str, Any]
    passages: list[passages.Passage]
    shown: list[int]


def analyse(
    recorder: Recorder,
    variables: dict[str, Any],
    prepared: pipeline.Prepared,
    *,
    tokens: int,
    shuffles: int,
    seed: int,
    code_domain: str = "python",
    earlier: dict[int, Callable[[], dict[str, Any]]] | None = None,
) -> Analysis:
    """Runs the model over held-out text and measures its routing.

    Args:
        recorder: recorder of the model's program, whose config gives T and B.
        variables: the model's variables.
        prepared: tokenizer and documents.
        tokens: tokens per domain, rounded up to rows; the same number of whole Python documents.
        shuffles: permutations per null distribution.
        seed: seed of the permutations.
        code_domain: domain whose documents give the syntax classes; ignored if it is not among the domains.
        earlier: step → function that reads the variables at that step, for router saturation.

    Raises:
        ConfigError: ``tokens`` or ``shuffles`` below 1, or held-out text shorter than a row.
    """
    for name, value in (("tokens", tokens), ("shuffles", shuffles)):
        if value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1")
    data, batch_size = recorder.program.config.data, recorder.program.config.train.batch_size
    length = data.sequence_length
    data = dataclasses.replace(data, heldout_rows=-(-tokens // length))
    rows = {
        domain: pipeline.heldout_batches(prepared, data, domain=domain, batch_size=batch_size)
        for domain in prepared.domains
    }
    records = recorder(variables, rows)
    code, skipped = None, 0
    if code_domain in prepared.domains:
        documents = first_documents(prepared.heldout[code_domain], prepared.tokenizer, _STRETCH * tokens)
        batches, skipped = summary.code_batches(documents, length, batch_size, keep=-(-tokens // length))
        code = recorder(variables, {code_domain: batches}) if batches else None
    found = summary.summarise(records, code, summary.piece_of(prepared.tokenizer), shuffles=shuffles, seed=seed)
    found["documents_without_syntax"] = skipped
    if earlier:
        then = {step: recorder(read(), rows) for step, read in earlier.items()}
        found["saturation"] = summary.saturation(then, records)
    shown = sorted({0, len(records.layers) // 2, len(records.layers) - 1})
    return Analysis(found, _passages(recorder, variables, prepared, shown), [records.layers[i] for i in shown])


def _passages(
    recorder: Recorder, variables: dict[str, Any], prepared: pipeline.Prepared, shown: Sequence[int]
) -> list[passages.Passage]:
    """Takes the beginning of one held-out document per domain: the one with the most drawable characters."""
    config = recorder.program.config
    documents: dict[str, Document] = {}
    for domain in prepared.domains:
        beginnings = (text[:_PASSAGE] for text in itertools.islice(prepared.heldout[domain], _CANDIDATES))
        clearest = max(beginnings, key=picture.drawable)  # the first of equal ones
        for document in first_documents([clearest], prepared.tokenizer, 1):
            documents[domain] = document
    if not documents:
        return []
    records: Records = recorder(
        variables,
        {
            domain: document_batches([document], {}, config.data.sequence_length, config.train.batch_size)
            for domain, document in documents.items()
        },
    )
    return [
        passages.Passage(
            domain,
            passages.pieces_of(document.text, document.spans),
            records.first_choice[np.asarray(shown)][:, records.domain == number],
        )
        for number, (domain, document) in enumerate(documents.items())
    ]


def write(analysis: Analysis, folder: epath.Path, title: str) -> list[str]:
    """Writes all files; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    found, size = analysis.summary, analysis.summary["num_experts"]
    (folder / "analysis.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    (folder / "analysis.md").write_text(markdown(found, title))
    (folder / "experts.html").write_text(explorer.page(analysis.passages, analysis.shown, size, title))
    names = ["analysis.json", "analysis.md", "experts.html", *plots.plot_all(found, folder)]
    if analysis.passages:
        picture.picture(folder / "experts.png", analysis.passages, analysis.shown, size)
        names.append("experts.png")
    return names
