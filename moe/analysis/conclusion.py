"""Three sentences on a summary: what the experts follow, against which null (:mod:`moe.analysis.summary`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

#: Label → how a sentence names it.
_NAMES = {
    "token": "which token it is",
    "domain": "the domain of the text",
    "domain_matched": "the domain of the text",
    "lexical_matched": "the class of the token's text (word, number, bracket, ...)",
    "syntax": "the syntax class of Python source",
}
#: Difference of two shares below which a sentence calls them about the same.
_CLOSE = 0.02
#: Labels with fewer values than this are marked in tables.
FEW_VALUES = 5


def conclude(summary: dict[str, Any]) -> list[str]:
    """Sentences for the beginning of a page, each with the null that it is measured against."""
    labels = summary["dependence"]
    sentences = [_of_label(summary, "token", "The first expert of a token depends on")] if "token" in labels else []
    if "domain_matched" in labels and "lexical_matched" in labels:
        sentences.append(_domain_or_class(summary))
    elif "domain" in labels:
        sentences.append(_of_label(summary, "domain", "It depends on"))
    return [*sentences, _repetition(summary)]


def few_values(summary: dict[str, Any]) -> str:
    """Remark on labels with few values; empty if each has enough."""
    few = {label: found[0]["values"] for label, found in summary["dependence"].items() if found}
    few = {label: values for label, values in few.items() if values < FEW_VALUES}
    if not few:
        return ""
    listed = ", ".join(f"{label.replace('_', ' ')} {values}" for label, values in few.items())
    return (
        f"Labels of few values: {listed}. Their nmi is low whatever the router does, since so few values cannot tell "
        "many experts apart: compare *explained*, and labels with as many values."
    )


def _mean(summary: dict[str, Any], label: str) -> float:
    return float(np.mean([found["explained"] for found in summary["dependence"][label]]))


def _p(values: Sequence[float]) -> str:
    return f"p ≤ {max(values):.3f} in every layer" if max(values) <= 0.05 else f"p up to {max(values):.2f}"


def _of_label(summary: dict[str, Any], label: str, begin: str) -> str:
    found = summary["dependence"][label]
    share, control = _mean(summary, label), summary["controls"].get("untrained")
    text = f"{begin} {_NAMES[label]}: this explains {share:.0%} of the expert's entropy beyond permutations of the "
    text += f"label (mean over layers, {_p([d['p_value'] for d in found])})"
    if control is None or label not in control["dependence"]:
        return text + "."
    random = _mean(control, label)
    if abs(share - random) < _CLOSE:
        return f"{text}, about as much as with untrained routers ({random:.0%}), so that training did not add it."
    verdict = "more" if share > random else "less"
    return f"{text}, {verdict} than with untrained routers ({random:.0%})."


def _domain_or_class(summary: dict[str, Any]) -> str:
    domain, lexical = _mean(summary, "domain_matched"), _mean(summary, "lexical_matched")
    values = summary["dependence"]["domain_matched"][0]["values"]
    both = f"{_NAMES['domain']} explains {domain:.0%} and {_NAMES['lexical_matched']} {lexical:.0%}"
    if abs(domain - lexical) < _CLOSE:
        verdict = "it follows neither more than the other"
    else:
        verdict = f"it follows {_NAMES['domain' if domain > lexical else 'lexical_matched']} more"
    return f"On the same tokens and with {values} values each, {both}, beyond permutations of the label: {verdict}."


def _repetition(summary: dict[str, Any]) -> str:
    rows = [row for of_layers in summary["repetition"]["first"].values() for row in of_layers]
    observed, token = (float(np.mean([row[key] for row in rows])) for key in ("observed", "token_mean"))
    p = _p([row["token_p_value"] for row in rows]).replace("in every layer", "everywhere")
    text = f"Neighbouring tokens have the same first expert in {observed:.0%} of cases, and in {token:.0%} once the "
    text += f"experts are exchanged among occurrences of the same token ({p}): "
    if abs(observed - token) < _CLOSE:
        return text + "the token alone accounts for it, context for next to nothing."
    return text + f"context accounts for the {'rest' if observed > token else 'difference'}."
