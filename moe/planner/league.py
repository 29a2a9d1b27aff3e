"""The same model, slice and rows compiled for this project and for another codebase, by the same prices.

A row of the file holds the counts of the other codebase's program, which are priced anew with the kept plans; this
project's side is the kept plan of that config and slice.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe.config import to_dict
from moe.config.parse import from_config_dict
from moe.planner import calibration, counts, kept_plans, make_plan
from moe.planner.arithmetic import Flops
from moe.planner.compiled import CompiledStep, Memory
from moe.planner.counts import Counts
from moe.planner.exchanges import Exchange
from moe.planner.kinds import kind_of
from moe.planner.topology import Topology
from moe.system.escaping import markdown_table
from moe.system.foreign_files import Amount, Fields, Positive, kept_whole, read_rows

_GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model on a slice.

    Attributes:
        config: of this project, with a kept plan for the slice.
        topology: of the slice; cloud: its name in a cloud.
        maxtext: MaxText's name of the model.
    """

    config: str
    topology: str
    cloud: str
    maxtext: str

    @property
    def name(self) -> str:
        """Name of the row."""
        return f"{self.config} on {self.topology}"


ENTRIES = (
    Entry("mixtral_8x7b", "v5p:4x4x4", "v5p-128", "mixtral-8x7b"),
    Entry("qwen3_30b_a3b", "v5p:4x4x4", "v5p-128", "qwen3-30b-a3b"),
    Entry("deepseek_v2_lite", "v5p:4x4x4", "v5p-128", "deepseek2-16b"),
    Entry("gpt_oss_20b", "v5p:4x4x4", "v5p-128", "gpt-oss-20b"),
    Entry("deepseek_v3", "v5p:8x8x8", "v5p-1024", "deepseek3-671b"),
)


class _Row(Fields):
    """Fields of a compiled program that are read."""

    name: str
    codebase: str
    settings: list[str]
    memory: Positive
    exchanged: dict[str, Amount]
    counts: Counts
    model_flops_seconds: Positive
    versions: list[str]


_ROW = kept_whole(_Row)


def read(path: Path) -> list[dict[str, Any]]:
    """All rows; none without the file. Raises ConfigError if the file holds something else."""
    return read_rows(path, _ROW) if path.exists() else []


def plan_of(entry: Entry, plans: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The kept plan in bfloat16 of an entry."""
    found = kept_plans.best(plans, entry.config, entry.topology)
    assert found is not None, entry.name
    return found


def settings(entry: Entry, plan: Mapping[str, Any]) -> list[str]:
    """MaxText's settings for as many rows and tokens as the kept plan; all others are its own defaults."""
    config = kept_plans.config_of(plan)
    rows = config.train.batch_size // plan["chips"]
    return [
        f"model_name={entry.maxtext}",
        f"compile_topology={entry.cloud}",
        f"per_device_batch_size={rows}",
        f"max_target_length={config.data.sequence_length}",
    ]


def row(entry: Entry, plan: Mapping[str, Any], topology: Topology, record: Mapping[str, Any]) -> dict[str, Any]:
    """A program of MaxText, whose weights are split over all devices, as a row of the file.

    Args:
        entry: what was compiled.
        plan: the kept plan of the same model, slice and rows.
        topology: of the slice.
        record: as ``maxtext_step.py`` wrote it.
    """
    tree = to_dict(kept_plans.config_of(plan))
    tree["mesh"] |= {"data": 1, "fsdp": len(topology.devices), "expert": 1}
    config = from_config_dict(tree)
    size = record["memory"]
    memory = Memory(
        parameters=size["argument"],
        optimizer=0,
        inputs=0,
        temporaries=size["temp"] + size["output"] - size["alias"],
        code=size["generated_code"],
        peak=record["peak"],
        capacity=topology.capacity,
        host=size["host_temp"] + size["host_argument"],
    )
    step = CompiledStep(_with_names(record["text"]), memory, Flops(), record["seconds"], record["versions"][0])
    made = make_plan.read_step(config, topology, step, order=_order(topology, record["coords"]))
    return {
        "name": entry.name,
        "codebase": "MaxText",
        "settings": settings(entry, plan),
        "memory": memory.total,
        "exchanged": exchanged(made.exchanges),
        "counts": made.counts,
        "model_flops_seconds": made.model_flops / made.peak_flops,
        "versions": record["versions"],
    }


def _with_names(text: str) -> str:
    """The program with JAX's names of megablox's kernels, which MaxText's has only as names of instructions."""
    kernel = re.compile(r'^( *(?:ROOT )?%(t?gmm)[.\d]* = .*custom_call_target="tpu_custom_call")', re.MULTILINE)
    return kernel.sub(r'\1, metadata={op_name="\2"}', text)


def _order(topology: Topology, coords: Iterable[Sequence[int]]) -> list[int]:
    """Ids of the topology's devices at these places; of devices that share a place, in turn."""
    at: dict[tuple[int, ...], list[int]] = {}
    for device in topology.devices:
        at.setdefault(tuple(device.coords), []).append(device.id)
    return [at[tuple(place)].pop(0) for place in coords]


def exchanged(exchanges: Iterable[Exchange]) -> dict[str, float]:
    """Bytes of a device's arrays that are exchanged in a step, by kind of collective."""
    found: dict[str, float] = {}
    for exchange in exchanges:
        found[exchange.kind] = found.get(exchange.kind, 0.0) + exchange.bytes
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def priced(found: Mapping[str, Any]) -> tuple[float, tuple[float, float], float]:
    """Seconds of a row's step by today's prices, its 80 % interval, and the seconds that it waits for exchange."""
    kind = kind_of(found["name"].rpartition(" ")[2])
    made = counts.price(Counts.model_validate(found["counts"]), kind)
    kernels = calibration.kernel_width(made.counted, made.kernels, made.kernels_low, made.kernels_high)
    width = calibration.width(kind, kernels, calibration.rows())
    return made.counted, calibration.interval(made.counted, made.floor, width), made.exposed


_HEAD = (
    "model",
    "slice, rows per chip",
    "codebase",
    "memory, GiB",
    "waits for exchange, s",
    "step, s",
    "MFU",
    "tokens/s",
)


def table(rows: Sequence[Mapping[str, Any]], plans: Sequence[dict[str, Any]]) -> str:
    """Both codebases' programs as Markdown, by today's prices."""
    cells = []
    for entry in ENTRIES:
        theirs = next((each for each in rows if each["name"] == entry.name), None)
        if theirs is None:
            continue
        plan = plan_of(entry, plans)
        rows_of_chip = next(each.partition("=")[2] for each in theirs["settings"] if "batch" in each)
        where = f"{entry.topology}, {rows_of_chip}"
        sides = [
            ("this", plan["memory_total"], plan["exposed_seconds"], plan["step_seconds"], plan["step_interval"],
             plan["mfu"]),
        ]  # fmt: skip
        step, interval, exposed = priced(theirs)
        share = theirs["model_flops_seconds"] / step
        sides.append((theirs["codebase"], theirs["memory"], exposed, step, interval, share))
        for codebase, memory, waits, seconds, (low, high), mfu in sides:
            cells.append(
                (
                    entry.config, where, codebase, f"{memory / _GiB:.1f}", f"{waits:.2g}",
                    f"{seconds:.3g} ({low:.3g} to {high:.3g})", f"{100 * mfu:.1f} %",
                    f"{plan['tokens'] / plan['chips'] / seconds:,.0f}",
                )
            )  # fmt: skip
    return markdown_table(_HEAD, cells)


_PAGE = """# The same slices compiled for two codebases

Written by `python scripts/league.py`. Nothing was run. MaxText's own compile-only program compiled its train step, by
the same version of libtpu, for the slice and the rows of each kept [plan](plans.md); its program is read and priced as
a plan is: the same prices of kernels and of exchanges, and the compiler's cycles for all other work. Both are dropless,
in bfloat16 with float32 weights. MaxText has its default settings besides those below: weights split over all chips,
layers recomputed in full, its megablox and splash kernels, which have the prices of tuned ones whatever their tiles.
Its published recipes set XLA options and rows that these programs do not have: the published step of Mixtral-8x7B on
this slice, of 36 rows a chip, reached 54.9 % of the peak ([calibration](calibration.md)). Ranges are 80 % intervals;
errors of prices that two programs share are in both, so that their ratio is better known than either.

"""


def page(rows: Sequence[Mapping[str, Any]], plans: Sequence[dict[str, Any]]) -> str:
    """The page of all rows, by today's prices."""
    lines = [table(rows, plans), "", "MaxText's programs:", ""]
    for found in rows:
        sizes = ", ".join(f"{kind} {size / _GiB:.0f} GiB" for kind, size in found["exchanged"].items() if size > _GiB)
        lines.append(
            f"- {found['name']}: `{' '.join(found['settings'])}`; {', '.join(found['versions'])}; a chip exchanges "
            f"{sizes} a step."
        )
    known = {found["name"] for found in rows}
    if missing := [entry.name for entry in ENTRIES if entry.name not in known]:
        lines += ["", f"Not compiled yet: {'; '.join(missing)}."]
    return _PAGE + "\n".join([*lines, ""])
