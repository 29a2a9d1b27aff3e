"""Specialisation of experts, per MoE layer: repetition along the text, and dependence on labels of the tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from moe.analysis.dependence import dependence, frequent
from moe.analysis.lexical import CLASSES as LEXICAL
from moe.analysis.lexical import lexical_classes, merge_labels
from moe.analysis.record import Records
from moe.analysis.repetition import repetition, token_null
from moe.analysis.syntax import NONE

#: Minimum occurrences of a token in statistics of token identity.
AT_LEAST = 20


def specialise(
    records: Records, code: Records | None, piece: Callable[[int], str], shuffles: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Measures repetition and dependence of a model's or a control's records.

    Args:
        records: records of rows per domain.
        code: records of whole Python documents with the mark ``syntax``, or None.
        piece: token id → its text.
        shuffles: permutations per null distribution.
        rng: random generator of the permutations.
    """
    return {
        "repetition": _repetitions(records, shuffles, rng),
        "dependence": _dependences(records, code, piece, shuffles, rng),
    }


def _repetitions(records: Records, shuffles: int, rng: np.random.Generator) -> dict[str, Any]:
    result: dict[str, Any] = {"first": {}}
    if records.expert_index.shape[-1] >= 2:
        result["first_or_second"] = {}
    for number, domain in enumerate(records.domains):
        own = records.select(records.domain == number)
        if len(own.consecutive) == 0:
            continue
        for choices, by_domain in enumerate(result.values(), start=1):
            by_domain[domain] = [_repetition(own, index[:, :choices], shuffles, rng) for index in own.expert_index]
    return result


def _repetition(own: Records, experts: np.ndarray, shuffles: int, rng: np.random.Generator) -> dict[str, Any]:
    found = repetition(experts, own.consecutive, own.num_experts, shuffles=shuffles, rng=rng)
    null = token_null(experts, own.tokens, own.consecutive, shuffles=shuffles, rng=rng)
    return dataclasses.asdict(found) | dataclasses.asdict(null)


def _dependences(
    records: Records, code: Records | None, piece: Callable[[int], str], shuffles: int, rng: np.random.Generator
) -> dict[str, Any]:
    def over_layers(of: Records, labels: np.ndarray, units: np.ndarray | None = None) -> list[dict[str, Any]]:
        found = [dependence(first, labels, shuffles=shuffles, rng=rng, units=units) for first in of.first_choice]
        derived = ("nmi", "nmi_null", "nmi_null_std", "nmi_debiased", "explained")
        return [dataclasses.asdict(d) | {name: getattr(d, name) for name in derived} for d in found]

    def token_identity(of: Records) -> list[dict[str, Any]]:
        of = of.select(frequent(of.tokens, AT_LEAST))
        return over_layers(of, of.tokens) if len(of.tokens) else []

    result: dict[str, list[dict[str, Any]]] = {}
    if len(records.domains) > 1:
        # The same tokens and the same number of labels for both, so that their shares compare.
        values = min(len(records.domains), len(LEXICAL))
        domain = merge_labels(records.domain, values)
        lexical = merge_labels(lexical_classes(records.tokens, piece), values)
        result["domain"] = over_layers(records, records.domain, units=records.row)
        if len(records.domains) > values:
            result["domain_matched"] = over_layers(records, domain, units=records.row)
        result["lexical_matched"] = over_layers(records, lexical)
    result["token"] = token_identity(records)
    if code is not None:
        code = code.select(code.marks["syntax"] != NONE)
        result |= {"syntax": over_layers(code, code.marks["syntax"]), "token_in_code": token_identity(code)}
    return {label: layers for label, layers in result.items() if layers}
