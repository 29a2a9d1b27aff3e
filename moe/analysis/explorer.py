"""Routing explorer: one self-contained HTML page (``explorer.html`` with the data inside) to read in any browser."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe.analysis.passages import Passage, colours

_TEMPLATE = Path(__file__).with_name("explorer.html")
_CHOICES = 8  # assignments per token that are shown
_LARGEST = 65_535  # of uint16


def explorer_page(passages: Sequence[Passage], summary: dict[str, Any], shown: Sequence[int], title: str) -> str:
    """Renders the page.

    Args:
        passages: texts with the routing of all L layers.
        summary: the numbers (:func:`moe.analysis.summary.summarise`).
        shown: MoE layers shown at first, as indices below L.
        title: title of the page.
    """
    choices = min(_CHOICES, summary["experts_per_token"])
    data = {
        "title": title,
        "num_experts": summary["num_experts"],
        "choices": choices,
        "layers": summary["layers"],
        "shown": list(shown),
        "domains": summary["domains"],
        "load": summary["load"],
        "training": summary.get("load_over_training"),
        "top_tokens": summary["top_tokens"],
        "colours": colours(summary["num_experts"]),
        "passages": [
            {
                "title": passage.title,
                "pieces": list(passage.pieces),
                "experts": _encode(passage.experts[..., :choices]),
                **_weights(passage.weights[..., :choices]),
            }
            for passage in passages
        ],
    }
    return render(json.dumps(data))


def _weights(weights: np.ndarray) -> dict[str, Any]:
    """Combine weights as uint16 shares of a unit, 1 or the largest weight if that is above 1; none is rounded to 0."""
    unit = max(1.0, float(weights.max(initial=0.0)))
    shares = np.maximum(np.rint(weights / unit * _LARGEST), 1)
    return {"weights": _encode(np.where(weights > 0, shares, 0)), "unit": unit}


def render(data: str) -> str:
    """Render the page from its data as JSON, which becomes the content of its element ``data``."""
    # In a script element only "<" could end the data.
    return _TEMPLATE.read_text().replace("__DATA__", data.replace("<", "\\u003c"))


def _encode(values: np.ndarray) -> str:
    """Base64 of little-endian uint16."""
    return base64.b64encode(np.ascontiguousarray(values, "<u2").tobytes()).decode()
