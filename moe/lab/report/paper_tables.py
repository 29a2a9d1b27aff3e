"""Tables of the papers beside a suite's records: the paper's number, ours with its interval, and whether they agree."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pydantic
import pydantic.dataclasses

from moe.config import ConfigError
from moe.lab import inference
from moe.lab.expressions import parse, variants_of
from moe.lab.inference import Effect
from moe.lab.report.regime import regimes
from moe.lab.table import MissingError, Table
from moe.system.atomic_files import write_atomic
from moe.system.escaping import markdown_page, markdown_table, markdown_text
from moe.system.foreign_files import first_sentence
from moe.system.reading import read_small_file

TABLES_FILE = "paper_tables.toml"
_STRICT = pydantic.ConfigDict(extra="forbid")


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Row:
    """One line of a table.

    Attributes:
        what: its label.
        value: linear combination of results (:mod:`moe.lab.expressions`).
        published: the paper's number, in the unit and sign of ``value``; None if it has none.
        suite: name of the suite whose records fill the row, if not that of the table; empty: that of the table.
    """

    what: str
    value: str
    published: float | None = None
    suite: str = ""


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class PaperTable:
    """A table of a paper.

    Attributes:
        name: paper and table.
        suite: name of the suite whose records fill it.
        source: the published figures as printed.
        unit: of the rows.
        rows: its lines.
    """

    name: str
    suite: str
    source: str
    unit: str
    rows: tuple[Row, ...]


def read_tables(path: Path) -> tuple[PaperTable, ...]:
    """The tables of a file; none if there is no such file.

    Raises:
        ConfigError: the file is not a list of tables.
    """
    if not path.exists():
        return ()
    try:
        tree = tomllib.loads(read_small_file(path).decode())
        entries = [{"rows": entry.pop("row"), **entry} for entry in tree.pop("table")]
        tables = pydantic.TypeAdapter(tuple[PaperTable, ...]).validate_python(entries)
        if tree:
            raise ValueError(f"{', '.join(tree)}: no such entry")
        for row in (row for entry in tables for row in entry.rows):
            parse(row.value)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a list of tables ({first_sentence(error)})") from error
    return tables


def write_page(path: Path, tables: tuple[PaperTable, ...], suites: Mapping[str, Table]) -> None:
    """Write all tables as one page.

    Args:
        path: of the page.
        tables: as :func:`read_tables` gives them.
        suites: suite → its records; one without records may be missing.
    """
    text = [
        "# Tables of the papers",
        "Ours: mean over seeds with its 95 % interval, each arm at the suite's longest horizon. The papers' models are "
        "a thousand times as large, so only the direction of an effect is comparable; these tables decide nothing "
        "([claims](claims.md) has what was registered).",
    ]
    names = dict.fromkeys(row.suite or entry.suite for entry in tables for row in entry.rows)
    used = {name: suites[name] for name in names if name in suites}
    if lengths := regimes(used):
        text.append(f"Length of the runs: {lengths}")
    for entry in tables:
        text += [
            f"## {markdown_text(entry.name)}",
            f"{markdown_text(entry.source)}. Suite `{entry.suite}`.",
            _rows(entry, suites),
        ]
    write_atomic(path, markdown_page("\n\n".join(text) + "\n"))


def _rows(entry: PaperTable, suites: Mapping[str, Table]) -> str:
    lines = []
    for row in entry.rows:
        published = "–" if row.published is None else f"{row.published:+.3f}"
        what = markdown_text(row.what) + (f" (suite `{row.suite}`)" if row.suite else "")
        lines.append((what, published, *_ours(row, suites.get(row.suite or entry.suite))))
    return markdown_table((markdown_text(entry.unit), "paper", "ours [95 %]", "comparison"), lines)


def _ours(row: Row, found: Table | None) -> tuple[str, str]:
    terms = parse(row.value)
    steps = 0 if found is None else found.longest(*variants_of(terms))
    if found is None or not steps:
        return "–", "no runs"
    try:
        effect = inference.effect([*found.values(steps, terms).values()])
    except MissingError as error:
        return "–", markdown_text(str(error))
    if not math.isfinite(effect.mean):
        return "–", "a run diverged"
    comparison = _comparison(row.published, effect, signed=any(term.factor < 0 for term in terms))
    return f"{effect} at {steps:,} steps", comparison


def _comparison(published: float | None, effect: Effect, *, signed: bool) -> str:
    """Compare the interval with the published number and, if ``signed``, with zero; sums of shares are always above."""
    if not math.isfinite(effect.low):
        return "one seed"
    found = []
    if signed and effect.low <= 0 <= effect.high:
        found.append("not significant")
    elif signed and published is None:
        found.append("below 0" if effect.high < 0 else "above 0")
    elif signed and published is not None:
        found.append("same direction" if (effect.mean < 0) == (published < 0) else "other direction")
    if published is not None:
        found.append(f"{'contains' if effect.low <= published <= effect.high else 'excludes'} the paper's")
    return "; ".join(found) or "–"
