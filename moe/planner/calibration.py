"""Published measurements beside this planner's estimates, as ``scripts/calibration.py`` wrote them."""

from __future__ import annotations

import functools
import hashlib
import math
import tokenize
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic

from moe.dispatch.backends import tpu_tiles
from moe.parallel import device_kinds
from moe.planner import counts, measured
from moe.planner.counts import Counts
from moe.planner.kinds import kind_of
from moe.system.escaping import markdown_table
from moe.system.foreign_files import Amount, Fields, Positive, kept_whole, read_rows

PATH = Path(__file__).with_name("calibration.json")


class _Row(Fields):
    """Fields of a published step that are read."""

    name: str
    platform: Literal["tpu", "gpu"]
    topology: str
    counted: Positive
    floor: Amount
    counts: Counts
    low: Positive
    high: Positive
    published: Positive
    residual: Annotated[float, pydantic.Field(allow_inf_nan=False)]
    memory_gib: Amount
    versions: list[str]
    prices: str


_ROW = kept_whole(_Row)


def rows() -> list[dict[str, Any]]:
    """Published steps: name, platform, topology, seconds and the logarithm of published over counted ones.

    Raises:
        ConfigError: the file holds something else.
    """
    return read_rows(PATH, _ROW) if PATH.exists() else []


def recounted(row: dict[str, Any]) -> dict[str, Any]:
    """A published step counted by today's prices."""
    priced = counts.price(Counts.model_validate(row["counts"]), kind_of(row["topology"]))
    return row | {
        "counted": priced.counted,
        "floor": priced.floor,
        "low": priced.counted - priced.kernels + priced.kernels_low,
        "high": priced.counted - priced.kernels + priced.kernels_high,
        "residual": math.log(row["published"] / priced.counted),
        "mfu": row["mfu"] * row["counted"] / priced.counted,
        "exposed": priced.exposed,
        "prices": prices(),
    }


def stale(rows: list[dict[str, Any]]) -> list[str]:
    """Names of published steps whose time is not that of today's prices."""
    names = "counted", "floor", "low", "high", "residual"
    today = map(recounted, rows)
    return [
        row["name"]
        for row, new in zip(rows, today, strict=True)
        if not np.allclose([row[name] for name in names], [new[name] for name in names], rtol=1e-6, atol=1e-9)
    ]


#: Files that counted times depend on, besides the program.
_PRICES = (
    *map(
        PATH.with_name,
        (
            "attention.csv", "attention.py", "chips.py", "counts.py", "exchanges.py", "gpus.py", "grouped_matmuls.csv",
            "hardware.py", "kernels.py", "make_plan.py", "measured.py", "network.py", "program.py", "row_movement.csv",
            "row_movement.py", "timeline.py", "unembedding.csv", "unembedding.py", "work.py",
        ),
    ),
    Path(device_kinds.__file__),
    Path(tpu_tiles.__file__),
)  # fmt: skip


@functools.cache
def prices() -> str:
    """Hash of the tables and models by which programs are counted."""
    digest = hashlib.sha256()
    for path in _PRICES:
        digest.update((_statements(path) if path.suffix == ".py" else path.read_text()).encode())
    return digest.hexdigest()[:12]


def _statements(path: Path) -> str:
    """Source text of a module without comments, docstrings and layout, which price nothing."""
    layout = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENCODING,
        tokenize.ENDMARKER,
    )
    kept, begins = [], True
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type in layout:
                begins = begins or token.type == tokenize.NEWLINE
            elif not (begins and token.type == tokenize.STRING):
                kept.append(token.string)
                begins = False
    return " ".join(kept)


#: 90 % quantile of Student's t for 1, 2, ... degrees of freedom; 1.3 beyond.
_T90 = (3.078, 1.886, 1.638, 1.533, 1.476, 1.440, 1.415, 1.397, 1.383, 1.372, 1.363, 1.356)

#: Spread assumed a priori, in the logarithm, that of the published steps at first look; and its weight as a number of
#: further steps.
_ASSUMED, _ASSUMED_STEPS = 0.26, 3

#: Further width of the interval, in the logarithm, for a chip of which no published step was compared, and for one of
#: which no kernel was timed either, a quarter of it after one step; and for a pipeline, of which none was compared.
#: Assumed.
_NEW_CHIP = 0.25
_UNKNOWN_CHIP = 0.45
_PIPELINE = 0.2


def spread(residuals: list[float]) -> float:
    """Width on each side that holds 80 % of further steps, by Student's t.

    Args:
        residuals: logarithms of published over counted time. Their mean is taken as 0: a scale, also one by platform
            that is shrunk towards 1, makes the errors of steps that are left out larger.
    """
    degrees = _ASSUMED_STEPS + len(residuals)
    squares = _ASSUMED_STEPS * _ASSUMED**2 + sum(each**2 for each in residuals)
    quantile = _T90[degrees - 1] if degrees <= len(_T90) else 1.34
    return quantile * math.sqrt(squares / degrees)


def kernel_width(counted: float, seconds: float, low: float, high: float) -> float:
    """Half of the width, in the logarithm, that the intervals of a step's kernels give it, all errors correlated.

    Args:
        counted: seconds of the step.
        seconds, low, high: of its kernels, and at the ends of their intervals.
    """
    rest = counted - seconds
    return math.log((rest + high) / (rest + low)) / 2


def steps_of(kind: str, known: list[dict[str, Any]]) -> int:
    """Number of the published steps that were measured on a chip, such as "v5p"."""
    return sum(kind_of(row["topology"]) == kind for row in known)


def of_chip(kind: str, steps: int) -> str:
    """Phrase on how many steps of a chip were compared, and on whether its kernels were timed."""
    if steps:
        return f"{steps} of this chip"
    return "no step of this chip was ever compared" + ("" if _timed(kind) else ", and none of its kernels timed")


def width(kind: str, kernels: float, known: list[dict[str, Any]], *, pipeline: bool = False) -> float:
    """Width of a step's interval on each side, in the logarithm.

    The spread of the published steps has the errors of their kernels in it. Kernels that are less certain than those,
    and a chip that is new, add to it as independent errors.

    Args:
        kind: of the chip.
        kernels: :func:`kernel_width` of the step.
        known: from :func:`rows`.
        pipeline: layers are split into stages.
    """
    typical = sum(_kernels_of(row) ** 2 for row in known) / max(len(known), 1)
    further = max(kernels**2 - typical, 0.0)
    further += ((_NEW_CHIP if _timed(kind) else _UNKNOWN_CHIP) / (1 + steps_of(kind, known)) ** 2) ** 2
    further += _PIPELINE**2 if pipeline else 0.0
    return math.sqrt(spread([row["residual"] for row in known]) ** 2 + further)


#: Chips with the same cores as one of which kernels were timed.
_TIMED_LIKE = {"h200", "gb200"}


def _timed(kind: str) -> bool:
    return kind in measured.DEVICES or kind in _TIMED_LIKE


def _kernels_of(row: dict[str, Any]) -> float:
    return math.log(row["high"] / row["low"]) / 2


def interval(counted: float, floor: float, width: float) -> tuple[float, float]:
    """80 % interval of the time of a step.

    Its upper end is a factor of the step, its lower end one of the time beyond the floor, which no step is below; both
    have the same slope for small widths.

    Args:
        counted: seconds of the step.
        floor: a bound of it from below, seconds.
        width: from :func:`width`.
    """
    beyond = max(counted - floor, 0.0)
    low = floor + beyond * math.exp(-width * counted / beyond) if beyond else counted
    return low, counted * math.exp(width)


def left_out(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the step's interval predicted from the others, and whether it contains the published one."""
    made = []
    for row in rows:
        others = [other for other in rows if other is not row]
        of_step = width(kind_of(row["topology"]), _kernels_of(row), others)
        low, high = interval(row["counted"], row["floor"], of_step)
        made.append(row | {"interval": (low, high), "width": of_step, "inside": low <= row["published"] <= high})
    return made


_HEAD = (
    "model", "slice", "predicted, s", "80 % interval, s", "published, s", "inside", "log(published / predicted)",
    "the same at first look", "GiB per chip",
)  # fmt: skip


def _cells(row: dict[str, Any], first: float | None) -> tuple[str, ...]:
    low, high = row["interval"]
    return (
        row["name"], row["topology"], f"{row['counted']:.3g}", f"{low:.3g} to {high:.3g}", f"{row['published']:.3g}",
        "yes" if row["inside"] else "no", f"{row['residual']:+.2f}", "" if first is None else f"{first:+.2f}",
        f"{row['memory_gib']:.1f}",
    )  # fmt: skip


def page(rows: list[dict[str, Any]], first: dict[str, float], missing: list[str], notes: list[str]) -> str:
    """The table of predicted and published steps as Markdown.

    Args:
        rows: of the published steps that were compiled.
        first: logarithms of published over counted time when a step was compared for the first time, by name.
        missing: names of published steps that were not compiled.
        notes: lines about sources and about what is left out.
    """
    made = left_out(rows)
    inside = sum(row["inside"] for row in made)
    errors = [abs(row["residual"]) for row in made]
    widths = sorted(row["width"] for row in made)
    scaled = [abs(each) for each in _scaled_errors(rows)]
    looks = [first[row["name"]] for row in made if row["name"] in first]
    lines = [
        "# The planner's estimates against published train steps",
        "",
        "Written by `python scripts/calibration.py`. Nothing was run here. *Predicted* is the time of a step of this",
        "project's program, compiled for the slice and priced by the cost model ([estimates](estimates.md));",
        "*published* is that of somebody else's program for the same model, measured on hardware, for as many tokens.",
        "An interval is made from the other rows alone; *inside* says whether the published time lies in it. An error",
        "is that of the estimate and of the difference between the two programs together.",
        "",
        "**All of these steps were known while the prices were revised.** Errors at first look, before anything was",
        "changed for a row, are in a column of their own; those of steps that nobody here has seen are nearer to them.",
        "",
        markdown_table(_HEAD, [_cells(row, first.get(row["name"])) for row in made]),
        "",
        f"Inside: {inside} of {len(made)}. Mean |log error| {_mean(errors):.2f}, bias "
        f"{_mean([row['residual'] for row in made]):+.2f}, median half-width {widths[len(widths) // 2]:.2f}. At first "
        f"look: rms {_mean([each**2 for each in looks]) ** 0.5:.2f}, bias {_mean(looks):+.2f}.",
        "",
        f"Nothing is multiplied by a mean ratio of published to predicted time: one by platform, shrunk towards 1 and "
        f"made from the other rows, would leave a mean |log error| of {_mean(scaled):.2f}.",
    ]
    if missing:
        lines += ["", f"Not compiled yet: {'; '.join(missing)}. Run the command again to continue."]
    if in_part := [row["name"] for row in rows if not row["counts"].get("memory")]:
        lines += [
            "",
            "All kernels are counted by today's prices. The programs of these rows were not kept: their kernels are "
            "counted by their shapes, and other work and exchange are those of the compiled program at earlier "
            f"prices: {'; '.join(in_part)}.",
        ]
    versions = sorted({", ".join(row["versions"]) for row in rows})
    lines += ["", f"Versions: {'; '.join(versions)}.", "", "Sources and differences:", "", *notes]
    return "\n".join([*lines, ""])


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / max(len(numbers), 1)


#: Steps at 1 that a scale by platform is shrunk by.
_SHRINKAGE = 3


def _scaled_errors(rows: list[dict[str, Any]]) -> list[float]:
    """Logarithms of published over predicted time with a scale by platform from the other rows, shrunk towards 1."""
    errors = []
    for row in rows:
        others = [each["residual"] for each in rows if each is not row and each["platform"] == row["platform"]]
        errors.append(row["residual"] - sum(others) / (len(others) + _SHRINKAGE))
    return errors
