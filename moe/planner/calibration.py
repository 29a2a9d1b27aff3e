"""Published measurements beside this planner's estimates, as ``scripts/calibration.py`` wrote them."""

from __future__ import annotations

import functools
import hashlib
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from moe.dispatch.backends import tpu_tiles
from moe.system.escaping import markdown_table
from moe.system.foreign_files import Amount, Fields, Positive, kept_whole, read_rows

PATH = Path(__file__).with_name("calibration.json")


class _Row(Fields):
    """Fields of a published step that are read."""

    name: str
    platform: Literal["tpu", "gpu"]
    topology: str
    counted: Positive
    low: Positive
    high: Positive
    published: Positive
    residual: Annotated[float, pydantic.Field(allow_inf_nan=False)]
    memory_gib: Amount
    versions: list[str]
    prices: str = ""


_ROW = kept_whole(_Row)


def rows() -> list[dict[str, Any]]:
    """Published steps: name, platform, topology, counted and published seconds, and the logarithm of their ratio.

    Raises:
        ConfigError: the file holds something else.
    """
    return read_rows(PATH, _ROW) if PATH.exists() else []


#: Files that counted times depend on, besides the program.
_PRICES = (
    "attention.csv", "attention.py", "chips.py", "exchanges.py", "gpus.py", "grouped_matmuls.csv", "kernels.py",
    "measured.py", "network.py", "program.py", "timeline.py", "work.py",
)  # fmt: skip


@functools.cache
def prices() -> str:
    """Hash of the tables and models by which programs are counted."""
    digest = hashlib.sha256()
    for path in (*map(PATH.with_name, _PRICES), Path(tpu_tiles.__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


#: 90 % quantile of Student's t for 1, 2, ... degrees of freedom; 1.3 beyond.
_T90 = (3.078, 1.886, 1.638, 1.533, 1.476, 1.440, 1.415, 1.397, 1.383, 1.372, 1.363, 1.356)

#: Spread assumed a priori, in the logarithm, and its weight as a number of further steps.
_ASSUMED, _ASSUMED_STEPS = 0.2, 3


def spread(platform: str, known: list[dict[str, Any]]) -> tuple[float, float, int]:
    """Scale and spread of counted steps, from published ones.

    Args:
        platform: "tpu" or "gpu"; published steps on the other do not count.
        known: from :func:`rows`.

    Returns:
        The mean of published over counted time, in the logarithm; the width on each side that holds 80 % of further
        steps, by Student's t; the number of steps.
    """
    return spread_of([row["residual"] for row in known if row["platform"] == platform])


def spread_of(residuals: list[float]) -> tuple[float, float, int]:
    """(scale, width, number) of logarithms of published over counted time, beside one assumed residual of 0."""
    count = len(residuals)
    mean = sum(residuals) / (count + 1)
    degrees = _ASSUMED_STEPS + max(count - 1, 0)
    squares = _ASSUMED_STEPS * _ASSUMED**2 + sum((each - mean) ** 2 for each in residuals)
    quantile = _T90[degrees - 1] if degrees <= len(_T90) else 1.3
    return math.exp(mean), quantile * math.sqrt(squares / degrees * (1 + 1 / (count + 1))), count


def predicted(
    counted: float, kernels: tuple[float, float, float], scale: float, width: float
) -> tuple[float, tuple[float, float]]:
    """(seconds of a step, 80 % interval): the counted time, scaled as the published steps were. The interval treats
    their spread and that of the kernels as independent errors in the logarithm.

    Args:
        counted: seconds.
        kernels: seconds of its kernels, and the same at the ends of their intervals.
        scale, width: from :func:`spread`.
    """
    seconds, low, high = kernels
    below = math.log(counted / (counted - seconds + low))
    above = math.log((counted - seconds + high) / counted)
    step = counted * scale
    return step, (step * math.exp(-math.hypot(below, width)), step * math.exp(math.hypot(above, width)))


def left_out(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the step predicted from the others: predicted, interval, whether it contains the published one."""
    made = []
    for row in rows:
        scale, width, count = spread(row["platform"], [other for other in rows if other is not row])
        predicted = row["counted"] * scale
        low = predicted * math.exp(-math.hypot(width, math.log(row["counted"] / row["low"])))
        high = predicted * math.exp(math.hypot(width, math.log(row["high"] / row["counted"])))
        inside = low <= row["published"] <= high
        made.append(row | {"predicted": predicted, "interval": (low, high), "inside": inside, "others": count})
    return made


_HEAD = (
    "model", "slice", "counted, s", "predicted, s", "80 % interval, s", "published, s", "inside",
    "predicted / published", "GiB per chip",
)  # fmt: skip


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    low, high = row["interval"]
    return (
        row["name"], row["topology"], f"{row['counted']:.3g}", f"{row['predicted']:.3g}", f"{low:.3g} to {high:.3g}",
        f"{row['published']:.3g}", "yes" if row["inside"] else "no", f"{row['predicted'] / row['published']:.2f}",
        f"{row['memory_gib']:.1f}",
    )  # fmt: skip


def page(rows: list[dict[str, Any]], missing: list[str], sources: list[str]) -> str:
    """The table of predicted and published steps as Markdown.

    Args:
        rows: of the published steps that were compiled.
        missing: names of those that were not.
        sources: lines that say where each comes from.
    """
    made = left_out(rows)
    lines = [
        "# The planner's estimates against published train steps",
        "",
        "Written by `python scripts/calibration.py`. Nothing was run here. *Counted* is the time of a step of this",
        "project's program, compiled for the slice and priced by the cost model ([pods.md](../pods.md)); *published*",
        "is that of somebody else's program for the same model, measured on hardware, for as many tokens. *Predicted*",
        "is the counted time times the mean ratio of published to counted time of the other rows of the same platform,",
        "with its 80 % interval; *inside* says whether the published time lies in it. An error is that of the estimate",
        "and the difference between the two programs together.",
        "",
        markdown_table(_HEAD, map(_cells, made)),
    ]
    lines += ["", f"Inside: {sum(row['inside'] for row in made)} of {len(made)}."]
    if missing:
        lines += ["", f"Not compiled yet: {'; '.join(missing)}. Run the command again to continue."]
    stale = [row["name"] for row in rows if row.get("prices") != prices()]
    if stale:
        lines += [
            "",
            f"Counted by an earlier cost model, since their programs are not kept: {'; '.join(stale)}. Name them with "
            "--only.",
        ]
    versions = sorted({", ".join(row["versions"]) for row in rows})
    lines += ["", f"Versions: {'; '.join(versions)}.", "", "Sources and differences:", "", *sources]
    return "\n".join([*lines, ""])
