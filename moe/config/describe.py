"""The pages of all settings, from the schema itself: ``python -m moe.config.describe docs`` writes them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

from moe.config.moe_section import MoEConfig
from moe.config.registry import LAYERS
from moe.config.schema import Config
from moe.fields import type_hints
from moe.routing.interface import Gate

_HEAD = """# {title}

Settings with their types, defaults, bounds and meanings, from the schema: `python -m moe.config.describe docs` writes
this page and [the other]({other}). `--config.SECTION.FIELD=VALUE` sets one. *Resume*: a run may be
continued with another value: `free`, as it does not change what is learnt, or `later`, from its newest checkpoint on
with `--change`; else it may not.
"""


def pages() -> dict[str, str]:
    """File name → page: the settings of a run, and those of its model."""
    run, model = "settings.md", "model_settings.md"
    parts = {
        run: [_HEAD.format(title="Settings of a run", other=model)],
        model: [_HEAD.format(title="Settings of a model", other=run)],
    }
    for section, cls in _sections(Config, ""):
        title = f"`{section}`" if section else "The run"
        summary = f"{inspect.getdoc(cls)}\n".split("\n\n")[0].replace("\n", " ").strip()
        parts[model if section.startswith("model") else run] += [f"## {title}\n", f"{summary}\n", _table(cls)]
    parts[model] += ["## Gates\n\nFields of `model.moe.gate` by its name ([gates](gates.md)).\n", _gates()]
    return {name: "\n".join(page) for name, page in parts.items()}


def _sections(cls: type, path: str) -> Iterator[tuple[str, type]]:
    yield path, cls
    for field in dataclasses.fields(cls):
        hint = type_hints(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _sections(typing.cast(type, hint), f"{path}.{field.name}".lstrip("."))


def _table(cls: type) -> str:
    lines = ["| field | type | default | bounds | resume | meaning |", "|---|---|---|---|---|---|"]
    meanings, hints = _comments(cls), type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        default = field.default
        if cls is MoEConfig and field.name == "gate":
            default, hint = typing.cast(Gate, default).name, "a name, or a section"
        else:
            hint = _type(hints[field.name])
        cells = [f"`{field.name}`", hint, f"`{default}`" if default != "" else "empty", _bounds(field.metadata)]
        cells += [field.metadata.get("resume", ""), meanings.get(field.name, "")]
        lines.append(f"| {' | '.join(cell.replace('|', '\\|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _comments(cls: type) -> dict[str, str]:
    """Field → the comment after it, or the one before it that starts with ``#:``."""
    found: dict[str, str] = {}
    before: list[str] = []
    for line in inspect.getsource(cls).splitlines():
        field = re.match(r"    (\w+): [^#]*?(?:#\s*(.*))?$", line)
        if above := re.match(r"    #: (.*)", line):
            before.append(above[1])
        elif field and " = " in line:
            found[field[1]] = " ".join(filter(None, [*before, field[2] or ""]))
            before = []
        else:
            before = []
    return found


def _type(hint: typing.Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"tuple of {_type(typing.get_args(hint)[0])}"
    return hint.__name__


def _bounds(facts: typing.Mapping[str, typing.Any]) -> str:
    if facts.get("share"):
        return "[0, 1)"
    words = {"least": "≥", "above": ">", "most": "≤", "below": "<"}
    return ", ".join(f"{sign} {facts[name]}" for name, sign in words.items() if name in facts)


def _gates() -> str:
    lines = ["| name | class | fields and defaults |", "|---|---|---|"]
    for name, layer in LAYERS.items():
        own = [field.name for field in dataclasses.fields(typing.cast(Gate, layer.gate)) if field.name != "name"]
        values = ", ".join(f"`{field}={getattr(layer.gate, field)}`" for field in own)
        lines.append(f"| `{name}` | `{type(layer.gate).__name__}` | {values} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for name, page in pages().items():
        (Path(sys.argv[1]) / name).write_text(page)
