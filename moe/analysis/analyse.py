"""A model analysed, and the files of it: records, then measures, then tables, plots and coloured text.

In: a program and variables (of a checkpoint, or in memory), and prepared text. Out: the summary of
:func:`moe.analysis.summary.summarise`, passages to show, and a folder with analysis.json, analysis.md, PNGs and
experts.html.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from moe.analysis import plots, render, summary
from moe.analysis.documents import Document, document_batches, first_documents
from moe.analysis.record import Recorder, Records
from moe.config import ConfigError
from moe.data import pipeline

_PASSAGE = 1_200  # characters of each domain that are shown in colours
_STRETCH = 16  # tokens of whole documents read for every one that is kept, so that they are of many documents
_CANDIDATES = 50  # documents of each domain, of which one is shown


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What :func:`analyse` found.

    Attributes:
        summary: plain numbers.
        passages: text of every domain with its first experts at the shown layers.
        shown: numbers of these layers: the first, middle and last MoE layer.
    """

    summary: dict[str, Any]
    passages: list[render.Passage]
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
        recorder: of the model's program, whose config says T, B and the rest of the data.
        variables: of the model.
        prepared: the text.
        tokens: per domain, rounded up to rows; and of whole Python documents.
        shuffles: permutations behind every null.
        seed: of them.
        code_domain: documents of it that tokenize as Python give the syntax classes; not among the domains: none do.
        earlier: step → () → the variables then, for router saturation.

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
) -> list[render.Passage]:
    """The beginning of a held-out document of each domain: the first whose characters can be drawn."""
    config = recorder.program.config
    documents: dict[str, Document] = {}
    for domain in prepared.domains:
        beginnings = (text[:_PASSAGE] for text in itertools.islice(prepared.heldout[domain], _CANDIDATES))
        clearest = max(beginnings, key=render.drawable)  # the first of equals
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
        render.Passage(
            domain,
            render.pieces_of(document.text, document.spans),
            records.first_choice[np.asarray(shown)][:, records.domain == number],
        )
        for number, (domain, document) in enumerate(documents.items())
    ]


def write(analysis: Analysis, folder: epath.Path, title: str) -> list[str]:
    """Writes every file; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    found, size = analysis.summary, analysis.summary["num_experts"]
    (folder / "analysis.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    (folder / "analysis.md").write_text(summary.markdown(found, title))
    (folder / "experts.html").write_text(render.page(analysis.passages, analysis.shown, size, title))
    names = ["analysis.json", "analysis.md", "experts.html", *plots.plot_all(found, folder)]
    if analysis.passages:
        render.picture(folder / "experts.png", analysis.passages, analysis.shown, size)
        names.append("experts.png")
    return names
