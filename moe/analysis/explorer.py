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
_WEIGHT_ONE = 65_535  # a weight of 1


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
                "weights": _encode(np.rint(np.clip(passage.weights[..., :choices], 0, 1) * _WEIGHT_ONE)),
            }
            for passage in passages
        ],
    }
    return render(json.dumps(data))


def render(data: str) -> str:
    """The page of its data as JSON, such as a page's element ``data`` holds."""
    # In a script element only "<" could end the data.
    return _TEMPLATE.read_text().replace("__DATA__", data.replace("<", "\\u003c"))


def _encode(values: np.ndarray) -> str:
    """Base64 of little-endian uint16."""
    return base64.b64encode(np.ascontiguousarray(values, "<u2").tobytes()).decode()
