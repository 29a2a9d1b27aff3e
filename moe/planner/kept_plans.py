"""Plans that were compiled and are kept with the configs, and the best of them for a slice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe.atomic_files import write_atomic
from moe.escaping import markdown_table, markdown_text
from moe.foreign_files import Amount, Fields, Interval, Positive, kept_whole, read_rows
from moe.planner.calibration import prices
from moe.planner.plan import Plan
from moe.planner.topology import tpu_name

_Row = dict[str, Any]

_FIELDS = (
    "topology", "chips", "step_seconds", "step_interval", "counted_seconds", "mfu", "tokens_per_second_per_chip",
    "memory_total", "exposed_seconds", "scale", "kernel_seconds", "compile_seconds", "bound", "cost", "versions",
    "commit", "prices",
)  # fmt: skip


class _Kept(Fields):
    """Fields of a kept plan that are read."""

    config: str
    topology: str
    flags: dict[str, Any]
    slices: list[str]
    commit: str
    step_seconds: Positive
    step_interval: Interval
    mfu: Amount
    tokens_per_second_per_chip: Positive
    memory_total: Positive
    capacity: Positive
    versions: list[str]
    prices: str = ""


_KEPT = kept_whole(_Kept)


def row(plan: Plan, config: str, flags: dict[str, Any], hardware: str = "") -> _Row:
    """A plan as it is kept.

    Args:
        plan: to keep.
        config: name of the file in configs/, with its argument if it had one.
        flags: fields of the config that were set on the command line.
        hardware: its name there.
    """
    figures = plan.to_json()
    kept = {"config": config, "flags": flags}
    topology = plan.topology if plan.num_slices == 1 else f"{plan.num_slices} x {plan.topology}"
    kept["slices"] = [topology] if plan.num_slices > 1 else sorted({topology, hardware or topology})
    return (
        kept | {"capacity": plan.memory.capacity} | {name: figures[name] for name in _FIELDS} | {"topology": topology}
    )


def read(path: Path) -> list[_Row]:
    """All kept plans; none without the file. Raises ConfigError for a file of something else."""
    return read_rows(path, _KEPT) if path.exists() else []


def keep(path: Path, new: _Row) -> None:
    """Add a plan to the file, in the place of one of the same config, slice and flags."""
    same = ("config", "topology", "flags")
    rows = [old for old in read(path) if any(old[name] != json.loads(json.dumps(new))[name] for name in same)]
    rows.append(new)
    rows.sort(key=lambda each: (each["config"], each["topology"], -each["tokens_per_second_per_chip"]))
    write_atomic(path, json.dumps(rows, indent=1) + "\n")


def best(rows: Sequence[_Row], config: str, topology: str) -> _Row | None:
    """The kept plan of a config that makes most tokens a second on a slice, by either of its names."""
    alike = [each for each in rows if each["config"] == config and each["topology"] == tpu_name(topology)]
    return max(alike, key=lambda each: each["tokens_per_second_per_chip"], default=None)


def words(kept: _Row) -> str:
    """Settings of a kept plan as flags of main.py."""
    return " ".join(f"--config.{name}={value}" for name, value in kept["flags"].items())


def sentence(kept: _Row) -> str:
    """A kept plan in a line."""
    low, high = kept["step_interval"]
    step, mfu = kept["step_seconds"], 100 * kept["mfu"]
    return (
        f"step {step:.3g} s ({low:.3g} to {high:.3g}), MFU {mfu:.1f} % ({mfu * step / high:.1f} to "
        f"{mfu * step / low:.1f}), {kept['tokens_per_second_per_chip']:,.0f} tokens/s a chip; compiled at commit "
        f"{kept['commit']}"
    )


def table(rows: Sequence[_Row]) -> str:
    """All kept plans as a Markdown table."""
    head = ("config", "devices", "settings", "memory, GiB", "step, s", "MFU", "tokens/s a chip", "commit")
    cells = []
    for kept in rows:
        (low, high), step, mfu = kept["step_interval"], kept["step_seconds"], 100 * kept["mfu"]
        config, topology, commit = (markdown_text(kept[name]) for name in ("config", "topology", "commit"))
        flags = [f"{name}={value}".replace("`", "'") for name, value in kept["flags"].items()]
        cells.append((
            config, topology, ", ".join(f"`{flag}`" for flag in flags) or "as it is",
            f"{kept['memory_total'] / 2**30:.1f} of {kept['capacity'] / 2**30:.0f}",
            f"{step:.3g} ({low:.3g} to {high:.3g})", f"{mfu:.1f} % ({mfu * step / high:.1f} to {mfu * step / low:.1f})",
            f"{kept['tokens_per_second_per_chip']:,.0f}", commit,
        ))  # fmt: skip
    lines = [markdown_table(head, cells)]
    versions = sorted({", ".join(kept["versions"]) for kept in rows})
    lines += ["", f"Versions: {markdown_text('; '.join(versions))}."]
    if stale := [f"{kept['config']} on {kept['topology']}" for kept in rows if kept.get("prices") != prices()]:
        lines += ["", f"Counted by earlier prices: {'; '.join(stale)}."]
    return "\n".join(lines)
