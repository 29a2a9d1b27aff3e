"""Published measurements beside this planner's estimates, as ``scripts/calibration.py`` wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("calibration.json")


def rows() -> list[dict[str, Any]]:
    """Estimates and measurements: name, topology, predicted and published MFU, and what differs."""
    return json.loads(PATH.read_text()) if PATH.exists() else []


def statement(platform: str, known: list[dict[str, Any]]) -> str:
    """The residual of the estimate, for the page of a plan.

    Args:
        platform: "tpu" or "gpu".
        known: from :func:`rows`.
    """
    if platform != "tpu" or not known:
        return "not held against any measurement"
    ratios = [row["predicted"] / row["published"] for row in known]
    low, high = (f"{100 * (ratio - 1):+.0f} %" for ratio in (min(ratios), max(ratios)))
    count = "one published measurement" if len(known) == 1 else f"{len(known)} published measurements"
    return (
        f"held against {count} of other programs for the same model and slice: predicted MFU "
        f"{low if low == high else f'{low} to {high}'} of theirs (docs/results/calibration.md)"
    )
