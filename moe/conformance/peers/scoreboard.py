"""The scoreboard: a page, and its JSON."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe.conformance.peers import reproduction
from moe.conformance.peers.suite import COLUMNS, Cell, Library
from moe.system.atomic_files import write_atomic

NOT_CHECKED = Path(__file__).with_name("not_checked.md")
SIGNS = {
    "equal": "=",
    "documented": "doc",
    "deviates": "**≠**",
    "bfloat16": "bf16",
    "raises": "**!**",
    "not applicable": "·",
}
#: Columns of the summary → columns of a library's table.
GROUPS = {
    "routing": ("choice", "weights"),
    "output": ("output",),
    "gradients": ("grad tokens", "grad router", "grad experts"),
    "K = 1, empty, ties": ("K = 1", "empty expert", "ties", "negative bias"),
    "losses": ("balance loss", "z-loss"),
    "accumulation": ("accumulation",),
    "router": ("router product",),
}


def write(
    out: Path,
    library: Library,
    cells: Sequence[Cell],
    command: str,
    order: Sequence[str],
    *,
    seconds: float,
    reproduced: Mapping[str, float],
    control: bool = False,
) -> None:
    """Add a library to the scoreboard of a folder: scoreboard.md and scoreboard.json.

    Args:
        out: the folder, which keeps the libraries of earlier calls.
        library: what its worker says of itself.
        cells: its verdicts.
        command: that made them.
        order: names of all libraries, as on the page.
        seconds: that it took, without making the environment.
        reproduced: results of its scripts (reproduction.run); empty if they were not run.
        control: the library is no other's, or holds known bugs, and counts in no sum.
    """
    path = out / "scoreboard.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    row: dict[str, Any] = {
        "version": library.version,
        "control": control,
        "date": datetime.date.today().isoformat(),
        "command": command,
        "seconds": round(seconds),
        "reproduced": reproduced,
    }
    kept[library.name] = row | {"cells": [dataclasses.asdict(cell) for cell in cells]}
    kept = {name: kept[name] for name in order if name in kept}
    write_atomic(path, json.dumps(kept, indent=1))
    write_atomic(out / "scoreboard.md", page(kept))


#: How a maintainer reruns a row.
RERUN = """To rerun a library's row, type the command beside its version; another release is another pin in
`moe/conformance/peers/environments.toml`. `DIR/reproduce/` then has, for each cell that differs, a script that needs
the library alone. A block of your own: [ten lines](../conform.md)."""


def page(libraries: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown of scoreboard.json."""
    found = {name: [Cell(**cell) for cell in row["cells"]] for name, row in libraries.items()}
    every = [cell for name, cells in found.items() for cell in cells if not libraries[name]["control"]]
    blocks = len({(cell.library, cell.block) for cell in every})
    names = {row["version"].split()[0] for row in libraries.values() if not row["control"]}
    checks = sum(cell.status != "not applicable" for cell in every)
    lines = [
        "# Scoreboard of other libraries' MoE layers",
        "",
        f"{blocks} blocks of {len(names)} {'library' if len(names) == 1 else 'libraries'}, {checks} checks. "
        "[conform](../conform.md#other-libraries) explains the columns.",
        "",
        RERUN,
        "",
        "`=` equal to the claimed rule in float64 within 1e-4; `doc` equal with a deviation that the library "
        "documents; **≠** deviates; `bf16` a bfloat16 block rounds its router's product to bfloat16, which changes "
        "choices; **!** the block raised an error; `·` not applicable or not recorded.",
        "",
        "| library | blocks | = | doc | ≠ | bf16 | ! |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, cells in found.items():
        counts = [sum(cell.status == status for cell in cells) for status in SIGNS if status != "not applicable"]
        number = len({cell.block for cell in cells})
        lines.append(f"| {libraries[name]['version']} | {number} | {' | '.join(map(str, counts))} |")
    lines += _summary([(libraries[cell.library]["version"].split()[0], cell) for cell in every])
    for name, cells in found.items():
        row = libraries[name]
        lines += [
            "",
            f"## {'Control: ' if row['control'] else ''}{name}",
            "",
            f"{row['version']}; {row['date']}, {row['seconds']} s; `{row['command']}`",
            "",
        ]
        lines += [f"| block | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
        for block in dict.fromkeys(cell.block for cell in cells):
            signs = {cell.column: SIGNS[cell.status] for cell in cells if cell.block == block}
            lines.append(f"| {block} | {' | '.join(signs.get(column, '·') for column in COLUMNS)} |")
        lines += _details(cells)
        if row.get("reproduced"):
            lines += ["", f"{reproduction.sentence(row['reproduced'])}."]
    return "\n".join([*lines, "", NOT_CHECKED.read_text()])


def _summary(every: Sequence[tuple[str, Cell]]) -> list[str]:
    """Counts of every kind of check by library, over all its blocks without controls."""
    lines = ["", f"| library | blocks | {' | '.join(GROUPS)} |", f"|---|{'---|' * (len(GROUPS) + 1)}"]
    for library in dict.fromkeys(name for name, _ in every):
        cells = [cell for name, cell in every if name == library]
        counts = []
        for columns in GROUPS.values():
            found = [cell.status for cell in cells if cell.column in columns]
            shown = [f"{found.count(status)} {sign.strip('*')}" for status, sign in SIGNS.items() if status in found]
            counts.append(", ".join(part for part in shown if not part.endswith("·")) or "·")
        blocks = len({(cell.library, cell.block) for cell in cells})
        lines.append(f"| {library} | {blocks} | {' | '.join(counts)} |")
    return lines


def _details(cells: Sequence[Cell]) -> list[str]:
    """List of what deviates, raised an error or is documented; equal texts once, with their columns and blocks."""
    lines: list[str] = []
    for status, title in (("deviates", "Deviates"), ("raises", "Raises an error"), ("documented", "Documented")):
        groups: dict[str, list[Cell]] = {}
        for cell in cells:
            if cell.status == status:
                groups.setdefault(cell.text, []).append(cell)
        if groups:
            lines += ["", f"{title}:", ""]
        for text, rows in groups.items():
            names, columns = (", ".join(dict.fromkeys(values)) for values in _names(rows))
            amount = f", up to {max(cell.error for cell in rows):.2g}" if status == "deviates" else ""
            lines.append(f"- {names} ({columns}{amount}): {text}")
    return lines


def _names(cells: Sequence[Cell]) -> tuple[list[str], list[str]]:
    return [cell.block for cell in cells], [cell.column for cell in cells]
