"""One line of the conformance table, and the error between two results."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

FLOAT32 = 1e-5


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        section: heading it stands under.
        what: what was measured.
        expected: the value or source.
        measured: the value, or the largest error.
        passes: whether it is close enough.
    """

    section: str
    what: str
    expected: str
    measured: str
    passes: bool


def spelled(fields: dict[str, Any]) -> str:
    """Settings of MoEConfig as a row names them: ``, gate.k=3, jitter=0.1``."""
    dotted: dict[str, Any] = {}
    for name, value in fields.items():
        dotted |= {f"{name}.{field}": own for field, own in value.items()} if isinstance(value, dict) else {name: value}
    return "".join(f", {name}={value}" for name, value in dotted.items())


def value(section: str, what: str, expected: float, measured: Any, tolerance: float) -> Row:
    """A number against the number it must be; tolerance is absolute."""
    measured = float(measured)
    return Row(section, what, f"{expected:.6g}", f"{measured:.6g}", abs(measured - expected) <= tolerance)


def error(actual: Any, expected: Any) -> float:
    """Largest difference over the largest expected value, of two trees."""
    worst = 0.0
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        scale = np.abs(theirs).max(initial=0.0)
        difference = np.abs(ours - theirs).max(initial=0.0)
        worst = max(worst, float(difference / scale) if scale > 0 else float(difference))
    return worst


def close(section: str, what: str, source: str, worst: float, tolerance: float) -> Row:
    """An error against its bound."""
    return Row(section, what, f"{source}, to {tolerance:.2g}", f"{worst:.2g}", worst <= tolerance)
