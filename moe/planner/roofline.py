"""A plan's dearest instructions under the chip's roofline, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from moe.planner.chips import Chip
from moe.planner.gpus import Gpu
from moe.system.atomic_files import write_figure


def figure(path: Path, plan: dict[str, Any], chip: Chip | Gpu) -> None:
    """Write a PNG of the instructions with arithmetic: FLOP/s over FLOPs per byte, with areas in proportion to time.

    Args:
        path: of the file.
        plan: :meth:`moe.planner.plan.Plan.to_json`.
        chip: of its devices.
    """
    peak, bandwidth = chip.device_peak, chip.device_bandwidth
    rows = [row for row in plan["items"] if row["flops"] and row["bytes"] and row["seconds"]]
    fig = Figure(figsize=(7, 4.5), layout="constrained")
    ax = fig.subplots()
    intensities = [row["flops"] / row["bytes"] for row in rows]
    edges = [min([1.0, *intensities]) / 2, peak / bandwidth, max([peak / bandwidth, *intensities]) * 4]
    ax.loglog(edges, [min(peak, bandwidth * edge) for edge in edges], color="black", linewidth=1)
    longest = max((row["seconds"] for row in rows), default=1.0)
    for kind in dict.fromkeys(row["kind"] for row in rows):
        chosen = [row for row in rows if row["kind"] == kind]
        ax.scatter(
            [row["flops"] / row["bytes"] for row in chosen],
            [row["flops"] * row["runs"] / row["seconds"] for row in chosen],
            [20 + 400 * row["seconds"] / longest for row in chosen],
            alpha=0.6,
            label=kind,
        )
    ax.set_xlabel("FLOPs a byte of memory traffic")
    ax.set_ylabel("FLOP/s of a device")
    ax.set_title(f"{plan['topology']}: {plan['step_seconds']:.3g} s a step; areas are times")
    if rows:
        ax.legend(loc="lower right")
    write_figure(path, fig, 150)
