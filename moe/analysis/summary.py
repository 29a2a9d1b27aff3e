"""All routing measures of a checkpoint as a tree of plain numbers, ready for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moe.analysis import measures
from moe.analysis.dependence import dependence, frequent
from moe.analysis.documents import Document, document_batches
from moe.analysis.record import Records
from moe.analysis.repetition import repetition
from moe.analysis.syntax import CLASSES, NONE, token_classes
from moe.data.tokenizer import Tokenizer
from moe.routing.balancing import max_violation

#: Minimum occurrences of a token in statistics of token identity.
AT_LEAST = 20
_TOP_TOKENS = 8  # tokens listed per expert


def code_batches(
    documents: Sequence[Document], sequence_length: int, batch_size: int, *, keep: int = 0
) -> tuple[list[dict[str, np.ndarray]], int]:
    """Returns batches of the Python documents with the mark ``syntax``, and the number of other documents.

    ``keep``: see :func:`moe.analysis.documents.document_batches`.
    """
    classes = [(document, token_classes(document)) for document in documents]
    valid = [(document, found) for document, found in classes if found is not None]
    if not valid:
        return [], len(documents)
    kept, found = zip(*valid, strict=True)
    return document_batches(kept, {"syntax": found}, sequence_length, batch_size, keep), len(documents) - len(kept)


def summarise(
    records: Records, code: Records | None, piece: Callable[[int], str], *, shuffles: int, seed: int
) -> dict[str, Any]:
    """Computes every measure per layer.

    Args:
        records: records of rows per domain.
        code: records of whole Python documents with the mark ``syntax``, or None.
        piece: token id → its text.
        shuffles: permutations per null distribution.
        seed: seed of all permutations.

    Returns:
        layers, domains, num_experts, experts_per_token, tokens (per domain), shuffles, seed, at_least;
        load [L][domain][E], max_violation [L][domain], router_entropy [L];
        repetition: "first" and, with K ≥ 2, "first_or_second" → domain → [L]
        :class:`moe.analysis.repetition.Repetition`;
        dependence: "domain" (over at least two), "token", "syntax" and "token_in_code" → [L]
        :class:`moe.analysis.dependence.Dependence` with nmi, nmi_null, nmi_null_std, nmi_debiased and explained;
        syntax_classes, code_tokens, code_documents, syntax_load [L][class][E] share of first choices;
        coactivation [L][E][E] counts; top_tokens [L][E] of piece, count, total, lift. All as plain lists and dicts.
    """
    rng = np.random.default_rng(seed)
    size, domains = records.num_experts, records.domains
    load = measures.expert_load(records.expert_index, records.chosen, records.domain, len(domains), size)
    summary: dict[str, Any] = {
        "layers": list(records.layers),
        "domains": list(domains),
        "num_experts": size,
        "experts_per_token": records.expert_index.shape[-1],
        "tokens": np.bincount(records.domain, minlength=len(domains)).tolist(),
        "shuffles": shuffles,
        "seed": seed,
        "at_least": AT_LEAST,
        "load": load.tolist(),
        "max_violation": max_violation(load).tolist(),
        "router_entropy": measures.mean_entropy(records.router_probs).tolist(),
        "repetition": _repetitions(records, shuffles, rng),
        "dependence": _dependences(records, code, shuffles, rng),
        "coactivation": measures.coactivation(records.expert_index, records.chosen, size).tolist(),
        "top_tokens": [
            [
                [{"piece": piece(t.token), **dataclasses.asdict(t)} for t in of_expert]
                for of_expert in measures.top_tokens(first, records.tokens, size, at_least=AT_LEAST, number=_TOP_TOKENS)
            ]
            for first in records.first_choice
        ],
    }
    if code is not None:
        code = code.select(code.marks["syntax"] != NONE)
        first, everything = code.expert_index[..., :1], np.ones_like(code.expert_index[..., :1], bool)
        shares = measures.expert_load(first, everything, code.marks["syntax"], len(CLASSES), size)
        summary |= {"syntax_classes": list(CLASSES), "syntax_load": shares.tolist()}
        summary |= {"code_tokens": len(code.tokens), "code_documents": len(np.unique(code.marks["document"]))}
    return summary


def _repetitions(records: Records, shuffles: int, rng: np.random.Generator) -> dict[str, Any]:
    result: dict[str, Any] = {"first": {}}
    if records.expert_index.shape[-1] >= 2:
        result["first_or_second"] = {}
    for number, domain in enumerate(records.domains):
        own = records.select(records.domain == number)
        if len(own.consecutive) == 0:
            continue
        for choices, by_domain in enumerate(result.values(), start=1):
            by_domain[domain] = [
                dataclasses.asdict(
                    repetition(index[:, :choices], own.consecutive, records.num_experts, shuffles=shuffles, rng=rng)
                )
                for index in own.expert_index
            ]
    return result


def _dependences(records: Records, code: Records | None, shuffles: int, rng: np.random.Generator) -> dict[str, Any]:
    def over_layers(of: Records, labels: np.ndarray, units: np.ndarray | None = None) -> list[dict[str, Any]]:
        found = [dependence(first, labels, shuffles=shuffles, rng=rng, units=units) for first in of.first_choice]
        derived = ("nmi", "nmi_null", "nmi_null_std", "nmi_debiased", "explained")
        return [dataclasses.asdict(d) | {name: getattr(d, name) for name in derived} for d in found]

    def of_tokens(of: Records) -> list[dict[str, Any]]:
        of = of.select(frequent(of.tokens, AT_LEAST))
        return over_layers(of, of.tokens) if len(of.tokens) else []

    result = {"token": of_tokens(records)}
    if len(records.domains) > 1:
        result = {"domain": over_layers(records, records.domain, units=records.row), **result}
    if code is not None:
        code = code.select(code.marks["syntax"] != NONE)
        result |= {"syntax": over_layers(code, code.marks["syntax"]), "token_in_code": of_tokens(code)}
    return {label: layers for label, layers in result.items() if layers}


def saturation(earlier: Mapping[int, Records], final: Records) -> dict[str, Any]:
    """Computes router saturation of the same tokens over checkpoints.

    Args:
        earlier: step → records, in order.
        final: records of the last checkpoint.

    Returns:
        steps; top_k and top_1: [steps][L]; chance_top_k = K/E (K: mean assignments per token) and chance_top_1 = 1/E.
    """
    size = final.num_experts

    def members(records: Records, choices: int | None) -> np.ndarray:
        return measures.membership(records.expert_index[..., :choices], records.chosen[..., :choices], size)

    return {
        "steps": list(earlier),
        "top_k": [measures.saturation(members(r, None), members(final, None)).tolist() for r in earlier.values()],
        "top_1": [measures.saturation(members(r, 1), members(final, 1)).tolist() for r in earlier.values()],
        "chance_top_k": float(final.chosen.sum(-1).mean() / size),
        "chance_top_1": 1 / size,
    }


def piece_of(tokenizer: Tokenizer) -> Callable[[int], str]:
    """Returns token id → its text with leading space; «id» for control tokens and single bytes."""

    def piece(token: int) -> str:
        size = int(tokenizer.token_bytes[token])
        # Decode it twice: some tokenizers drop a space at the beginning of a text.
        text = tokenizer.decode([token, token]).encode()[-size:].decode(errors="replace") if size else ""
        return f"«{token}»" if not text or "\N{REPLACEMENT CHARACTER}" in text else text

    return piece
