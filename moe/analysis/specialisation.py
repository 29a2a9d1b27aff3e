"""Specialisation of experts, per MoE layer: repetition along the text, and dependence on labels of the tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from moe.analysis.dependence import Dependence, dependence, frequent
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
        records: as in :func:`moe.analysis.summary.summarise`, like ``code``, ``piece`` and ``shuffles``.
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
    result: dict[str, list[dict[str, Any]]] = {}
    if len(records.domains) > 1:
        result["domain"] = _over_layers(records, records.domain, shuffles, rng)
        result |= _matched(records, lexical_classes(records.tokens, piece), shuffles, rng)
    result["token"] = token_dependence(records, shuffles, rng)
    if code is not None:
        code = code.select(code.marks["syntax"] != NONE)
        result |= {
            "syntax": _over_layers(code, code.marks["syntax"], shuffles, rng),
            "token_in_code": token_dependence(code, shuffles, rng),
        }
    return {label: layers for label, layers in result.items() if layers}


def token_dependence(records: Records, shuffles: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Dependence on the token's identity per layer, over tokens that occur AT_LEAST times; empty if none does."""
    labels = np.where(frequent(records.tokens, AT_LEAST), records.tokens, -1)
    return _over_layers(records, labels, shuffles, rng) if (labels >= 0).any() else []


def _over_layers(of: Records, labels: np.ndarray, shuffles: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    return [_numbers(dependence(first, labels, of.row, shuffles=shuffles, rng=rng)) for first in of.first_choice]


def _matched(
    records: Records, lexical: np.ndarray, shuffles: int, rng: np.random.Generator
) -> dict[str, list[dict[str, Any]]]:
    """Dependence on the domain and on lexical classes with the same number of labels, on the same tokens.

    Labels are merged to the smaller of the two numbers so as to keep what they tell about the expert. The tokens of
    even rows decide which labels are merged; the tokens of odd rows are measured.
    """
    fit = records.row % 2 == 0
    if fit.all() or not fit.any():
        return {}
    values = min(len(np.unique(records.domain)), len(np.unique(lexical)))
    rest = records.select(~fit)
    result: dict[str, list[dict[str, Any]]] = {"domain_matched": [], "lexical_matched": []}
    for own, measured in zip(records.first_choice, rest.first_choice, strict=True):
        for name, labels in (("domain_matched", records.domain), ("lexical_matched", lexical)):
            groups = merge_labels(labels[fit], own[fit], num_labels=int(labels.max()) + 1, values=values)
            merged = groups[labels[~fit]]
            result[name].append(_numbers(dependence(measured, merged, rest.row, shuffles=shuffles, rng=rng)))
    return result


def _numbers(found: Dependence) -> dict[str, Any]:
    derived = ("nmi", "nmi_null", "nmi_null_std", "nmi_debiased", "explained")
    return dataclasses.asdict(found) | {name: getattr(found, name) for name in derived}
