"""python scripts/scaling.py [--out=docs/results] [--programs=DIR]: compile GShard's scaling experiment.

Writes a table, a plot and rows. Programs: GShard's 36-layer model with 128, 512 and 2048 experts on as many TPU v3
cores; the same with gather and mesh.tensor=2 (D = 1024 is then divisible by 2048 / 2 cores); the 128-expert one on
128 to 4096 v5p chips with the same tokens a chip. Points in scaling.jsonl are not made again: remove lines after a
change of model or prices. --programs=DIR keeps the compiled programs and reads those it has instead of compiling.
Needs libtpu: pip install "jax[tpu]".
"""

from pathlib import Path

from moe.system import process

if __name__ == "__main__":
    process.use_tpu_compiler()  # before JAX

import json

from absl import flags
from tqdm import tqdm

from moe.programs import cli

_OUT = flags.DEFINE_string("out", "docs/results", "Folder for the table, the plot and the rows.")
_PROGRAMS = cli.define_path("programs", "Folder in which compiled programs are kept for reuse.")
_MODES = flags.DEFINE_list("modes", ["gather", "einsum", "dropless"], "Dispatch modes to compare.")

V3 = {128: "v3:8x8", 512: "v3:16x16", 2048: "v3:32x32"}
ROWS = "scaling.jsonl"
V5P = {128: "v5p:4x4x8", 1024: "v5p:8x8x16", 4096: "v5p:16x16x16"}

_PAGE = """# GShard's scaling experiment, compiled

Written by `python scripts/scaling.py` ({versions}).
Memory, compile time and the number and size of all-to-alls are facts; times of steps and all-to-alls are estimates,
steps with 80 % intervals ([why](estimates.md)); a step without one was estimated by an earlier cost model. Compile time
is the wall clock of tracing, lowering and compiling, on a machine with other work.
{missing}
{table}

![scaling](scaling.png)

Discussion: docs/log/2026-11.md.
"""


def main() -> None:
    """Compile the missing points; all files are written again after every point."""
    from moe.planner import scaling
    from moe.system.atomic_files import append

    points, folder = every_point(_MODES.value), Path(_OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    programs = Path(_PROGRAMS.value) if _PROGRAMS.value else None
    rows = scaling.read(folder / ROWS)
    known = {(row["series"], row["topology"]) for row in rows}
    missing = [point for point in points if (point.series, point.topology) not in known]
    for row in tqdm(scaling.measure(missing, programs), total=len(missing), unit="program"):
        rows.append(row)
        append(folder / ROWS, json.dumps(row) + "\n")
        write(folder, rows, points)
    print(write(folder, rows, points))


def every_point(modes) -> list:
    """All points of the table, in order."""
    from moe.config import load_python_file
    from moe.config.parse import from_config_dict
    from moe.planner import scaling

    gshard_translation = load_python_file(Path(__file__).parents[1] / "configs" / "gshard_translation.py")
    points = []
    for mode, tensor in [*((mode, 1) for mode in modes), *((mode, 2) for mode in modes if mode == "gather")]:
        series = f"GShard 36 layers, v3, {mode}" + (", tensor 2" if tensor > 1 else "")
        for cores, topology in V3.items():
            config = from_config_dict(gshard_translation.get_config(f"{cores}e36l"))
            config = scaling.at_scale(config, experts=cores, devices=cores, rows=1, dispatch=mode, tensor=tensor)
            points.append(scaling.Point(series, topology, config))
    smallest = from_config_dict(gshard_translation.get_config("128e36l"))
    for mode in modes:
        for chips, topology in V5P.items():
            config = scaling.at_scale(smallest, experts=128, devices=chips, rows=1, dispatch=mode)
            points.append(scaling.Point(f"128 experts, weak scaling, v5p, {mode}", topology, config))
    return points


def write(folder: Path, rows: list[dict], points: list) -> str:
    """Write the page and the plot of the rows so far; returns the table."""
    from moe.planner import scaling
    from moe.planner.versions import versions
    from moe.system.atomic_files import write_atomic

    by_point = {(row["series"], row["topology"]): row for row in rows}
    shown = [by_point[key] for point in points if (key := (point.series, point.topology)) in by_point]
    table, left = scaling.table(shown), len(points) - len(shown)
    missing = f"\n{left} points are not compiled yet; run the command again to continue.\n" if left else ""
    page = _PAGE.format(table=table, versions=", ".join(versions()), missing=missing)
    write_atomic(folder / "scaling.md", page)
    scaling.figure(folder / "scaling.png", shown)
    return table


if __name__ == "__main__":
    cli.run(
        main,
        examples=(
            "python scripts/scaling.py",
            "python scripts/scaling.py --modes=dropless",
        ),
    )
