"""Guards around the methods of a user's objects: what they raise, or return instead of what they should, becomes one
sentence that names the user's class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

#: (object, bound method) → the method with checks around it.
Guard = Callable[[Any, Callable[..., Any]], Callable[..., Any]]


def is_own(part: object) -> bool:
    """Whether an object's class, or a class, is of a user's module."""
    kind = part if isinstance(part, type) else type(part)
    return kind.__module__.partition(".")[0] != "moe"


def guard_methods(kind: type, guards: Mapping[str, Guard]) -> None:
    """Put guards around methods of a user's class; a class of the package is left as it is.

    A base class calls this in ``__init_subclass__``. Methods are wrapped where an instance looks them up, so that the
    class, its fields, equality and hash stay the user's, as do calls of ``super()`` and of ``type(x).method``.

    Args:
        kind: the class.
        guards: by the name of the method.
    """
    if not is_own(kind) or "__getattribute__" in vars(kind):
        return

    def look_up(self: Any, name: str) -> Any:
        found = object.__getattribute__(self, name)
        return guards[name](self, found) if name in guards else found

    type.__setattr__(kind, "__getattribute__", look_up)
