"""Self-contained HTML page of passages in which every token has the colour of its first expert."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from moe.analysis.passages import Passage, colours


def page(passages: Sequence[Passage], layers: Sequence[int], num_experts: int, title: str) -> str:
    """Renders the page: one row per passage, one column per layer, experts in tooltips.

    Args:
        passages: passages with L rows of experts.
        layers: [L] indices of the layers in the model.
        num_experts: E.
        title: title of the page.
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
