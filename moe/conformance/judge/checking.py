"""A check of recorded arrays that raises the diagnosis: for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from . import evidence
from .diagnosis import Diagnosis, diagnose, page
from .named_rules import find_rule
from .rule import Rule


def check(recorded: Mapping[str, Any], rule: str | Rule, *, tolerance: float = 1e-4, **changes: Any) -> Diagnosis:
    """Compare what a layer computed with its rule.

    Args:
        recorded: arrays of :func:`moe_conform.torch_recorder.record`, or others of docs/conform.md.
        rule: a :class:`Rule`, or a name such as ``mixtral``.
        tolerance: relative error within which values are equal.
        changes: fields of the rule that differ, such as ``k=4``.

    Raises:
        AssertionError: the layer does not conform; the message is the diagnosis.
        InputError: no such rule, or arrays that are missing or of a wrong shape.
    """
    __tracebackhide__ = True  # pytest then shows the diagnosis only
    stated = find_rule(rule, **changes)
    arrays = {name: np.asarray(array) for name, array in recorded.items()}
    found = diagnose(stated, *evidence.from_arrays(arrays, "recorded"), tolerance=tolerance)
    if not found.conforms:
        raise AssertionError(page(stated, found))
    return found
