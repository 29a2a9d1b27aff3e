"""GShard's scaling experiment, compiled: memory and compile time as experts grow with devices (GShard 2020, section 4).

With one expert and the same tokens a device, only the exchange can grow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import pydantic
from matplotlib.figure import Figure

from moe.config import Config, ConfigError, MeshConfig
from moe.planner import make_plan
from moe.planner.topology import get_topology
from moe.system.atomic_files import write_figure
from moe.system.escaping import markdown_table
from moe.system.foreign_files import Amount, Fields, Interval, kept_whole, parse
from moe.system.reading import read_small_file


@dataclasses.dataclass(frozen=True)
class Point:
    """One program to compile.

    Attributes:
        series: name of the curve it belongs to.
        topology: a name for :func:`moe.planner.topology.get_topology`.
    """

    series: str
    topology: str
    config: Config


class _Row(Fields):
    """Fields of a row that table and figure read; a compiled point has all its figures, a refused one none."""

    series: str
    topology: str
    devices: int
    experts: int
    refused: str = ""
    parameters: Amount = 0
    memory_gib: Amount = 0
    compile_seconds: Amount = 0
    all_to_alls: Amount = 0
    all_to_all_mib: Amount = 0
    all_to_all_ms: Amount = 0
    step_ms: Amount = 0
    step_interval_ms: Interval | None = None  # absent from rows of earlier prices

    @pydantic.model_validator(mode="after")
    def _check_figures(self) -> _Row:
        absent = _Row.model_fields.keys() - self.model_fields_set
        if (figures := sorted(absent - {"refused", "step_interval_ms"})) and "refused" in absent:
            raise ValueError(f"has no {figures[0]}, and is not refused")
        return self


_ROW = kept_whole(_Row)


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of :func:`measure` that were kept as lines of JSON; empty without the file.

    Raises:
        ConfigError: a line is something else.
    """
    lines = read_small_file(path).splitlines() if path.exists() else []
    return [
        parse(line, _ROW, f"{path}, line {number}: not a row of scaling; delete it to compile its point again")
        for number, line in enumerate(lines, 1)
    ]


def at_scale(config: Config, *, experts: int, devices: int, rows: int, dispatch: str, tensor: int = 1) -> Config:
    """Set the experts, devices and rows per device of a config.

    With ``tensor`` > 1, each group of that many devices holds that many experts, a slice of each per device, and shares
    its tokens.

    Raises:
        ConfigError: see :func:`moe.config.parse.from_config_dict`.
    """
    model = dataclasses.replace(
        config.model, moe=dataclasses.replace(config.model.moe, num_experts=experts, dispatch=dispatch)
    )
    expert = min(experts, devices) // tensor
    return dataclasses.replace(
        config,
        model=model,
        mesh=MeshConfig(data=devices // (expert * tensor), fsdp=1, expert=expert, tensor=tensor),
        train=dataclasses.replace(config.train, batch_size=rows * devices),
    )


def measure(points: Iterable[Point], programs: Path | None = None) -> Iterator[dict[str, Any]]:
    """Compile the points in turn, or read them from a folder of programs, and yield a row of figures for each.

    A point that the checks or the compiler refuse has ``refused``, the reason, instead of figures.
    """
    for point in points:
        where = get_topology(point.topology)
        row = {
            "series": point.series,
            "topology": point.topology,
            "devices": len(where.devices),
            "experts": point.config.model.moe.num_experts,
        }
        try:
            made = make_plan.make_plan(point.config, where, programs=programs)
        except (ConfigError, jax.errors.JaxRuntimeError, NotImplementedError) as error:
            yield row | {"refused": str(error).splitlines()[0].partition("; what helps")[0]}
            continue
        exchanges = [exchange for exchange in made.exchanges if "all-to-all" in exchange.kind]
        yield row | {
            "parameters": made.total_parameters,
            "memory_gib": made.memory.total / 2**30,
            "compile_seconds": made.compile_seconds,
            "all_to_alls": sum(exchange.count for exchange in exchanges),
            "all_to_all_mib": sum(exchange.bytes for exchange in exchanges) / 2**20,
            "all_to_all_ms": 1e3 * sum(exchange.seconds for exchange in exchanges),
            "step_ms": 1e3 * made.step_seconds,
            "step_interval_ms": [1e3 * end for end in made.step_interval],
            "token_all_gathers": len(made.token_exchanges),
        }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table, followed by the reasons of refused points."""
    heads = {
        "series": "series",
        "topology": "topology",
        "devices": "devices",
        "experts": "experts",
        "parameters": "parameters (B)",
        "memory_gib": "memory per device (GiB)",
        "compile_seconds": "compile (s)",
        "all_to_alls": "all-to-alls per step",
        "all_to_all_mib": "all-to-all per device (MiB)",
        "all_to_all_ms": "all-to-all (ms, estimate)",
        "step_ms": "step (ms, estimate, 80 % interval)",
    }

    def shown(row: dict[str, Any], name: str) -> str:
        if name not in row:
            return "refused" if name == "memory_gib" else "–"
        if name == "step_ms" and (interval := row.get("step_interval_ms")):
            return f"{row[name]:.0f} ({interval[0]:.0f} to {interval[1]:.0f})"
        value = row[name] / 1e9 if name == "parameters" else row[name]
        return f"{value:.1f}" if isinstance(value, float) else str(value)

    lines = [markdown_table(tuple(heads.values()), [[shown(row, name) for name in heads] for row in rows])]
    refused = [row for row in rows if "refused" in row]
    if refused:
        lines += ["", "Refused:", ""]
        lines += [f"- {row['series']} on {row['topology']}: {row['refused']}" for row in refused]
    return "\n".join(lines)


def figure(path: Any, rows: list[dict[str, Any]]) -> None:
    """Save a PNG with four panels over the number of devices, one line per series."""
    panels = {
        "memory_gib": "memory a device (GiB)",
        "compile_seconds": "compile time (s)",
        "all_to_all_ms": "all-to-all a step (ms, network model)",
        "step_ms": "step (ms, estimate, 80 %)",
    }
    drawing = Figure(figsize=(10, 7), layout="constrained")
    axes = drawing.subplots(2, 2)
    for axis, (name, label) in zip(axes.flat, panels.items(), strict=True):
        compiled = [row for row in rows if "refused" not in row]
        for i, series in enumerate(dict.fromkeys(row["series"] for row in compiled)):
            mine = [row for row in compiled if row["series"] == series]
            style = ("o-", "s--", "^:")[i % 3]  # overlapping lines stay visible
            axis.plot([row["devices"] for row in mine], [row[name] for row in mine], style, label=series)
            known = [row for row in mine if name == "step_ms" and row.get("step_interval_ms")]
            if known:
                low, high = zip(*(row["step_interval_ms"] for row in known), strict=True)
                axis.vlines([row["devices"] for row in known], low, high, f"C{i}", alpha=0.5)
        axis.set(xscale="log", xlabel="devices", ylabel=label, ylim=(0, None))
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    write_figure(path, drawing, 110)
