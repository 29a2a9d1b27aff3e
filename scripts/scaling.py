"""python scripts/scaling.py [--out=docs/results]: GShard's scaling, compiled again; table, plot and rows in FOLDER.

GShard's 36-layer twin with 128, 512 and 2048 experts on as many TPU v3 cores; then its 128 experts on 128 to 4096 v5p
chips, the same tokens a chip; each for every dispatch mode. Points in FOLDER/scaling.jsonl are not compiled again:
remove the file after a change to the model.
Needs libtpu: pip install "jax[tpu]".
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe import platform

if __name__ == "__main__":
    platform.use_tpu_compiler()  # before JAX

import json

from absl import flags
from tqdm import tqdm

from moe import cli

_OUT = flags.DEFINE_string("out", "docs/results", "Folder of the table, the plot and their rows.")
_MODES = flags.DEFINE_list("modes", ["gather", "einsum", "dropless"], "Dispatch modes to compare.")

V3 = {128: "v3:8x8", 512: "v3:16x16", 2048: "v3:32x32"}
V5P = {128: "v5p:4x4x8", 1024: "v5p:8x8x16", 4096: "v5p:16x16x16"}

_PAGE = """# GShard's scaling, compiled again

Written by `python scripts/scaling.py` ({versions}). Memory, compile time and all-to-alls are compiled facts; times are
estimates (docs/pods.md). A compile time is wall clock of tracing, lowering and compiling on the machine at hand.

{table}

![scaling](scaling.png)

What it shows, and what it does not: docs/pods.md.
"""


def main() -> None:
    """Flags in, three files out."""
    from configs import gshard_twin
    from moe.config import from_config_dict
    from moe.pods import scaling, search

    points = []
    for mode in _MODES.value:
        for cores, topology in V3.items():
            config = from_config_dict(gshard_twin.get_config(f"{cores}e36l"))
            config = scaling.at_scale(config, experts=cores, devices=cores, rows=2, dispatch=mode)
            points.append(scaling.Point(f"GShard 36 layers, v3, {mode}", topology, config))
    twin = from_config_dict(gshard_twin.get_config("128e36l"))
    for mode in _MODES.value:
        for chips, topology in V5P.items():
            config = scaling.at_scale(twin, experts=128, devices=chips, rows=2, dispatch=mode)
            points.append(scaling.Point(f"128 experts, weak scaling, v5p, {mode}", topology, config))
    folder = Path(_OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    memory = folder / "scaling.jsonl"
    rows = [json.loads(line) for line in memory.read_text().splitlines()] if memory.exists() else []
    known = {(row["series"], row["topology"]) for row in rows}
    missing = [point for point in points if (point.series, point.topology) not in known]
    with memory.open("a") as file:
        for row in tqdm(scaling.measure(missing), total=len(missing), unit="program"):
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    order = {(point.series, point.topology): i for i, point in enumerate(points)}
    rows = sorted(
        (row for row in rows if (row["series"], row["topology"]) in order),
        key=lambda row: order[(row["series"], row["topology"])],
    )
    (folder / "scaling.md").write_text(_PAGE.format(table=scaling.table(rows), versions=", ".join(search.versions())))
    scaling.figure(folder / "scaling.png", rows)
    print(scaling.table(rows))


if __name__ == "__main__":
    cli.run(main)
