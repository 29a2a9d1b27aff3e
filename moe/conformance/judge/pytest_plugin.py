"""The pytest fixture ``moe_oracle``; JAX is imported by the tests that use it."""

from __future__ import annotations

import types

import pytest


@pytest.fixture(scope="session")
def moe_oracle() -> types.ModuleType:
    """The oracle: ``moe_oracle.check(record(block), rule="mixtral")`` fails with the diagnosis."""
    from . import checking  # noqa: PLC0415  # pytest imports plugins at every start

    return checking
