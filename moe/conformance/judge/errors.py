"""The error of input that cannot be judged."""

from __future__ import annotations


class InputError(ValueError):
    """Arrays, a rule or a function that cannot be judged; the message names what, and what is allowed."""
