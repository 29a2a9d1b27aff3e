"""Differences of two plans, from their JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic

from moe.planner.topology import of_slices
from moe.system.fields import ConfigError
from moe.system.foreign_files import Amount, Fields, Interval, Positive, check, read_object

_Json = dict[str, Any]


class _Part(Fields):
    part: str
    seconds: Amount


class _Memory(Fields):
    capacity: Positive


class _Plan(Fields):
    """Fields of a plan that differences and their page read (:meth:`moe.planner.plan.Plan.to_json`)."""

    config: _Json
    topology: str
    num_slices: int = 1
    platform: str
    scenario: str
    where: list[_Part]
    exposed_seconds: Amount
    step_seconds: Positive
    counted_seconds: Amount
    step_interval: Interval
    tokens_per_second_per_chip: Positive
    mfu: Amount
    memory: _Memory
    memory_total: Positive
    cost: str


_PLAN = pydantic.TypeAdapter(_Plan)


def read(path: Path) -> _Json:
    """A plan that ``moe plan --json`` printed. Raises ConfigError if the file holds something else."""
    plan = read_object(path)
    check(plan, _PLAN, f"{path}: not a plan that --json printed")
    try:
        list(_flat(plan["config"]))
    except RecursionError as error:
        raise ConfigError(f"{path}: config is nested too deeply") from error
    return plan


def settings(a: _Json, b: _Json) -> list[tuple[str, Any, Any]]:
    """Fields of the two configs that differ: (name, A's, B's), and the slices."""
    first, second = dict(_flat(a["config"])), dict(_flat(b["config"]))
    first["topology"], second["topology"] = (of_slices(x["topology"], x.get("num_slices", 1)) for x in (a, b))
    first["what if"], second["what if"] = a["scenario"] or "as estimated", b["scenario"] or "as estimated"
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    return [(name, first.get(name, "-"), second.get(name, "-")) for name in names]


def _flat(tree: _Json, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def by_part(a: _Json, b: _Json) -> list[_Json]:
    """Seconds of each part of the two steps and their difference, the largest change first; all add up to the step."""
    first, second = _parts(a), _parts(b)
    rows = [
        {"part": name, "a": first.get(name, 0.0), "b": second.get(name, 0.0)} for name in {**first, **second}
    ]  # fmt: skip
    for row in rows:
        row["seconds"] = row["b"] - row["a"]
    return sorted(rows, key=lambda row: -abs(row["seconds"]))


def _parts(plan: _Json) -> dict[str, float]:
    parts: dict[str, float] = {}
    for row in plan["where"]:
        parts[row["part"]] = parts.get(row["part"], 0.0) + row["seconds"]
    parts["exposed exchange"] = plan["exposed_seconds"]
    parts["correction to published steps"] = plan["step_seconds"] - plan["counted_seconds"]
    return parts


#: Largest number of settings, and of parts, that :func:`sentence` names.
_NAMED = 3


def sentence(a: _Json, b: _Json) -> str:
    """The difference in one sentence, such as "model.moe.dispatch gather → dropless: +412 ms in experts, ..."."""
    changed = [f"{name} {old} → {new}" for name, old, new in settings(a, b)]
    if len(changed) > _NAMED:
        changed = [f"{len(changed)} settings"]
    parts = [f"{1e3 * row['seconds']:+,.0f} ms in {row['part']}" for row in by_part(a, b)[:_NAMED] if row["seconds"]]
    whole = 1e3 * (b["step_seconds"] - a["step_seconds"])
    return f"{', '.join(changed) or 'the same settings'}: {', '.join(parts) or 'no change'}; {whole:+,.0f} ms per step"
