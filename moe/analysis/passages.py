"""Passages of text with the expert of every token, and a colour per expert."""

from __future__ import annotations

import colorsys
import dataclasses
from collections.abc import Sequence

import matplotlib
import matplotlib.colors
import numpy as np


@dataclasses.dataclass(frozen=True)
class Passage:
    """A text with the routing of every token.

    Attributes:
        title: domain of the text.
        pieces: [m] texts of the tokens.
        experts: [L,m,K] experts, first choice first.
        weights: [L,m,K] combine weights; 0 where the gate declined the assignment.
    """

    title: str
    pieces: Sequence[str]
    experts: np.ndarray
    weights: np.ndarray


def pieces_of(text: str, spans: np.ndarray) -> list[str]:
    """Split text into the characters that begin in each span of bytes.

    A character divided over several tokens belongs to the first of them.

    Args:
        text: the source.
        spans: [m,2] byte ranges (:class:`moe.analysis.documents.Document`).
    """
    raw = np.frombuffer(text.encode(), np.uint8)
    # Bytes 10xxxxxx continue a character; before[b] is the number of characters that begin before byte b.
    before = np.concatenate([[0], np.cumsum((raw & 0xC0) != 0x80)])
    return [text[before[start] : before[end]] for start, end in spans]


def colours(num_experts: int) -> list[str]:
    """A light colour per expert, as #rrggbb: ColorBrewer's Set3 up to 12, else evenly spaced hues."""
    if num_experts <= 12:
        return [matplotlib.colors.to_hex(colour) for colour in matplotlib.colormaps["Set3"].colors[:num_experts]]  # pyright: ignore[reportAttributeAccessIssue]
    shades = [(0.3, 1.0), (0.6, 0.95), (0.4, 0.82)]
    hues = [(expert / num_experts, *shades[expert % len(shades)]) for expert in range(num_experts)]
    return [matplotlib.colors.to_hex(colorsys.hsv_to_rgb(*hue)) for hue in hues]
