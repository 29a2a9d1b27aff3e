"""Guards of a user's objective: errors that name it and its method, and checks of what the method returns."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moe.system.fields import raised_as_errors
from moe.system.guarded import Guard

#: Setting that names the objective.
FIELD = "data.objective"


def of_user(objective: Any) -> bool:
    """Whether an objective is of a user's module."""
    return ":" in objective.name


def naming_objective(objective: Any, method: str) -> contextlib.AbstractContextManager[None]:
    """Raise errors of a user's method as ConfigErrors that name it; those of the package stay as they are."""
    return raised_as_errors(f"{FIELD}={objective.name!r}: {method}") if of_user(objective) else contextlib.nullcontext()


def _sums(objective: Any, sums: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*arguments: Any) -> Any:
        with naming_objective(objective, "sums"):
            found = sums(*arguments)
            numbers = {"loss": found.loss, "cross_entropy": found.cross_entropy, **found.terms}
            if wrong := [name for name, value in numbers.items() if np.shape(value)]:
                raise ValueError(f"{wrong[0]} is an array {list(np.shape(numbers[wrong[0]]))}, must be a number")
            return found

    return checked


#: Guards by method of :class:`moe.config.objectives.Objective`.
GUARDS: Mapping[str, Guard] = types.MappingProxyType({"sums": _sums})
