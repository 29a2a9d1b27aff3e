"""Text in which every token has the colour of its first expert, at several layers (Mixtral 2024, Figure 8).

In: :class:`Passage` s. Out: one self-contained HTML page, and a PNG.

Letters: L shown layers, m tokens.
"""

from __future__ import annotations

import colorsys
import dataclasses
import html
import math
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")  # a file, never a window
import matplotlib.colors
import matplotlib.font_manager
import matplotlib.ft2font
import matplotlib.patches
import matplotlib.pyplot as plt
import numpy as np
from etils import epath

_COLUMNS, _LINES = 46, 15  # of characters, for each passage in the PNG


@dataclasses.dataclass(frozen=True)
class Passage:
    """A piece of text and where its tokens went.

    Attributes:
        title: the domain.
        pieces: [m] the text of each token.
        experts: [L,m] first experts.
    """

    title: str
    pieces: Sequence[str]
    experts: np.ndarray


def pieces_of(text: str, spans: np.ndarray) -> list[str]:
    """The characters that begin in each span of bytes: of a character in several tokens, the first has it all.

    Args:
        text: the source.
        spans: [m,2] bytes, as :class:`moe.analysis.documents.Document` has them.
    """
    raw = np.frombuffer(text.encode(), np.uint8)
    # Bytes 10xxxxxx go on with a character; before[b] is how many characters begin before byte b.
    before = np.concatenate([[0], np.cumsum((raw & 0xC0) != 0x80)])
    return [text[before[start] : before[end]] for start, end in spans]


def colours(num_experts: int) -> list[str]:
    """A light colour for each expert, as #rrggbb: ColorBrewer's Set3 up to 12, else hues around the circle."""
    if num_experts <= 12:
        return [matplotlib.colors.to_hex(colour) for colour in plt.get_cmap("Set3").colors[:num_experts]]  # pyright: ignore[reportAttributeAccessIssue]
    shades = [(0.3, 1.0), (0.6, 0.95), (0.4, 0.82)]
    hues = [(expert / num_experts, *shades[expert % len(shades)]) for expert in range(num_experts)]
    return [matplotlib.colors.to_hex(colorsys.hsv_to_rgb(*hue)) for hue in hues]


def drawable(text: str) -> float:
    """Share of the characters that the PNG's font has."""
    font = _font()
    return sum(bool(font.get_char_index(ord(c))) or c.isspace() for c in text) / max(len(text), 1)


def page(passages: Sequence[Passage], layers: Sequence[int], num_experts: int, title: str) -> str:
    """HTML: a row per passage, a column per layer; a token's expert shows when pointed at.

    Args:
        passages: with L rows of experts each.
        layers: [L] their numbers in the model.
        num_experts: E.
        title: of the page.
    """
    palette = colours(num_experts)
    style = "".join(f".e{expert}{{background:{colour}}}" for expert, colour in enumerate(palette))
    legend = " ".join(f'<span class="e{expert}">&nbsp;{expert}&nbsp;</span>' for expert in range(num_experts))
    head = "".join(f"<th>layer {layer}</th>" for layer in layers)
    body = "".join(
        f"<tr><td colspan={len(layers)}><h2>{html.escape(passage.title)}</h2></td></tr><tr>"
        + "".join(f"<td><pre>{_spans(passage.pieces, experts)}</pre></td>" for experts in passage.experts)
        + "</tr>"
        for passage in passages
    )
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>'
        "body{font-family:sans-serif;color:#111;background:#fff;margin:1.5em}table{width:100%;table-layout:fixed}"
        "td{vertical-align:top;padding:.3em}pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:12px;"
        f"line-height:1.5}}h2{{font-size:1em;margin:.5em 0 0}}{style}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p>First expert of each token. Experts: {legend}</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></body></html>\n"
    )


def _spans(pieces: Sequence[str], experts: np.ndarray) -> str:
    return "".join(
        f'<span class="e{expert}" title="expert {expert}">{html.escape(piece)}</span>'
        for piece, expert in zip(pieces, experts, strict=True)
        if piece
    )


def picture(path: epath.Path, passages: Sequence[Passage], layers: Sequence[int], num_experts: int) -> None:
    """The same as a PNG: the first lines of each passage, wrapped, without blank lines.

    Args:
        path: of the PNG.
        passages: with L rows of experts each.
        layers: [L] their numbers in the model.
        num_experts: E.
    """
    palette = colours(num_experts)
    rows, columns = len(passages), len(layers)
    height = 2.3 * rows + 0.6  # inches, of which 0.6 for the legend
    fig, axes = plt.subplots(rows, columns, figsize=(4.1 * columns, height), squeeze=False)
    fig.subplots_adjust(0.005, 0.02 / rows, 0.995, 1 - 0.6 / height, wspace=0.02, hspace=0.16)
    for passage, of_passage in zip(passages, axes, strict=True):
        lines = _wrap(passage.pieces)
        for experts, layer, ax in zip(passage.experts, layers, of_passage, strict=True):
            ax.set(xlim=(0, _COLUMNS), ylim=(_LINES, 0), xticks=[], yticks=[])
            ax.set_title(f"{passage.title}, layer {layer}", fontsize=9, loc="left", pad=3)
            for number, line in enumerate(lines):
                for column, (character, owner) in enumerate(line):
                    colour = palette[experts[owner]]
                    ax.add_patch(matplotlib.patches.Rectangle((column, number), 1, 1, color=colour, linewidth=0))
                    # One by one: no font's advance is exactly a column.
                    if character.strip():
                        ax.text(column + 0.5, number + 0.78, character, ha="center", **_TEXT)
    # The legend: a strip of all experts; numbers as far as they fit.
    strip = fig.add_axes((0.2, 1 - 0.36 / height, 0.6, 0.17 / height), yticks=[])
    strip.imshow([range(num_experts)], cmap=matplotlib.colors.ListedColormap(palette), aspect="auto")
    strip.set_xticks(range(0, num_experts, math.ceil(num_experts / (10 * columns))))
    strip.tick_params(labelsize=7, length=0, pad=1)
    strip.set_title("first expert", fontsize=8, pad=2)
    with path.open("wb") as file:
        fig.savefig(file, dpi=110, format="png")
    plt.close(fig)


_FAMILY = "DejaVu Sans Mono"  # comes with matplotlib
_TEXT = {"family": _FAMILY, "fontsize": 7.2, "va": "baseline", "parse_math": False}


def _font() -> matplotlib.ft2font.FT2Font:
    return matplotlib.ft2font.FT2Font(matplotlib.font_manager.findfont(_FAMILY))


def _wrap(pieces: Sequence[str]) -> list[list[tuple[str, int]]]:
    """Lines of (character, number of its token); what the font cannot draw becomes a box."""
    font = _font()
    lines: list[list[tuple[str, int]]] = [[]]
    for owner, piece in enumerate(pieces):
        for character in piece.replace("\t", "    "):
            if character == "\n" or len(lines[-1]) == _COLUMNS:
                if lines[-1]:
                    lines.append([])
                if character == "\n":
                    continue
            lines[-1].append((character if font.get_char_index(ord(character)) else "▯", owner))
    return lines[:_LINES]
