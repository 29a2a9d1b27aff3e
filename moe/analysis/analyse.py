"""Analysis of a model's routing: records held-out text, measures it, and writes tables, plots and coloured text."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from typing import Any, Required, TypedDict, Unpack

import numpy as np
from etils import epath

from moe.analysis import explorer, passages, picture, plots, summary
from moe.analysis.controls import has_router, hash_routing, untrain_routers
from moe.analysis.documents import Document, document_batches, first_documents
from moe.analysis.markdown import markdown
from moe.analysis.record import Recorder, Records
from moe.config import ConfigError
from moe.data import pipeline
from moe.system.atomic_files import write_atomic
from moe.training.batches import EXPERTS_KEY

PASSAGE = 6_000  # characters of each domain in the explorer
#: Upper bounds of arguments of :func:`analyse`: records and texts are held in memory.
LARGEST = {"tokens": 1 << 24, "shuffles": 100_000, "characters": 10_000_000}
_STRETCH = 16  # tokens of whole documents read per token kept, so that many documents contribute
_CANDIDATES = 50  # documents of each domain from which the shown one is selected


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Result of :func:`analyse`.

    Attributes:
        summary: plain numbers (:func:`moe.analysis.summary.summarise`).
        passages: text of every domain with its routing.
        shown: layers of the picture, as indices of MoE layers: the first, middle and last.
    """

    summary: dict[str, Any]
    passages: list[passages.Passage]
    shown: list[int]


class MeasureOptions(TypedDict, total=False):
    """Settings of :func:`measure` besides the model and its text.

    Attributes:
        tokens: tokens per domain, rounded up to rows; the same number of whole Python documents.
        shuffles: permutations per null distribution.
        seed: seed of the permutations.
        code_domain: domain whose documents give the syntax classes, default "python"; ignored if it is not among the
            domains.
        step: step of the checkpoint; default 0.
        earlier: step → function that reads the variables at that step, for saturation and load over training.
    """

    tokens: Required[int]
    shuffles: Required[int]
    seed: Required[int]
    code_domain: str
    step: int
    earlier: dict[int, Callable[[], dict[str, Any]]]


def analyse(
    recorder: Recorder,
    variables: dict[str, Any],
    prepared: pipeline.Prepared,
    *,
    characters: int = PASSAGE,
    document: int | None = None,
    **options: Unpack[MeasureOptions],
) -> Analysis:
    """Run the model over held-out text and measure its routing.

    Args:
        recorder: recorder of the model's program, whose config gives T and B.
        variables: the model's variables.
        prepared: tokenizer and documents.
        characters: length of the text of each domain in the explorer.
        document: number of the held-out document shown of each domain; None: of the first ones, the one with the
            largest share of drawable characters.
        **options: see :class:`MeasureOptions`.

    Raises:
        ConfigError: a number out of range (:data:`LARGEST`), held-out text shorter than a row, or a document that a
            domain does not have.
    """
    _check("characters", characters)
    _check_document(document, recorder, prepared)
    found = measure(recorder, variables, prepared, **options)
    shown = sorted({0, len(found["layers"]) // 2, len(found["layers"]) - 1})
    return Analysis(found, _passages(recorder, variables, prepared, characters, document), shown)


def _check(name: str, value: int) -> None:
    if not 1 <= value <= LARGEST[name]:
        raise ConfigError(f"{name}={value}: must be from 1 to {LARGEST[name]}")


def _check_document(document: int | None, recorder: Recorder, prepared: pipeline.Prepared) -> None:
    if document is None:
        return
    if _shows_rows(recorder):
        raise ConfigError(f"document={document}: encoder-decoders and examples are shown by rows; leave it out")
    for domain in prepared.domains:
        if not 0 <= document < (count := len(prepared.heldout[domain])):
            raise ConfigError(f"document={document}: must be from 0 to {count - 1}, the last held out of {domain!r}")


def heldout_rows(
    recorder: Recorder, prepared: pipeline.Prepared, tokens: int
) -> dict[str, list[dict[str, np.ndarray]]]:
    """Held-out batches of each domain with at least ``tokens`` decoder tokens, or all there are. Recorded experts of
    rollouts are removed, since they would be replayed in place of the routers' choices."""
    config = recorder.program.config
    data = dataclasses.replace(config.data, heldout_rows=-(-tokens // config.data.sequence_length))
    batches = {
        domain: pipeline.heldout_batches(prepared, data, domain=domain, batch_size=config.train.batch_size)
        for domain in prepared.domains
    }
    return {
        domain: [{name: x for name, x in batch.items() if name != EXPERTS_KEY} for batch in of_domain]
        for domain, of_domain in batches.items()
    }


def measure(
    recorder: Recorder, variables: dict[str, Any], prepared: pipeline.Prepared, **options: Unpack[MeasureOptions]
) -> dict[str, Any]:
    """All measures of a checkpoint and of its controls: :func:`analyse` without the coloured text."""
    tokens = options["tokens"]
    shuffles = options["shuffles"]
    seed = options["seed"]
    _check("tokens", tokens)
    _check("shuffles", shuffles)
    if seed < 0:
        raise ConfigError(f"seed={seed}: must be at least 0")
    code_domain = options.get("code_domain", "python")
    step = options.get("step", 0)
    earlier = options.get("earlier")
    length, batch_size = recorder.program.config.data.sequence_length, recorder.program.config.train.batch_size
    rows = heldout_rows(recorder, prepared, tokens)
    records = recorder(variables, rows)
    code = None
    code_rows = None
    skipped = 0
    if code_domain in prepared.domains and not recorder.stack:  # a document is not an input of an encoder-decoder
        documents = first_documents(prepared.heldout[code_domain], prepared.tokenizer, _STRETCH * tokens)
        batches, skipped = summary.code_batches(documents, length, batch_size, keep=-(-tokens // length))
        code_rows = {code_domain: batches} if batches else None
        code = recorder(variables, code_rows) if code_rows else None
    controlled = {"hash": (hash_routing(records), hash_routing(code) if code else None)}
    model = recorder.program.config.model
    untrained = None
    if has_router(model):
        random = untrain_routers(variables, model, seed)
        untrained = recorder(random, rows)
        controlled["untrained"] = (untrained, recorder(random, code_rows) if code_rows else None)
    piece = summary.piece_of(prepared.tokenizer)
    found = summary.summarise(records, code, piece, shuffles=shuffles, seed=seed, controls=controlled)
    found |= {"step": step, "documents_without_syntax": skipped}
    if code is None:
        found["no_syntax"] = _why_no_syntax(recorder, code_domain, prepared.domains)
    if earlier:
        then = {number: recorder(read(), rows) for number, read in earlier.items()}
        found["saturation"] = summary.saturation(then, records, untrained)
        found["load_over_training"] = summary.load_over_training({**then, step: records})
    return found


def _why_no_syntax(recorder: Recorder, code_domain: str, domains: tuple[str, ...]) -> str:
    """Reason, for the page, why there are no syntax classes."""
    if recorder.stack:
        return "syntax classes are of whole documents, which are no input of an encoder-decoder"
    if code_domain in domains:
        return f"no held-out document of {code_domain!r} is Python source"
    return (
        f"no domain {code_domain!r}; code_domain names one of Python source, the only language whose syntax is known. "
        "Classes of the tokens' text are measured in every language"
    )


def _shows_rows(recorder: Recorder) -> bool:
    """Whether the model reads something other than held-out documents: an encoder's sources, rendered examples."""
    config = recorder.program.config
    return bool(recorder.stack) or bool(config.objective.lengths(config.data))


def _passages(
    recorder: Recorder, variables: dict[str, Any], prepared: pipeline.Prepared, characters: int, number: int | None
) -> list[passages.Passage]:
    """Take the beginning of one held-out document per domain: the one given, or the one with most drawable text."""
    if _shows_rows(recorder):
        return _row_passages(recorder, variables, prepared, characters)
    config = recorder.program.config
    documents: dict[str, Document] = {}
    for domain in prepared.domains:
        texts = prepared.heldout[domain]
        candidates = itertools.islice(texts, _CANDIDATES) if number is None else [texts[number]]
        beginnings = (text[:characters] for text in candidates)
        clearest = max(beginnings, key=picture.drawable)  # the first among equals
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
    pieces = [passages.pieces_of(document.text, document.spans) for document in documents.values()]
    return _of_domains(records, pieces)


def _row_passages(
    recorder: Recorder, variables: dict[str, Any], prepared: pipeline.Prepared, characters: int
) -> list[passages.Passage]:
    """Take the beginning of the first held-out rows of each domain."""
    config, piece = recorder.program.config, summary.piece_of(prepared.tokenizer)
    tokens = config.tokens_per_step
    rows = {domain: batches[:1] for domain, batches in heldout_rows(recorder, prepared, tokens).items()}
    records = recorder(variables, rows)
    texts = [[piece(int(token)) for token in records.tokens[records.domain == n]] for n in range(len(rows))]
    shown = [np.cumsum([len(part) for part in text]) <= characters for text in texts]
    pieces = [text[: kept.sum()] for text, kept in zip(texts, shown, strict=True)]
    return _of_domains(records.select(np.concatenate(shown)), pieces)


def _of_domains(records: Records, pieces: list[list[str]]) -> list[passages.Passage]:
    return [
        passages.Passage(
            domain,
            pieces[number],
            records.expert_index[:, records.domain == number],
            records.combine_weights[:, records.domain == number],
        )
        for number, domain in enumerate(records.domains)
    ]


def write(analysis: Analysis, folder: epath.Path, title: str) -> list[str]:
    """Write all files; return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    found, size = analysis.summary, analysis.summary["num_experts"]
    write_atomic(folder / "analysis.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    write_atomic(folder / "analysis.md", markdown(found, title))
    write_atomic(folder / "experts.html", explorer.explorer_page(analysis.passages, found, analysis.shown, title))
    names = ["analysis.json", "analysis.md", "experts.html", *plots.plot_all(found, folder)]
    if analysis.passages:
        picture.picture(folder / "experts.png", analysis.passages, analysis.shown, found["layers"], size)
        names.append("experts.png")
    return names
