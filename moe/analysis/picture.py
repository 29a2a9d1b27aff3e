"""Passages of text coloured by expert as a PNG (Mixtral 2024, Figure 8)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import matplotlib.colors
import matplotlib.font_manager
import matplotlib.ft2font
import matplotlib.patches
from etils import epath
from matplotlib.figure import Figure

from moe.analysis.passages import Passage, colours
from moe.system.atomic_files import write_figure

_COLUMNS, _LINES = 46, 15  # characters per line and lines per passage
_FAMILY = "DejaVu Sans Mono"  # comes with matplotlib
_TEXT = {"family": _FAMILY, "fontsize": 7.2, "va": "baseline", "parse_math": False}


def drawable(text: str) -> float:
    """Share of the characters that the PNG's font can draw."""
    font = _font()
    return sum(bool(font.get_char_index(ord(c))) or c.isspace() for c in text) / max(len(text), 1)


def picture(
    path: epath.Path, passages: Sequence[Passage], shown: Sequence[int], layers: Sequence[int], num_experts: int
) -> None:
    """Draw the first lines of each passage, wrapped and without blank lines.

    Args:
        path: file to write.
        passages: texts with the routing of all L layers.
        shown: MoE layers to draw, as indices below L.
        layers: [L] indices of the layers in the model.
        num_experts: E.
    """
    palette = colours(num_experts)
    rows, columns = len(passages), len(shown)
    height = 2.3 * rows + 0.6  # inches, including 0.6 for the legend
    fig = Figure(figsize=(4.1 * columns, height))
    axes = fig.subplots(rows, columns, squeeze=False)
    fig.subplots_adjust(0.005, 0.02 / rows, 0.995, 1 - 0.6 / height, wspace=0.02, hspace=0.16)
    for passage, of_passage in zip(passages, axes, strict=True):
        lines = _wrap(passage.pieces)
        for layer, ax in zip(shown, of_passage, strict=True):
            experts = passage.experts[layer, :, 0]
            ax.set(xlim=(0, _COLUMNS), ylim=(_LINES, 0), xticks=[], yticks=[])
            ax.set_title(f"{passage.title}, layer {layers[layer]}", fontsize=9, loc="left", pad=3, parse_math=False)
            for number, line in enumerate(lines):
                for column, (character, owner) in enumerate(line):
                    colour = palette[experts[owner]]
                    ax.add_patch(matplotlib.patches.Rectangle((column, number), 1, 1, color=colour, linewidth=0))
                    # One call per character: no font has a width of exactly one column.
                    if character.strip():
                        ax.text(column + 0.5, number + 0.78, character, ha="center", **_TEXT)
    # Legend: a strip of all experts, with as many numbers as fit.
    strip = fig.add_axes((0.2, 1 - 0.36 / height, 0.6, 0.17 / height), yticks=[])
    strip.imshow([range(num_experts)], cmap=matplotlib.colors.ListedColormap(palette), aspect="auto")
    strip.set_xticks(range(0, num_experts, math.ceil(num_experts / (10 * columns))))
    strip.tick_params(labelsize=7, length=0, pad=1)
    strip.set_title("first expert", fontsize=8, pad=2)
    write_figure(path, fig, 110)


def _font() -> matplotlib.ft2font.FT2Font:
    return matplotlib.ft2font.FT2Font(matplotlib.font_manager.findfont(_FAMILY))


def _wrap(pieces: Sequence[str]) -> list[list[tuple[str, int]]]:
    """Wraps pieces to lines of (character, token number); characters without a glyph become a box."""
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
