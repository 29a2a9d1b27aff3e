"""Settings as fields of frozen dataclasses: bounds and other facts as metadata, and the checks that read them."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import signal
import typing
from collections.abc import Iterator

import numpy as np

from moe.system.exit_codes import INTERRUPTED, START_AGAIN

#: Limits of int and float fields: values go to devices as int32 and float32.
LARGEST, LARGEST_FLOAT = 2**31 - 1, 3.4e38

#: Smallest normal float32; below it, devices round to 0.
SMALLEST_FLOAT = 1.18e-38

#: Limit of entries in a tuple field.
LONGEST_TUPLE = 10_000

type_hints = functools.cache(typing.get_type_hints)


class ConfigError(ValueError):
    """An invalid setting; the message names the field and what is allowed. It is one line, cut if long."""

    def __init__(self, message: str):
        message = " ".join(line.strip() for line in message.splitlines() if line.strip())
        super().__init__(message if len(message) <= 2000 else f"{message[:1000]} ... {message[-1000:]}")


@contextlib.contextmanager
def exits_as_errors() -> Iterator[None]:
    """Raise ImportError where a user's code calls sys.exit, which would end this program silently, or raises something
    else that is no Exception.

    Exits with the code of a stop signal pass unchanged, as does Ctrl-C where no handler of ours makes it such an exit.
    """
    try:
        yield
    except Exception:
        raise
    except SystemExit as error:
        if error.code in (START_AGAIN, INTERRUPTED):
            raise
        raise ImportError(f"it calls sys.exit({error.code!r})") from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            raise
        raise ImportError(f"it raises {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def raised_as_errors(what: str) -> Iterator[None]:
    """Raise errors of a user's code again as ConfigErrors that begin with ``what``."""
    try:
        with exits_as_errors():
            yield
    except ConfigError:
        raise
    except Exception as error:  # a user's code may raise anything
        raise ConfigError(f"{what} raises {type(error).__name__}: {error}") from error


def setting(default: typing.Any, **facts: typing.Any) -> typing.Any:
    """A dataclass field with facts.

    Args:
        default: its default.
        **facts: ``least`` and ``most``, inclusive bounds; ``above`` and ``below``, exclusive ones; ``share``: in [0,
            1). ``resume``: a run may be continued with another value, since it does not change what is learnt ("free"),
            or from its newest checkpoint on ("later"); else it may not. ``split``: the mesh axis over which this
            dimension is split, whose size must divide it. ``unit``: what is counted. ``follows``: the field that
            decides the value where it is the default. ``result``: another value changes what is learnt but not what a
            trained model computes ("training"), or nothing beyond rounding ("none"); else both. ``neutral``: the value
            with which a run's identity leaves the field out, if it is not the default; None: there is none.
            ``switch``: its default turns the section off. ``page``: the playground's page computes only the default.
    """
    return dataclasses.field(default=default, metadata=facts)


def is_off(section: typing.Any) -> bool:
    """Return True for a section whose switch has its default, so that its other fields are not read."""
    fields = dataclasses.fields(section)
    return any("switch" in field.metadata and getattr(section, field.name) == field.default for field in fields)


def require(holds: bool, field: str, value: typing.Any, allowed: str) -> None:
    """Raise a ConfigError that names the field, its value and what is allowed, unless the condition holds."""
    if not holds:
        raise ConfigError(f"{field}={value!r}: {allowed}")


def check_fields(node: typing.Any, section: str) -> None:
    """Check every field of a dataclass against its type and the bounds in its metadata.

    Args:
        node: the dataclass.
        section: prefix of its fields in messages, such as ``model.moe.``.

    Raises:
        ConfigError: the first value that does not fit.
    """
    hints = type_hints(type(node))
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if not dataclasses.is_dataclass(value):
            check_type(hints[field.name], value, f"{section}{field.name}")
        check_bounds(f"{section}{field.name}", value, field.metadata)


class Section:
    """Base of the config's dataclasses: fields are checked against their types and bounds at construction."""

    #: Prefix of the fields in messages.
    _path: typing.ClassVar[str] = ""

    def __init_subclass__(cls, path: str | None = None, **further: typing.Any) -> None:
        super().__init_subclass__(**further)
        if path is not None:
            cls._path = path

    def __new__(cls, *values: typing.Any, **named: typing.Any) -> typing.Self:
        """Refuse names of fields that a section lacks, for which a dataclass raises a TypeError."""
        del values
        known = [field.name for field in dataclasses.fields(typing.cast(typing.Any, cls)) if field.init]
        for name in sorted(named.keys() - set(known)):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {cls._path}{near[0]}?" if near else f"fields here: {', '.join(known)}"
            raise ConfigError(f"{cls._path}{name}: no such field; {hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_fields(self, self._path)

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        """Refuse the value of one field unless the condition holds."""
        require(holds, f"{self._path}{name}", getattr(self, name), allowed)


def facts_of(cls: typing.Any, fact: str, section: str = "") -> dict[str, typing.Any]:
    """Dotted name → value of this fact, for the fields of a dataclass, nested ones included, that have it."""
    found: dict[str, typing.Any] = {}
    for field in dataclasses.fields(cls):
        name, hint = f"{section}{field.name}", type_hints(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            found |= facts_of(hint, fact, f"{name}.")
        elif fact in field.metadata:
            found[name] = field.metadata[fact]
    return found


def check_bounds(field: str, value: typing.Any, facts: typing.Mapping[str, typing.Any]) -> None:
    """Raise a ConfigError for a value outside the bounds of :func:`setting`."""
    low, high = (facts.get(one, facts.get(other)) for one, other in (("least", "above"), ("most", "below")))
    if (low, high) == (0, 1):
        inside = (value > 0 or (value == 0 and "least" in facts)) and (value < 1 or (value == 1 and "most" in facts))
        left, right = "[" if "least" in facts else "(", "]" if "most" in facts else ")"
        require(inside, field, value, f"must be in {left}0, 1{right}")
        return
    if "least" in facts:
        require(value >= facts["least"], field, value, f"must be at least {facts['least']}")
    if "above" in facts:
        above = "must be positive" if facts["above"] == 0 else f"must be above {facts['above']}"
        require(value > facts["above"], field, value, above)
    if "most" in facts:
        require(value <= facts["most"], field, value, f"must be at most {facts['most']}")
    if facts.get("share"):
        require(value >= 0 and float(np.float32(value)) < 1, field, value, "must be in [0, 1), in float32")
    if "below" in facts:
        require(value < facts["below"], field, value, f"must be below {facts['below']}")


def item_name(hint: typing.Any) -> str:
    """Description of a tuple's entries."""
    return "names" if typing.get_origin(hint) is typing.Literal else hint.__name__


def check_type(hint: typing.Any, value: typing.Any, field: str) -> typing.Any:
    """Check the value of a field and convert it to its type: a list becomes a tuple, an int a float.

    Raises:
        ConfigError: another type, a number that devices cannot hold, a text that is not UTF-8.
    """
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if isinstance(value, (list, tuple)):
            if len(value) > LONGEST_TUPLE:
                raise ConfigError(f"{field}: has {len(value)} entries; must have at most {LONGEST_TUPLE}")
            return tuple(check_type(item, entry, field) for entry in value)
        raise ConfigError(f"{field}={value!r}: must be a tuple of {item_name(item)}")
    if typing.get_origin(hint) is typing.Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"{field}={value!r}: must be one of {', '.join(typing.get_args(hint))}")
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and number:
        if not abs(value) <= LARGEST_FLOAT:
            raise ConfigError(f"{field}={value!r}: must be a finite number, in float32")
        if 0 < abs(value) < SMALLEST_FLOAT:
            raise ConfigError(f"{field}={value!r}: rounds to 0 in float32")
        return float(value)
    if not isinstance(value, hint) or (hint is int and not number):
        raise ConfigError(f"{field}={value!r}: must be {hint.__name__}, not {type(value).__name__}")
    if hint is int and abs(value) > LARGEST:
        raise ConfigError(f"{field}={value!r}: must be at most {LARGEST}")
    if isinstance(value, str) and any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value):
        raise ConfigError(f"{field}={value!r}: must be valid UTF-8 without the character NUL")
    return value


def whole_number(text: str) -> int | None:
    """Parse up to nine ASCII digits; None for other text, such as ² or 5,000 digits."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
