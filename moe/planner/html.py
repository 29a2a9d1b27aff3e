"""Self-contained HTML pages of plans and of the difference of two, from their JSON; no script, no network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from moe.planner import counts, differences
from moe.planner.chips import GiB
from moe.planner.compiled import MEMORY_KINDS

_Json = dict[str, Any]

_COLOURS = {
    "grouped matmul": "#3b6fb6", "matmul": "#5a9bd4", "attention": "#7a5ba8", "other": "#c98b2b", "loop": "#9aa5b1",
    "no estimate": "#b0b7c0", "exposed exchange": "#c0483b",
}  # fmt: skip

_STYLE = """
body{font:16px/1.45 system-ui,sans-serif;margin:0 auto;max-width:60rem;padding:0 .8rem 3rem;color:#1b2430}
h1{font-size:1.35rem;margin:1rem 0 .2rem}h2{font-size:1.1rem;margin:1.8rem 0 .4rem}p{margin:.3rem 0}
.big{font-size:1.5rem;font-weight:650}.mild{color:#5b6673}.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.86rem}td,th{padding:.28rem .45rem;text-align:left;
border-bottom:1px solid #e4e8ec;vertical-align:top}td.n,th.n{text-align:right;white-space:nowrap}
.bar{display:flex;height:1.9rem;border-radius:.3rem;overflow:hidden;margin:.5rem 0}.bar span{display:block}
.key{display:inline-block;width:.8rem;height:.8rem;border-radius:.2rem;margin-right:.35rem;vertical-align:-1px}
td:first-child{min-width:9rem}.small{font-size:.78rem;color:#5b6673;word-break:break-word}svg{display:block}
@media(prefers-color-scheme:dark){body{background:#14181d;color:#dfe5ec}td,th{border-color:#2b333c}
.mild,.small{color:#9aa5b1}}
"""


def page(plan: _Json, changes: Sequence[_Json] = ()) -> str:
    """The page of a plan.

    Args:
        plan: :meth:`moe.planner.plan.Plan.to_json`.
        changes: tried by recompiling: label, and the plan or an error.
    """
    sections = [
        _head(plan), _where(plan), _dearest(plan), _changes(plan, changes), _timeline(plan), _memory(plan),
        _exchanges(plan), _basis(plan),
    ]  # fmt: skip
    return _document(f"Plan: {plan['topology']}", "".join(sections))


def difference(a: _Json, b: _Json, names: tuple[str, str]) -> str:
    """The page of the difference of two plans."""
    rows = differences.by_part(a, b)
    largest = max((abs(row["seconds"]) for row in rows), default=1.0) or 1.0
    lines = [
        f"<h1>From {_text(names[0])} to {_text(names[1])}</h1><p class=big>{_text(differences.sentence(a, b))}</p>",
        "<h2>Settings that differ</h2><div class=scroll><table>",
        *(f"<tr><td>{_text(name)}<td>{_text(old)}<td>{_text(new)}" for name, old, new in differences.settings(a, b)),
        "</table></div><h2>Time by part</h2><div class=scroll><table><tr><th>part<th class=n>A, ms<th class=n>B, ms"
        "<th class=n>change, ms<th>",
    ]
    for row in rows:
        colour = "#c0483b" if row["seconds"] > 0 else "#3b8f5a"
        lines.append(
            f"<tr><td>{_text(row['part'])}<td class=n>{_ms(row['a'])}<td class=n>{_ms(row['b'])}<td class=n>"
            f"{1e3 * row['seconds']:+,.1f}<td style='width:30%'>{_meter(abs(row['seconds']) / largest, colour)}"
        )
    lines.append("</table></div>")
    for name, plan in zip(names, (a, b), strict=True):
        lines += [f"<h2>{_text(name)}</h2>", _summary(plan)]
    return _document("Difference of two plans", "".join(lines))


def _document(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width,'
        f'initial-scale=1"><title>{_text(title)}</title><style>{_STYLE}</style><body>{body}</body></html>\n'
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _colour(row: _Json) -> str:
    return _COLOURS.get(row["kind"], "#888888")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"


def _meter(share: float, colour: str) -> str:
    width = 100 * min(max(share, 0.0), 1.0)
    return f"<div style='background:{colour};height:.7rem;width:{width:.1f}%;border-radius:.2rem'></div>"


def _summary(plan: _Json) -> str:
    low, high = plan["step_interval"]
    step = plan["step_seconds"]
    rate = plan["tokens_per_second_per_chip"]
    memory = plan["memory"]
    unit = "GPU" if plan["platform"] == "gpu" else "chip"
    return (
        f"<p class=big>step {step:.3g} s <span class=mild>({low:.3g} to {high:.3g})</span></p><p>MFU "
        f"{100 * plan['mfu']:.1f} % ({100 * plan['mfu'] * step / high:.1f} to {100 * plan['mfu'] * step / low:.1f}), "
        f"{rate:,.0f} tokens/s/{unit} ({rate * step / high:,.0f} to {rate * step / low:,.0f}); "
        f"{plan['memory_total'] / GiB:.1f} of {memory['capacity'] / GiB:.0f} GiB</p><p>{_text(plan['cost'])}</p>"
    )


def _head(plan: _Json) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
    scenario = f"<p>What if: {_text(plan['scenario'])}</p>" if plan["scenario"] else ""
    return (
        f"<h1>{_text(plan['topology'])}: {_text(mesh)}, remat {_text(plan['remat'])}</h1><p class=mild>"
        f"{plan['total_parameters']:,} parameters, {plan['active_parameters']:,} active; {plan['tokens']:,} tokens per "
        f"step</p>{scenario}{_summary(plan)}<p>Bound by {_text(plan['bound'])}.</p>"
    )


def _where(plan: _Json) -> str:
    rows = [dict(row) for row in plan["where"] if row["seconds"] > 0]
    rows.append({"part": "exchange", "kind": "exposed exchange", "seconds": plan["exposed_seconds"]})
    rows.sort(key=lambda row: -row["seconds"])
    total = sum(row["seconds"] for row in rows) or 1.0
    bar = "".join(
        f"<span title='{_text(row['part'])}: {_ms(row['seconds'])} ms' style='width:"
        f"{100 * row['seconds'] / total:.2f}%;background:{_colour(row)};border-right:1px solid #fff'></span>"
        for row in rows
    )
    body = "".join(
        f"<tr><td><span class=key style='background:{_colour(row)}'></span>{_text(row['part'])}<td>"
        f"{_text(row['kind'])}<td class=n>{_ms(row['seconds'])}<td class=n>{100 * row['seconds'] / total:.1f} %"
        for row in rows[:16]
    )
    return (
        f"<h2>Where the step goes</h2><div class=bar>{bar}</div><div class=scroll><table><tr><th>part<th>kind"
        f"<th class=n>ms<th class=n>share{body}</table></div>"
    )


def _dearest(plan: _Json) -> str:
    lines = [
        "<h2>The 30 most expensive instructions</h2><p class=mild>Identical instructions are summed; "
        "exchanges count for as long as the device waits for them. The bar is the time that the work takes at its "
        "bound, as a share of its estimated time: a full bar leaves nothing to gain.</p><div class=scroll><table><tr>"
        "<th>instruction<th class=n>ms<th class=n>runs<th>bound<th style='width:22%'>time at the bound"
    ]
    for row in plan["items"]:
        spread = f"{_ms(row['low'])} to {_ms(row['high'])}" if row["high"] > row["low"] else ""
        lines.append(
            f"<tr><td><b>{_text(row['part'])}</b>, {_text(row['kind'])}, {_text(row['pass'])}<div class=small>"
            f"{_text(row['source'][-110:] or row['name'])}; {_text(row['basis'])}</div><td class=n>"
            f"{_ms(row['seconds'])}<div class=small>{spread}</div><td class=n>{row['runs']}<td>{row['bound']}<td>"
            f"{_meter(row['at_bound'], _colour(row))}<span class=small>"
            f"{100 * row['at_bound']:.0f} %</span>"
        )
    return "".join(lines) + "</table></div>"


def _changes(plan: _Json, changes: Sequence[_Json]) -> str:
    if not changes:
        return ""
    rate = plan["tokens_per_second_per_chip"]
    made = [change for change in changes if "error" not in change["plan"]]
    made.sort(key=lambda change: -change["plan"]["tokens_per_second_per_chip"])
    lines = [
        "<h2>What would help</h2><p class=mild>Each was compiled; sorted by tokens/s.</p><div class=scroll><table>"
        "<tr><th>change<th class=n>tokens/s<th class=n>gain<th class=n>GiB"
    ]
    lines += [
        f"<tr><td>{_text(change['label'])}<td class=n>{change['plan']['tokens_per_second_per_chip']:,.0f}<td class=n>"
        f"{100 * (change['plan']['tokens_per_second_per_chip'] / rate - 1):+.1f} %<td class=n>"
        f"{change['plan']['memory_total'] / GiB:.1f}"
        for change in made
    ]
    lines += [
        f"<tr><td>{_text(change['label'])}<td colspan=3>{_text(change['plan']['error'].partition(';')[0])}"
        for change in changes
        if "error" in change["plan"]
    ]
    return "".join(lines) + "</table></div>"


def _timeline(plan: _Json) -> str:
    parts = [
        "<h2>Timeline</h2><p class=mild>One run of each of the largest computations: work on the device above, "
        "exchanges below (red: the device waits for most of it). Gaps in the work are waits.</p>"
    ]
    for lane in plan["lanes"]:
        total = lane["seconds"] or 1.0
        width = 1400
        parts.append(
            f"<p>{_text(lane['name'])}: {_ms(total)} ms, {lane['runs']} times per step</p><div class=scroll><svg width="
            f"{width} height=74 role=img>"
        )
        for start, seconds, kind, label in lane["work"]:
            parts.append(_block(start, seconds, total, width, 4, _COLOURS.get(kind, "#888"), f"{label}, {kind}"))
        for start, seconds, wait, label in lane["exchanges"]:
            colour = _COLOURS["exposed exchange"] if wait > 0.5 * seconds else "#e0a59e"
            parts.append(_block(start, seconds, total, width, 40, colour, f"{label}, exposed {_ms(wait)} ms"))
        parts.append("</svg></div>")
    return "".join(parts)


def _block(start: float, seconds: float, total: float, width: int, y: int, colour: str, label: str) -> str:
    left, size = width * start / total, max(width * seconds / total, 0.6)
    return (
        f"<rect x={left:.1f} y={y} width={min(size, max(width - left, 0.6)):.1f} height=30 fill='{colour}'>"
        f"<title>{_text(label)}: {_ms(seconds)} ms</title></rect>"
    )


def _memory(plan: _Json) -> str:
    memory = plan["memory"]
    notes = "".join(f"<p>{_text(each)}.</p>" for each in plan["memory_notes"])
    kinds = "".join(
        f"<tr><td>{name}<td class=n>{memory[name] / GiB:.2f}<td style='width:50%'>"
        f"{_meter(memory[name] / memory['capacity'], '#5a9bd4')}"
        for name in MEMORY_KINDS
    )
    arrays = "".join(
        f"<tr><td>{_text(array['type'].partition('{')[0])}<div class=small>{_text(array['source'][-110:])}</div><td "
        f"class=n>{array['bytes'] / GiB:.2f}"
        for array in plan["arrays"]
    )
    return (
        f"<h2>Memory</h2><p>{plan['memory_total'] / GiB:.2f} GiB of {memory['capacity'] / GiB:.0f} allocated; alive at "
        f"the peak {memory['peak'] / GiB:.2f}.</p>{notes}<div class=scroll><table>{kinds}</table></div><p class=mild>"
        "The largest arrays at the peak, from the order of the program, without padding: an estimate.</p>"
        f"<div class=scroll><table><tr><th>array<th class=n>GiB{arrays}</table></div>"
    )


def _exchanges(plan: _Json) -> str:
    lines = [
        "<h2>Exchanges</h2><div class=scroll><table><tr><th>axes<th>kind<th>purpose<th class=n>MiB<th class=n>ms<th "
        "class=n>exposed, ms"
    ]
    for exchange in sorted(plan["exchanges"], key=lambda each: ("+".join(each["axes"]), -each["seconds"])):
        if exchange["bytes"] >= 2**20:
            lines.append(
                f"<tr><td>{_text('+'.join(exchange['axes']))}<td>{_text(exchange['kind'])}<td>"
                f"{_text(exchange['purpose'])}<td class=n>{exchange['bytes'] / 2**20:,.0f}<td class=n>"
                f"{_ms(exchange['seconds'])}<td class=n>{_ms(exchange['exposed_seconds'])}"
            )
    return "".join(lines) + "</table></div>"


def _basis(plan: _Json) -> str:
    rows = "".join(
        f"<tr><td>{_text(name)}<td class=n>{_ms(seconds)} ms" for name, seconds in plan["basis"].items() if seconds > 0
    )
    return (
        f"<h2>What this rests on</h2><p>80 % intervals from {_text(plan['interval_basis'])}.</p><p>Left out: "
        f"stragglers, the host's work between steps, checkpoints, restarts.</p><table>{rows}</table><p class=small>"
        f"{_text(', '.join(plan['versions']))}; at least "
        f"{plan['floor_seconds']:.4g} s: its FLOPs at peak, and exposed exchange at the links' bandwidth; of its own "
        f"floor {_text(counts.share_words(plan['limits'], plan['step_seconds']))}</p>"
    )
