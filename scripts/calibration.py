"""python scripts/calibration.py [--only=NAME] [--programs=DIR]: compare the planner with published train steps.

Compiles this project's train step for the model, slice and batch of each published step. Writes counted and published
seconds to moe/planner/calibration.json, from which plans take their interval, and the table predicted / published /
inside to docs/results/calibration.md. Rows that are there are not compiled again, unless --only names one: they, and
all kept plans, are counted anew from what is kept of their programs, by today's prices. --programs=DIR keeps the
compiled programs and reuses those of the same config, slice and versions. Needs libtpu and JAX's CUDA plugin:
pip install "jax[tpu]" "jax[cuda13]".

--check names the kept plans and steps whose numbers are not those of today's prices; the exit code is then 1.

--score compares docs/results/predictions.jsonl, plans that moe plan --register wrote down before a number was known,
with the numbers that docs/results/outcomes.jsonl has since: coverage, log score and bias. Nothing is compiled.
"""

from pathlib import Path

from moe.system import process

if __name__ == "__main__":
    process.use_tpu_compiler()  # before JAX

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from absl import flags

from moe.programs import cli

_ONLY = flags.DEFINE_string("only", "", "Name of the row to make again; empty: all rows that are missing.")
_PROGRAMS = cli.define_path("programs", "Folder in which compiled programs are kept for reuse.")
_CHECK = flags.DEFINE_bool("check", False, "Name kept plans and steps that are not by today's prices; write nothing.")
_SCORE = flags.DEFINE_bool("score", False, "Score the registered predictions whose numbers were published.")

PAGE = Path(__file__).parents[1] / "docs" / "results" / "calibration.md"

#: The plan of the front page, with instructions and timeline, which only its program can give anew.
SHOWN = PAGE.parents[1] / "plan.json"

LEFT_OUT = """The B200 row of 25.11 is one program of ours that gathers weights every layer. For the same model, GPUs
and microbatches, release 26.02.01 publishes 13,722 tokens/s, 1.67 times as many: outside the interval of that program.

One step of Kimi-K2 is public: 6.4 % MFU on 256 tpu7x chips, with Muon and dense matmuls instead of a kernel for grouped
ones, so that experts multiply padded buffers. Our plan for v5p states five times that, for dropless kernels and AdamW:
the two are not the same program, and the step is not compared.

Published steps that are not compared: 8 of 8 experts against 14 of 56 on v5p (measured without attention,
batch not stated); Llama 3.1 70B on 64 tpu7x (neither rows nor recomputation stated); Qwen3-30B on 16 H100 with the
exchange of one microbatch overlapped with the work of another (31.3 s; 21.0 s by HybridEP), where ours overlaps with
the experts alone; pipelines and float8 (most other rows of NVIDIA)."""


def outside(rows: Sequence[dict[str, Any]]) -> str:
    """The reason why Mixtral-8x22B on v6e lies outside of its interval, as a paragraph."""
    (row,) = (each for each in rows if each["name"] == "Mixtral-8x22B, v6e-256")
    return (
        "Mixtral-8x22B on v6e lies outside, with rings counted by their phases. Its work alone is counted at "
        f"{row['counted'] - row['exposed']:.1f} s, the published step at {row['published']:.1f}: what our program "
        f"takes more is the {row['exposed']:.1f} s that it waits for exchange, mostly of weights and their gradients, "
        "which four microbatches gather four times as often as the published one."
    )


def compare(name: str, folder: Path | None) -> dict[str, Any]:
    """Compile one program, or read it if it is kept, and return its row of the table."""
    from moe.planner import compiled, make_plan, published, topology

    row = published.PUBLISHED[name]
    where = topology.get_topology(row.topology)
    config = published.config_of(row, len(where.devices))
    made = make_plan.read_step(config, where, compiled.read_or_compile(config, where, folder, apart=True))
    seconds = published.published_seconds(row, config, made.chips)
    return {
        "name": name,
        "platform": made.platform,
        "topology": row.topology,
        "counted": made.counted_seconds,
        "floor": made.floor_seconds,
        "low": made.counted_seconds - made.kernel_seconds + made.kernel_low,
        "high": made.counted_seconds - made.kernel_seconds + made.kernel_high,
        "published": seconds,
        "residual": math.log(seconds / made.counted_seconds),
        "mfu": made.model_flops / (made.counted_seconds * made.peak_flops),
        "memory_gib": made.memory.total / 2**30,
        "exposed": made.exposed_seconds,
        "counts": made.counts,
        "versions": list(made.versions),
        "commit": made.commit,
        "prices": made.prices,
    }


def main() -> None:
    """Make what is missing; the page is written again after every row."""
    from moe.config import ConfigError
    from moe.planner import calibration, register
    from moe.planner.published import PUBLISHED

    if _SCORE.value:
        print(register.report(PAGE.with_name("predictions.jsonl"), PAGE.with_name("outcomes.jsonl")))
        return
    if _ONLY.value and _ONLY.value not in PUBLISHED:
        raise ConfigError(f"--only={_ONLY.value}: must be one of {'; '.join(PUBLISHED)}")
    folder = Path(_PROGRAMS.value) if _PROGRAMS.value else None
    known = {row["name"]: row for row in calibration.rows()}
    if _CHECK.value:
        check(list(known.values()))
        return
    write(known)
    for name in [_ONLY.value] if _ONLY.value else [name for name in PUBLISHED if name not in known]:
        try:
            made = compare(name, folder)
        except ConfigError as error:
            print(f"{name}: {error}")
            continue
        known = {row["name"]: row for row in calibration.rows()} | {name: made}  # another process may have written
        write(known)
        print(f"{name}: counted {known[name]['counted']:.3g} s, published {known[name]['published']:.3g} s")


def kernel_lines() -> list[str]:
    """Errors of the prices of grouped matmuls on timings that are left out, by device, as Markdown."""
    from moe.planner import measured
    from moe.system.escaping import markdown_table

    found = {matrices: measured.errors(matrices=matrices) for matrices in (False, True)}
    cells = []
    for name, table in measured.DEVICES.items():
        row = [name, str(sum(timing.device == table for timing, *_ in found[False]))]
        for errors in found.values():
            own = [(abs(error), inside) for timing, error, inside in errors if timing.device == table]
            row += [f"{statistics.median(size for size, _ in own):.2f}", f"{statistics.mean(i for _, i in own):.0%}"]
        cells.append(row)
    head = "device", "timings", "shape left out: median |log error|", "inside", "all of its matrices left out", "inside"
    return [
        "## Kernels",
        "",
        "Prices of grouped matmuls against published timings that were left out of the fit"
        " ([estimates](estimates.md#grouped-matmuls)). Intervals are made for 80 % inside.",
        "",
        markdown_table(head, cells),
    ]


def by_shapes_lines() -> list[str]:
    """The published steps priced by shapes, those that were not compiled included, as Markdown."""
    from moe.interop.config_json import write_config
    from moe.planner import by_shapes, open_shapes, topology
    from moe.planner.published import PUBLISHED, config_of, published_seconds
    from moe.system.escaping import markdown_table

    cells, errors, inside = [], [], 0
    for name, row in PUBLISHED.items():
        where = topology.get_topology(row.topology, compiles=False)
        config = config_of(row, len(where.devices))
        made = by_shapes.make(open_shapes.read(write_config(config)), where, row.rows, row.length)
        published, (low, high) = published_seconds(row, config, where.num_chips), made.step_interval
        errors.append(math.log(published / made.step_seconds))
        inside += low <= published <= high
        step = f"{made.step_seconds:.3g}", f"{low:.3g} to {high:.3g}", f"{published:.3g}"
        cells.append((name, *step, "yes" if low <= published <= high else "no", f"{errors[-1]:+.2f}"))
    mean = sum(map(abs, errors)) / len(errors)
    head = "model", "by shapes, s", "80 % interval, s", "published, s", "inside", "log(published / by shapes)"
    return [
        "## By shapes",
        "",
        "The same steps by the shapes of their matrices alone, with recomputed layers and without exchanged tokens",
        "(`moe plan --hf`, [plans](../pods.md#any-published-model)). The published numbers went into these intervals",
        "through the spread of the table above, and not into the prices.",
        "",
        markdown_table(head, cells),
        "",
        f"Inside: {inside} of {len(cells)}. Mean |log error| {mean:.2f}.",
    ]


def write(known: dict[str, Any]) -> None:
    """Write the rows and the page."""
    from moe.planner import calibration, kept_plans
    from moe.planner.published import PUBLISHED
    from moe.system.atomic_files import write_atomic

    rows = [calibration.recounted(known[name]) for name in PUBLISHED if name in known]
    write_atomic(calibration.PATH, json.dumps(rows, indent=1) + "\n")
    sources = [f"- {name}: {own.source}. Here: {own.differs}." for name, own in PUBLISHED.items()]
    missing = [name for name in PUBLISHED if name not in known]
    first = {name: own.first_look for name, own in PUBLISHED.items() if own.first_look is not None}
    parts = [*kernel_lines(), "", *by_shapes_lines()]
    write_atomic(PAGE, calibration.page(rows, first, missing, [*sources, "", outside(rows), "", LEFT_OUT, "", *parts]))
    root = PAGE.parents[2]
    kept_plans.recount(root / "configs" / "plans.json", root / "docs" / "results" / "plans.md")


def stale_shown() -> list[str]:
    """The plan of the front page, if its time is not that of today's prices."""
    from moe.planner import counts
    from moe.planner.kinds import kind_of

    shown = json.loads(SHOWN.read_text())
    today = counts.price(counts.Counts.model_validate(shown["counts"]), kind_of(shown["topology"])).counted
    same = math.isclose(today, shown["step_seconds"], rel_tol=1e-6)
    return [] if same else ["docs/plan.json (docs/pods.md has the command that makes it)"]


def check(rows: list[dict[str, Any]]) -> None:
    """Compare the kept plans and steps with today's prices; the exit code is 1 if any differs."""
    from moe.planner import calibration, kept_plans

    plans = kept_plans.read(PAGE.parents[2] / "configs" / "plans.json")
    stale = [f"plan of {name}" for name in kept_plans.stale(plans, rows)]
    stale += [f"step of {name}" for name in calibration.stale(rows)]
    stale += stale_shown()
    for each in stale:
        print(f"not by today's prices: {each}")
    if stale:
        raise SystemExit(1)
    print(f"{len(plans)} plans and {len(rows)} published steps are counted by today's prices")


if __name__ == "__main__":
    cli.run(
        main,
        examples=(
            "python scripts/calibration.py",
            "python scripts/calibration.py --only=NAME",
            "python scripts/calibration.py --check",
        ),
    )
