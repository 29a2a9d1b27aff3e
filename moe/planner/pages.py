"""Documents of plans and of the difference of two, from their JSON: text for a terminal, and an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe.planner import counts, differences
from moe.planner.chips import GiB
from moe.planner.compiled import MEMORY_KINDS
from moe.planner.exchanges import ROUTED
from moe.system import documents
from moe.system.documents import Block, Cell, Heading, Paragraph, Span, StackedBar, Table, Timeline

_Json = dict[str, Any]

_COLOURS = {
    "grouped matmul": "#3b6fb6", "matmul": "#5a9bd4", "attention": "#7a5ba8", "other": "#c98b2b", "loop": "#9aa5b1",
    "no estimate": "#b0b7c0", "exposed exchange": "#c0483b",
}  # fmt: skip
_HIDDEN_EXCHANGE, _SLOWER, _FASTER, _MEMORY = "#e0a59e", "#c0483b", "#3b8f5a", "#5a9bd4"

#: Most parts of the model that a table of the step names, and letters of an instruction's source.
_PARTS, _SOURCE = 16, 110

#: Exchanges of fewer bytes are summed up in one line.
_SMALL = 2**20


def text(plan: _Json, changes: Sequence[_Json] = ()) -> str:
    """The plan for a terminal: facts first, the step's time last. Arguments as in :func:`page`."""
    step = _section("Step (estimate, 80 % intervals)", *_step(plan))
    sections = _memory(plan), _exchanges(plan), _flops(plan), _time(plan), _changes(plan, changes), step
    return documents.text([Heading(_title(plan)), *_head(plan), *_join(sections)])


def page(plan: _Json, changes: Sequence[_Json] = ()) -> str:
    """The plan as an HTML page, with the most expensive instructions, the timeline and the largest arrays.

    Args:
        plan: :meth:`moe.planner.plan.Plan.to_json`.
        changes: tried by recompiling: label, and the plan or an error.
    """
    sections = (
        _time(plan), _instructions(plan), _changes(plan, changes), _timeline(plan), _memory(plan), _arrays(plan),
        _exchanges(plan), _flops(plan), _basis(plan),
    )  # fmt: skip
    return documents.html(_title(plan), [*_head(plan), *_step(plan), *_join(sections)])


def difference(a: _Json, b: _Json, names: tuple[str, str]) -> str:
    """The difference of two plans as an HTML page."""
    plans = [_section(name, *_summary(plan)) for name, plan in zip(names, (a, b), strict=True)]
    return documents.html(f"From {names[0]} to {names[1]}", [*_difference(a, b), *_join(plans)])


def difference_text(a: _Json, b: _Json) -> str:
    """The difference of two plans for a terminal."""
    return documents.text(_difference(a, b))


def _difference(a: _Json, b: _Json) -> list[Block]:
    rows = differences.by_part(a, b)
    largest = max((abs(row["seconds"]) for row in rows), default=1.0) or 1.0
    settings = [(name, str(old), str(new)) for name, old, new in differences.settings(a, b)]
    parts = [
        (
            row["part"],
            _ms(row["a"]),
            _ms(row["b"]),
            f"{1e3 * row['seconds']:+,.1f}",
            Cell(share=abs(row["seconds"]) / largest, colour=_SLOWER if row["seconds"] > 0 else _FASTER),
        )
        for row in rows
    ]
    return [
        Paragraph(differences.sentence(a, b), "big"),
        *_section("Settings that differ", Table(settings, ("setting", "A", "B"))),
        *_section("Time by part", Table(parts, ("part", "A, ms", "B, ms", "change, ms", ""), right=(1, 2, 3))),
    ]


def _join(sections: Sequence[list[Block]]) -> list[Block]:
    return [block for section in sections for block in section]


def _section(title: str, *blocks: Block) -> list[Block]:
    return [Heading(title), *blocks]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"


def _gib(size: float) -> str:
    return f"{size / GiB:.2f}"


def _device(plan: _Json) -> str:
    if plan["platform"] == "gpu":
        return "GPU"
    return "chip" if plan["devices"] == plan["chips"] else "core"


def _title(plan: _Json) -> str:
    slices = f"{plan['num_slices']} slices of " if plan["num_slices"] > 1 else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
    return f"{slices}{plan['topology']}: {mesh}, remat {plan['remat']}"


def _head(plan: _Json) -> list[Block]:
    unit = ("GPU" if plan["platform"] == "gpu" else "chip") + ("s" if plan["chips"] > 1 else "")
    cores = f" = {plan['devices']} cores" if plan["devices"] != plan["chips"] else ""
    scenario = [Paragraph(f"what if: {plan['scenario']}")] if plan["scenario"] else []
    return [
        Paragraph(
            f"{plan['chips']} {unit}{cores}; {plan['total_parameters']:,} parameters, {plan['active_parameters']:,} "
            f"active; {plan['tokens']:,} tokens per step; compiled in {plan['compile_seconds']:.1f} s",
            "mild",
        ),
        *scenario,
    ]


def _summary(plan: _Json) -> list[Block]:
    low, high = plan["step_interval"]
    step, rate, mfu = plan["step_seconds"], plan["tokens_per_second_per_chip"], 100 * plan["mfu"]
    slower, faster = step / high, step / low
    unit = "GPU" if plan["platform"] == "gpu" else "chip"
    return [
        Paragraph(f"step {step:.3g} s ({low:.3g} to {high:.3g})", "big"),
        Paragraph(
            f"MFU {mfu:.1f} % ({mfu * slower:.1f} to {mfu * faster:.1f}), {rate:,.0f} tokens/s/{unit} "
            f"({rate * slower:,.0f} to {rate * faster:,.0f}); {_gib(plan['memory_total'])} of "
            f"{plan['memory']['capacity'] / GiB:.0f} GiB"
        ),
        Paragraph(plan["cost"]),
    ]


def _step(plan: _Json) -> list[Block]:
    return [*_summary(plan), Paragraph(f"bound by {plan['bound']}")]


def _time(plan: _Json) -> list[Block]:
    rows = [dict(row) for row in plan["where"] if row["seconds"] > 0]
    rows.append({"part": "exchange", "kind": "exposed exchange", "seconds": plan["exposed_seconds"]})
    rows.sort(key=lambda row: -row["seconds"])
    total = sum(row["seconds"] for row in rows) or 1.0
    spans = [Span(f"{row['part']}: {_ms(row['seconds'])} ms", row["seconds"], _colour(row["kind"])) for row in rows]
    table = [
        (
            Cell(row["part"], colour=_colour(row["kind"])),
            row["kind"],
            _ms(row["seconds"]),
            f"{100 * row['seconds'] / total:.1f} %",
        )
        for row in rows[:_PARTS]
    ]
    limits = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in plan["limits"].items())
    return _section(
        "Time of a step (estimate)",
        StackedBar(spans),
        Table(table, ("part", "kind", "ms", "share"), right=(2, 3)),
        Paragraph(
            f"on the {_device(plan)} {_ms(plan['compute_seconds'])} ms: {plan['estimate']}; {plan['unpriced']} "
            f"instructions at memory bandwidth; kernels {_ms(plan['kernel_seconds'])} ms "
            f"({1e3 * plan['kernel_low']:,.0f} to {1e3 * plan['kernel_high']:,.0f})"
        ),
        Paragraph(f"exposed {_ms(plan['exposed_seconds'])} ms: exchange with no work scheduled beside it"),
        Paragraph(
            f"at least {_ms(plan['floor_seconds'])} ms: its FLOPs at peak, and that exchange at full bandwidth; of its "
            f"floor {counts.share_words(plan['limits'], plan['step_seconds'])}: {limits}"
        ),
        *(Paragraph(reason) for reason in plan.get("reasons", ())),  # a plan of an earlier version has none
        *_bubble(plan),
        *_unknown_loops(plan),
        Paragraph(f"80 % interval from {plan['interval_basis']}"),
        Paragraph("left out: stragglers, the host's work between steps, checkpoints, restarts"),
    )


def _colour(kind: str) -> str:
    return _COLOURS.get(kind, "#888888")


def _bubble(plan: _Json) -> list[Block]:
    if not plan["bubble"]:
        return []
    stages, idle = plan["mesh"]["pipeline"], plan["mesh"]["pipeline"] - 1
    turns = f"of the {stages} stages has no microbatch in {idle} of its {round(idle / plan['bubble'])} turns"
    return [Paragraph(f"bubble {100 * plan['bubble']:.1f} %, counted above: each {turns}")]


def _unknown_loops(plan: _Json) -> list[Block]:
    number = plan["unknown_loops"]
    if not number:
        return []
    return [Paragraph(f"{number} loops with an unreadable trip count are counted once: an underestimate")]


def _instructions(plan: _Json) -> list[Block]:
    rows = []
    for row in plan["items"]:
        spread = f"{_ms(row['low'])} to {_ms(row['high'])}" if row["high"] > row["low"] else ""
        rows.append(
            (
                Cell(
                    f"{row['part']}, {row['kind']}, {row['pass']}",
                    f"{row['source'][-_SOURCE:] or row['name']}; {row['basis']}",
                ),
                Cell(_ms(row["seconds"]), spread),
                str(row["runs"]),
                row["bound"],
                Cell(f"{100 * row['at_bound']:.0f} %", share=row["at_bound"], colour=_colour(row["kind"])),
            )
        )
    return _section(
        "The 30 most expensive instructions",
        Paragraph(
            "Identical instructions are summed; exchanges count for as long as the device waits for them. The bar is "
            "the time that the work takes at its bound, as a share of its estimated time: a full bar leaves nothing to "
            "gain.",
            "mild",
        ),
        Table(rows, ("instruction", "ms", "runs", "bound", "time at the bound"), right=(1, 2)),
    )


def _changes(plan: _Json, changes: Sequence[_Json]) -> list[Block]:
    if not changes:
        return []
    made = [change for change in changes if "error" not in change["plan"]]
    made.sort(key=lambda change: -change["plan"]["tokens_per_second_per_chip"])
    rows = []
    for change in made:
        rate = change["plan"]["tokens_per_second_per_chip"]
        gain = f"{100 * (rate / plan['tokens_per_second_per_chip'] - 1):+.1f} %"
        rows.append((change["label"], f"{rate:,.0f}", gain, f"{change['plan']['memory_total'] / GiB:.1f}", ""))
    rows += [
        (change["label"], "", "", "", change["plan"]["error"].partition(";")[0])
        for change in changes
        if "error" in change["plan"]
    ]
    return _section(
        "What would help",
        Paragraph("Each was compiled; sorted by tokens/s.", "mild"),
        Table(rows, ("change", "tokens/s", "gain", "GiB", ""), right=(1, 2, 3)),
    )


def _timeline(plan: _Json) -> list[Block]:
    return _section(
        "Timeline",
        Paragraph(
            "One run of each of the largest computations: work on the device above, exchanges below (red: the device "
            "waits for most of it). Gaps in the work are waits.",
            "mild",
        ),
        *map(_lane, plan["lanes"]),
    )


def _lane(lane: _Json) -> Timeline:
    work = [
        Span(f"{label}, {kind}: {_ms(seconds)} ms", seconds, _colour(kind), start)
        for start, seconds, kind, label in lane["work"]
    ]
    exchanges = []
    for start, seconds, wait, label in lane["exchanges"]:
        colour = _COLOURS["exposed exchange"] if wait > 0.5 * seconds else _HIDDEN_EXCHANGE
        exchanges.append(Span(f"{label}, exposed {_ms(wait)} ms: {_ms(seconds)} ms", seconds, colour, start))
    title = f"{lane['name']}: {_ms(lane['seconds'])} ms, {lane['runs']} times per step"
    return Timeline(title, lane["seconds"], (work, exchanges))


def _memory(plan: _Json) -> list[Block]:
    memory, total = plan["memory"], plan["memory_total"]
    kinds = [
        (name, _gib(memory[name]), Cell(share=memory[name] / memory["capacity"], colour=_MEMORY))
        for name in MEMORY_KINDS
    ]
    peak = f"alive at the peak {_gib(memory['peak'])} GiB; the rest is gaps between buffers"
    host = f"in the host's memory {_gib(memory['host'])} GiB"
    notes = [
        *([peak] if 0 < memory["peak"] < total else []),
        *([host] if memory["host"] else []),
        *plan["memory_notes"],
    ]
    return _section(
        f"Memory per {_device(plan)} (fact)",
        Paragraph(f"fits, {_gib(total)} GiB of {memory['capacity'] / GiB:.0f}"),
        Table(kinds, ("part", "GiB", ""), right=(1,)),
        *map(Paragraph, notes),
    )


def _arrays(plan: _Json) -> list[Block]:
    rows = [
        (Cell(array["type"].partition("{")[0], array["source"][-_SOURCE:]), _gib(array["bytes"]))
        for array in plan["arrays"]
    ]
    note = "The largest arrays at the peak, from the order of the program, without padding: an estimate."
    return [Paragraph(note, "mild"), Table(rows, ("array", "GiB"), right=(1,))]


def _exchanges(plan: _Json) -> list[Block]:
    ordered = sorted(plan["exchanges"], key=lambda each: ("+".join(each["axes"]), -each["seconds"]))
    rows = [
        (
            "+".join(each["axes"]),
            each["kind"],
            each["purpose"],
            str(each["count"]),
            str(each["asynchronous"]),
            f"{each['bytes'] / 2**20:,.0f}",
            _ms(each["seconds"]),
            _ms(each["exposed_seconds"]),
        )
        for each in ordered
        if each["bytes"] >= _SMALL
    ]
    header = ("axes", "kind", "purpose", "count", "async", "MiB", "ms", "exposed, ms")
    small = sum(each["count"] for each in ordered if each["bytes"] < _SMALL)
    notes = [f"{small} more, in groups of less than 1 MiB"] if small else []
    return _section(
        f"Exchanges (collectives) of a step, bytes per {_device(plan)} (fact; times: network model, an estimate)",
        Table(rows, header, right=(3, 4, 5, 6, 7)),
        *map(Paragraph, [*notes, *_token_gathers(plan)]),
    )


def _token_gathers(plan: _Json) -> list[str]:
    """Whether tokens are gathered on every device."""
    if plan["token_all_gathers"]:
        names = ", ".join(plan["gathered_tokens"])
        return [
            f"PROBLEM: arrays other than weights are gathered on every {_device(plan)}: {names}",
            "another mesh or model.moe.dispatch may avoid this: --search compiles and ranks them",
        ]
    if plan["unnamed_all_gathers"]:
        return ["the program does not name its exchanges; plan one slice to see whether tokens are gathered"]
    if any(each["kind"] == "all-gather" and each["purpose"] == ROUTED for each in plan["exchanges"]):
        return ["tokens are gathered as model.moe.exchange=all_gather asks, and by nothing else"]
    return ["no all-gather of tokens"]


def _flops(plan: _Json) -> list[Block]:
    ratio = plan["program_flops"] / plan["model_flops"]
    extra = f"{ratio:.2f} x the model's: recomputation, empty expert slots, masked attention"
    return _section(
        "FLOPs of a step, all chips (counted)",
        Table(
            [
                ("6 x active parameters x tokens", f"{plan['simple_flops']:.4g}", ""),
                ("model, with attention (for MFU)", f"{plan['model_flops']:.4g}", ""),
                ("matrix products traced", f"{plan['program_flops']:.4g}", extra),
            ],
            right=(1,),
        ),
    )


def _basis(plan: _Json) -> list[Block]:
    rows = [(name, f"{_ms(seconds)} ms") for name, seconds in plan["basis"].items() if seconds > 0]
    versions = Paragraph(", ".join(plan["versions"]), "small")
    return _section("What the work's time rests on", Table(rows, right=(1,)), versions)
