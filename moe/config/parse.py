"""Conversion between ConfigDict trees and the typed Config, with checks of names and types."""

from __future__ import annotations

import dataclasses
import difflib
import typing

import ml_collections

from moe.config.schema import Config
from moe.fields import ConfigError, check_type, item_name, type_hints


class _TrackedConfigDict(ml_collections.ConfigDict):
    """ConfigDict that remembers which of its fields were assigned; see :func:`assigned_fields`."""

    def __setitem__(self, key: str, value: typing.Any) -> None:
        super().__setitem__(key, value)
        self.__dict__.setdefault("_assigned", set()).add(key)


def assigned_fields(tree: ml_collections.ConfigDict, path: str = "") -> set[str]:
    """Dotted names of the fields that a config file or the command line set in a tree of :func:`to_config_dict`."""
    assigned = tree.__dict__.get("_assigned", set())
    names = {path + name for name in assigned}
    for name, value in tree.items():
        if isinstance(value, ml_collections.ConfigDict):
            names |= assigned_fields(value, f"{path}{name}.")
    return names


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """Convert to a locked, type-checked ConfigDict, for files in ``configs/`` and command-line overrides."""

    def convert(node: typing.Any) -> ml_collections.ConfigDict:
        result = _TrackedConfigDict()
        hints = type_hints(type(node))
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                value = convert(value)
            elif hints[field.name] is float:
                value = float(value)
            result[field.name] = value
        result.__dict__["_assigned"] = set()
        return result.lock()

    return convert(config)


def to_dict(config: Config) -> dict[str, typing.Any]:
    """Convert to a nested dict of JSON types and tuples."""
    return dataclasses.asdict(config)


def check_field(path: str) -> None:
    """Check that a dotted name such as ``model.moe.num_experts`` is a field of :class:`Config`.

    Raises:
        ConfigError: it is not; the message has the nearest name.
    """
    cls: typing.Any = Config
    *sections, last = path.split(".")
    for depth, name in enumerate(sections):
        _check_name(cls, name, "".join(f"{section}." for section in sections[:depth]))
        cls = type_hints(cls)[name]
        if not dataclasses.is_dataclass(cls):
            raise ConfigError(f"{path}: {'.'.join(sections[: depth + 1])} is a single value, not a section")
    _check_name(cls, last, "".join(f"{section}." for section in sections))


def type_name(path: str) -> str:
    """Description of the values that a field takes, for error messages."""
    hint: typing.Any = Config
    for name in path.split("."):
        hint = type_hints(hint)[name]
    if dataclasses.is_dataclass(hint):
        return f"set by its fields: {', '.join(field.name for field in dataclasses.fields(hint))}"
    if typing.get_origin(hint) is tuple:
        return f"a tuple of {item_name(typing.get_args(hint)[0])}, as in ('a','b') or (1,2)"
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    return hint.__name__


def _check_name(cls: typing.Any, name: str, path: str) -> None:
    hints = type_hints(cls)
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=1)
        hint = f"did you mean {path}{near[0]}?" if near else f"fields here: {', '.join(hints)}"
        raise ConfigError(f"{path}{name}: no such field; {hint}")


def build(cls: type, tree: dict[str, typing.Any], path: str) -> typing.Any:
    """Build a dataclass from a nested dict, checking names and types; ``path`` is the prefix of fields in messages."""
    hints = type_hints(cls)
    for name in tree:
        _check_name(cls, name, path)
    values = {}
    for name, value in tree.items():
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, (dict, ml_collections.ConfigDict)):
                raise ConfigError(f"{path}{name}={value!r}: is a section; set its fields instead")
            values[name] = build(typing.cast(type, hints[name]), dict(value.items()), f"{path}{name}.")
        else:
            values[name] = check_type(hints[name], value, f"{path}{name}")
    return cls(**values)
