"""python scripts/league.py --folder=DIR [--only=CONFIG]: compile MaxText's train steps beside this project's plans.

For each model of moe/planner/league.py, MaxText's own compile-only program compiles its train step in an environment of
its own, with the libtpu that is installed here, for the slice and the rows of the kept plan. DIR holds the environment
and the compiled programs: those that are there are not compiled again. The program is read and priced as a plan is. The
counts are written to docs/results/league.json, the table to docs/results/league.md.

Without --folder nothing is compiled: the table is written anew, by today's prices. Compiling needs uv, and libtpu:
pip install "moe-jax[tpu,judge]".
"""

from moe.system import process

if __name__ == "__main__":
    process.use_tpu_compiler()  # before JAX

import dataclasses
import gzip
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from absl import flags

from moe.programs import cli

_FOLDER = cli.define_path("folder", "Folder of the environment and of compiled programs; empty: nothing is compiled.")
_ONLY = flags.DEFINE_string("only", "", "Name of the config to compile; empty: all whose program is missing.")

_RESULTS = Path(__file__).parents[1] / "docs" / "results"


def main() -> None:
    """Compile what is missing; the page is written again after every program."""
    from moe.config import ConfigError
    from moe.planner import kept_plans, league, topology
    from moe.system import shipped

    plans = kept_plans.read(shipped.PLANS)
    configs = [entry.config for entry in league.ENTRIES]
    if _ONLY.value and _ONLY.value not in configs:
        raise ConfigError(f"--only={_ONLY.value}: must be one of {', '.join(configs)}")
    write(plans, {})
    if not _FOLDER.value:
        return
    for entry in league.ENTRIES:
        if _ONLY.value in ("", entry.config):
            plan = league.plan_of(entry, plans)
            record = compiled(Path(_FOLDER.value), league.settings(entry, plan))
            row = league.row(entry, plan, topology.get_topology(entry.topology), record)
            write(plans, {entry.name: row})
            print(f"{entry.name}: {league.priced(row)[0]:.3g} s, here {plan['step_seconds']:.3g} s", flush=True)


def compiled(folder: Path, settings: list[str]) -> dict[str, Any]:
    """The record of MaxText's program with these settings, compiled where it is missing."""
    from moe.conformance.peers import environments

    path = folder / ("_".join(each.partition("=")[2] for each in settings) + ".json.gz")
    if not path.exists():
        found = environments.read(folder)["maxtext"]
        libtpu = f"libtpu=={importlib.metadata.version('libtpu')}"
        own = dataclasses.replace(found, folder=folder / "maxtext", packages=(*found.packages, libtpu))
        own.make()
        worker = Path(environments.__file__).with_name("workers") / "maxtext_step.py"
        own.run(worker, str(path), *settings)
    return json.loads(gzip.decompress(path.read_bytes()))


def write(plans: list[dict[str, Any]], new: dict[str, Any]) -> None:
    """Add rows to the file, and write the page from it."""
    from moe.planner import league
    from moe.system.atomic_files import write_atomic

    path = _RESULTS / "league.json"
    known = {row["name"]: row for row in league.read(path)} | new
    rows = [known[entry.name] for entry in league.ENTRIES if entry.name in known]
    write_atomic(path, json.dumps(rows, indent=1) + "\n")
    write_atomic(path.with_suffix(".md"), league.page(rows, plans))


if __name__ == "__main__":
    cli.run(main, examples=("python scripts/league.py", "python scripts/league.py --folder=/tmp/league"))
