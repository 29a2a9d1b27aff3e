"""Checker of annotations that tests/fixtures.py installs: beartype, with ints allowed where floats are annotated."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check calls of a function. Constructors are not checked: jax.tree.map rebuilds dataclasses with placeholders."""
    return function if function.__name__ == "__init__" else _check(function)
