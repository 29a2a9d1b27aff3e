"""Linear combinations of results, as claims write them: "max_violation[none] - 2 max_violation[aux_0.01] - 1"."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

#: An optional sign, an optional factor, and quantity[arm, option=value, ...]; or a number alone.
_TERM = re.compile(
    r"\s*(?P<sign>[+-])?\s*(?:(?P<factor>\d+(?:\.\d+)?)\s*)?(?:(?P<name>[A-Za-z_][\w/.]*)\[(?P<inside>[^\]]+)\])?"
)


@dataclasses.dataclass(frozen=True)
class Term:
    """factor · quantity of an arm; a constant if ``quantity`` is empty.

    Attributes:
        factor: with its sign.
        quantity: as in results.csv.
        variant: arm.
        first: at the first evaluation instead of the last step.
        layers: "" for the mean over all layers, "3" for one, "1-" for the mean from one on.
    """

    factor: float
    quantity: str = ""
    variant: str = ""
    first: bool = False
    layers: str = ""


def parse(text: str) -> list[Term]:
    """Terms of an expression.

    Raises:
        ValueError: the text is not a linear combination.
    """
    terms, position = [], 0
    while position < len(text.rstrip()):
        match = _TERM.match(text, position)
        if match is None or match.end() == position or not (match["factor"] or match["name"]):
            raise ValueError(f"value={text!r}: not understood from {text[position:]!r} on")
        if terms and not match["sign"]:
            raise ValueError(f"value={text!r}: + or - missing before {text[position:]!r}")
        factor = float(match["factor"] or 1) * (-1 if match["sign"] == "-" else 1)
        terms.append(_term(factor, match["name"], match["inside"], text) if match["name"] else Term(factor))
        position = match.end()
    if not any(term.quantity for term in terms):
        raise ValueError(f"value={text!r}: names no quantity[arm]")
    return terms


def variants_of(terms: Iterable[Term]) -> list[str]:
    """Distinct arms of the terms, in order."""
    return list(dict.fromkeys(term.variant for term in terms if term.quantity))


def _term(factor: float, quantity: str, inside: str, text: str) -> Term:
    variant, *options = [part.strip() for part in inside.split(",")]
    first, layers = False, ""
    for option in options:
        name, _, value = option.partition("=")
        if (name, value) == ("step", "first"):
            first = True
        elif name == "layer" and re.fullmatch(r"\d+-?", value):
            layers = value
        else:
            raise ValueError(f"value={text!r}: option {option!r} must be step=first, layer=N or layer=N-")
    return Term(factor, quantity, variant, first, layers)
