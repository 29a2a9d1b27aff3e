"""Write the pages of all settings from the schema itself: docs/settings/run.md, model.md and moe.md."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from moe.programs import cli
from moe.system.atomic_files import write_atomic
from moe.system.escaping import markdown_table
from moe.system.fields import type_hints

if typing.TYPE_CHECKING:
    from moe.config.moe_section import MoEConfig
    from moe.routing.interface import Gate

_FOLDER = flags.DEFINE_string("folder", "docs/settings", "Folder of the pages.")

_HEAD = """# Settings of {title}

Settings with their types, defaults, bounds and meanings, from the schema: `scripts/settings_pages.py` writes this
page and those of {others}.
`--config.SECTION.FIELD=VALUE` sets one. *Resume*: a run may be continued with another value: `free`, as it does not
change what is learnt, or `later`, from its newest checkpoint on with `--change`; else it may not.
"""

_GATES = """## Gates

Fields of `model.moe.gate` by its name ([gates](../gates.md)). Losses that are not listed have weight 0.
"""

#: Page of the sections whose path starts with a prefix, and its title; the last prefix that fits counts.
_PAGES = {
    "": ("run.md", "a run"),
    "model": ("model.md", "a model"),
    "model.moe": ("moe.md", "MoE layers"),
}


def pages() -> dict[str, str]:
    """File name → page."""
    from moe.config.schema import Config

    parts: dict[str, list[str]] = {}
    for name, title in _PAGES.values():
        others = [f"[{other}]({file})" for file, other in _PAGES.values() if file != name]
        parts[name] = [_HEAD.format(title=title, others=" and ".join(others))]
    for section, values in _sections(Config(), ""):
        title = f"`{section}`" if section else "The run"
        summary = f"{inspect.getdoc(type(values))}\n".split("\n\n")[0].replace("\n", " ").strip()
        page = [name for prefix, (name, _) in _PAGES.items() if section.startswith(prefix)][-1]
        parts[page] += [f"## {title}\n", f"{summary}\n", _table(values)]
    parts["moe.md"] += [_GATES, _gates()]
    return {name: "\n".join(page) for name, page in parts.items()}


def _sections(values: typing.Any, path: str) -> Iterator[tuple[str, typing.Any]]:
    """Path and default of a section and of those in it; settings that follow others have their own default."""
    yield path, values
    for field in dataclasses.fields(values):
        if dataclasses.is_dataclass(type_hints(type(values))[field.name]):
            yield from _sections(field.default, f"{path}.{field.name}".lstrip("."))


def _table(values: typing.Any) -> str:
    from moe.config.mixers import Mixer
    from moe.routing.interface import Gate

    rows = []
    cls = type(values)
    meanings, hints = _comments(cls), type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        default = getattr(values, field.name)
        if hints[field.name] in (Gate | None, Mixer | None):
            default, hint = getattr(default, "name", "none"), "a name, or a section"
        else:
            hint = _type(hints[field.name])
        hint += f", {field.metadata['unit']}" if "unit" in field.metadata else ""
        cells = [f"`{field.name}`", hint, f"`{default}`" if default != "" else "empty", _bounds(field.metadata)]
        rows.append([*cells, field.metadata.get("resume", ""), meanings.get(field.name, "")])
    return markdown_table(("field", "type", "default", "bounds", "resume", "meaning"), rows) + "\n"


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
    words = {"least": "≥ {}", "above": "> {}", "most": "≤ {}", "below": "< {}", "split": "divided by mesh.{}"}
    bounds = [word.format(facts[name]) for name, word in words.items() if name in facts]
    return ", ".join(["[0, 1)"] * bool(facts.get("share")) + bounds)


def _gates() -> str:
    from moe.config.registry import LAYERS

    head = ("name", "class", "fields and defaults", "K", "capacity, train / eval", "losses and others")
    rows = []
    for name, layer in LAYERS.items():
        gate = typing.cast("Gate", layer.gate)
        own = [f"`{key}={value}`" for key, value in dataclasses.asdict(gate).items() if key != "name"]
        k = (
            str(gate.experts_per_token(layer.num_experts))
            if hasattr(gate, "k") or not gate.lists_all
            else "every expert"
        )
        k += " on average" * (gate.lists_all and hasattr(gate, "k"))
        capacity = f"{layer.capacity.train:g} / {layer.capacity.eval:g}"
        rows.append((f"`{name}`", f"`{type(gate).__name__}`", ", ".join(own), k, capacity, _constants(layer)))
    return markdown_table(head, rows) + "\n"


def _constants(layer: MoEConfig) -> str:
    """Settings that a layer's name brings besides gate and capacity, where it differs from the fields' defaults."""
    losses, others = dataclasses.fields(layer.losses), dataclasses.fields(layer)
    found = [(f"losses.{field.name}", getattr(layer.losses, field.name), field.default) for field in losses]
    found += [(field.name, getattr(layer, field.name), field.default) for field in others]
    return ", ".join(
        f"`{name}={value}`"
        for name, value, default in found
        if value != default and not dataclasses.is_dataclass(value)
    )


def main() -> None:
    """Write the pages."""
    for name, page in pages().items():
        write_atomic(Path(_FOLDER.value, name), page)


if __name__ == "__main__":
    cli.run(
        main,
        examples=(
            "python scripts/settings_pages.py",
            "python scripts/settings_pages.py --folder=/tmp/settings",
        ),
    )
