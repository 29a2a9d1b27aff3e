"""Documents made of blocks: text for a terminal, and an HTML page that needs no other file, script or network."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from moe.system.escaping import terminal

#: Width of a timeline on an HTML page, pixels.
_TIMELINE_WIDTH = 1400


@dataclass(frozen=True)
class Heading:
    """Title of the blocks that follow."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Text; ``style`` of an HTML page is "", "big", "mild" or "small"."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class Cell:
    """Cell of a table.

    Attributes:
        text: its contents.
        note: small text below it; a terminal does not show it.
        share: length of a bar in the cell, as a share of its width; None for none. A terminal does not show bars.
        colour: of that bar, or of a mark in front of the text.
    """

    text: str = ""
    note: str = ""
    share: float | None = None
    colour: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells; the columns whose numbers are in ``right`` are aligned to the right."""

    rows: Sequence[Sequence[str | Cell]]
    header: Sequence[str] = ()
    right: Sequence[int] = ()

    @property
    def cells(self) -> list[list[Cell]]:
        """The rows, every entry a :class:`Cell`."""
        return [[each if isinstance(each, Cell) else Cell(each) for each in row] for row in self.rows]


@dataclass(frozen=True)
class Span:
    """Part of a bar or of a timeline, in the unit of its whole."""

    label: str
    length: float
    colour: str
    start: float = 0.0


@dataclass(frozen=True)
class StackedBar:
    """Shares of a whole, drawn as one bar; a terminal does not show it."""

    spans: Sequence[Span]

    @property
    def widths(self) -> list[float]:
        """Percent of the width that each span takes."""
        whole = sum(span.length for span in self.spans) or 1.0
        return [100 * span.length / whole for span in self.spans]


@dataclass(frozen=True)
class Timeline:
    """Spans of lanes below one another; a terminal does not show it."""

    title: str
    length: float
    lanes: Sequence[Sequence[Span]]

    def place(self, span: Span) -> tuple[float, float]:
        """Left edge and width of a span, pixels."""
        scale = _TIMELINE_WIDTH / (self.length or 1.0)
        left = span.start * scale
        return left, max(min(span.length * scale, _TIMELINE_WIDTH - left), 0.6)


Block = Heading | Paragraph | Table | StackedBar | Timeline


def text(blocks: Sequence[Block]) -> str:
    """The document for a terminal: headings, paragraphs and tables."""
    return "\n".join(line for block in blocks for line in _lines(block)).strip("\n")


def _lines(block: Block) -> Iterator[str]:
    match block:
        case Heading():
            yield ""
            yield terminal(block.text)
        case Paragraph():
            yield f"  {terminal(block.text)}"
        case Table():
            rows = [[terminal(cell.text) for cell in row] for row in block.cells]
            yield from _aligned([list(block.header), *rows] if block.header else rows, block.right)


def _aligned(rows: list[list[str]], right: Sequence[int]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows)))]
    for row in rows:
        cells = [
            f"{cell:>{width}}" if column in right else f"{cell:{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        yield f"    {'  '.join(cells)}".rstrip()


def html(title: str, blocks: Sequence[Block]) -> str:
    """The document as an HTML page; all text is escaped."""
    kinds = [(type(block).__name__, block) for block in blocks]
    return _template().render(title=title, blocks=kinds, timeline_width=_TIMELINE_WIDTH)


@functools.cache
def _template() -> jinja2.Template:
    """The page's template, read when the first page is made."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("document.html")
