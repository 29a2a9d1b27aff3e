"""Train what a suite is missing, then report: moe ablate --suite=NAME --workdir=DIR.

One record per finished run is written to DIR/records/, the report (report.md, records.parquet, results.csv, PNGs) to
DIR/NAME/. Suites that share DIR share equal runs. --jobs=2 starts two processes, each pinned to a core; more machines
that share DIR may run the same command at the same time. --report trains nothing and writes the report again; without
--workdir, from the records that are installed with the package, into this folder. `moe configs` lists suites. --time=20
times steps of every arm into DIR/NAME/step_seconds.json. --claims --workdir=DIR writes the pages over all suites:
claims.md, paper_tables.md, sizes.md and switch_or_mixtral.md. --output=DIR2 writes reports and pages there. Progress is
in DIR/progress.log; TensorBoard on DIR/runs compares them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from moe.programs import cli
from moe.system import shipped
from moe.system.checkout import commit
from moe.system.fields import ConfigError, whole_number

if TYPE_CHECKING:
    from moe.lab.claims.registration import Registered
    from moe.lab.suite import Suite
    from moe.lab.table import Table

_SUITE = flags.DEFINE_string("suite", None, "Name of a suite, or file with get_suite(size); or FILE.py:ARGUMENT.")
_WORKDIR = cli.define_path(
    "workdir", "Folder of the suite's runs, records and report. Needed but for --report, --missing and --claims."
)
_OUTPUT = flags.DEFINE_string("output", "", "Folder for the report and the pages; default: the workdir.")
_SIZE = flags.DEFINE_string("size", "laptop", "laptop (two CPU cores) or pod.")
_SEEDS = flags.DEFINE_list("seeds", [], "Seeds to train instead of the suite's.")
_ARMS = flags.DEFINE_list("arms", [], "Train only these arms; the report covers all. Default: every arm.")
_GATE = flags.DEFINE_string(
    "gate", "", "A gate of your own, as module:object: one more arm, trained and paired with the arm it is compared to."
)
_HORIZONS = flags.DEFINE_list("horizons", [], "Train only runs of these numbers of steps. Default: every horizon.")
_JOBS = flags.DEFINE_integer("jobs", 0, "Processes, each pinned to one core; 0: this one, on all cores.", lower_bound=0)
_SWEEP = flags.DEFINE_bool("sweep", True, "Sweep learning rates first, if the suite says so.")
_REPORT = flags.DEFINE_bool("report", False, "Train and measure nothing; only write the report.")
_MISSING = flags.DEFINE_bool("missing", False, "Train nothing; list the runs that are missing, and their hours.")
_TIME = flags.DEFINE_integer(
    "time",
    0,
    "Train nothing; time this many steps of every arm, in turns, for the page's costs.",
    lower_bound=0,
)
_MERGE = flags.DEFINE_string("merge", "", "Train nothing; check a records.parquet from elsewhere and take its runs.")
_CLAIMS = flags.DEFINE_bool("claims", False, "Only write the pages over all suites from the records.")


def main() -> None:
    """Train, measure and report as the flags say."""
    from moe.lab import merging
    from moe.lab.claims.registration import CLAIMS_FILE, read_claims
    from moe.lab.loading import load_suite, load_suites, with_gate, with_seeds
    from moe.lab.records import read_all
    from moe.lab.report import page
    from moe.lab.report.missing import missing
    from moe.lab.running import jobs, runner
    from moe.training import progress

    workdir = Path(_WORKDIR.value) if _WORKDIR.value else shipped.RESULTS
    output = Path(_OUTPUT.value or _WORKDIR.value or ".")
    if _CLAIMS.value:
        _write_pages(workdir, output)
        return
    if not (_WORKDIR.value or _REPORT.value or _MISSING.value):
        raise ConfigError(
            "--workdir is needed, the folder of the runs; only --report, --missing and --claims go without"
        )
    suite = load_suite(_suite_file(), _SIZE.value)
    if _SEEDS.value:
        suite = with_seeds(suite, [_seed(seed) for seed in _SEEDS.value])
    arms: Sequence[str] = _ARMS.value
    if _GATE.value:
        suite, pair = with_gate(suite, _GATE.value)
        arms = arms or pair
    suites = _suites()
    registered = read_claims(suites / CLAIMS_FILE)
    runner.check_start(suite, registered.claims)
    reported = load_suites(suites, _names(registered), _SIZE.value, suite) | {suite.name: suite}
    if _TIME.value:
        _time(suite, output / suite.name)
        return
    if _MERGE.value:
        entry = merging.merge(workdir, Path(_MERGE.value), suite, registered.claims)
        print(f"{sum(map(len, entry.runs.values()))} new runs, {entry.repeated} repeated; {workdir / merging.PAGE}")
        return
    only = runner.only(suite, arms, _HORIZONS.value)
    if _MISSING.value:
        print(missing(suite, read_all(workdir), only, sweep=_SWEEP.value))
        return
    if not _REPORT.value:
        for name, (given, value) in suite.replaced().items() if not jobs.is_worker() else ():
            progress.say(f"{name}={value} as the suite sets it, instead of the base config's {given}")
        if _JOBS.value:
            jobs.start(_JOBS.value, cli.without_flags(sys.orig_argv, "jobs")[1:])
        else:
            worker = runner.Worker(suite, workdir, registered.claims, sweep=_SWEEP.value, only=only)
            worker.run()
            worker.measure()
    if jobs.is_worker():
        return
    tables = _tables(reported, workdir)
    if not tables[suite.name].records:
        raise ConfigError(f"--workdir={workdir}: no run of the suite is finished")
    page.write(output / suite.name, tables, suite, registered, _command())
    print(f"{output / suite.name / 'report.md'}")


def _time(suite: Suite, folder: Path) -> None:
    """Time steps of the arms and write the seconds into the folder."""
    from moe.lab import step_seconds
    from moe.lab.benchmarks import train_steps
    from moe.lab.running import runner

    arms = _ARMS.value or list(suite.variants)
    runner.only(suite, arms, ())
    if taught := [arm for arm in arms if suite.variants[arm].teacher]:
        raise ConfigError(
            f"--time: a step of {', '.join(taught)} has a teacher's forward pass, which is not timed; name other "
            "arms with --arms"
        )
    seconds = train_steps.processor_seconds({arm: suite.config(arm) for arm in arms}, _TIME.value)
    measured = step_seconds.StepSeconds(seconds, _TIME.value, runner.hardware(), commit())
    measured.write(folder)
    print(f"{folder / step_seconds.FILE}")


def _suite_file() -> str:
    """Path of the suite that --suite names, with its argument."""
    return shipped.find(_SUITE.value or "", shipped.SUITES)


def _suites() -> Path:
    """The folder of suites and claims: that of --suite, which may be the folder itself."""
    given = Path(_suite_file().partition(".py:")[0] or shipped.SUITES)
    return given if given.is_dir() else given.parent


def _command() -> str:
    """The command that the report names, without the name of the folder and what does not change the numbers."""
    flags_given = {"size": _SIZE.value, "gate": _GATE.value, "seeds": ",".join(_SEEDS.value), "sweep": _SWEEP.value}
    defaults = {"size": "laptop", "gate": "", "seeds": "", "sweep": True}
    others = [
        f" --{name}={value}" if name != "sweep" else " --nosweep"
        for name, value in flags_given.items()
        if value != defaults[name]
    ]
    return f"moe ablate --suite={_SUITE.value} --workdir=DIR{''.join(others)}"


def _names(registered: Registered) -> list[str]:
    """Suites that claims are about: Holm's method needs whole families."""
    return sorted({claim.suite for claim in registered.claims})


def _tables(suites: Mapping[str, Suite], workdir: Path) -> dict[str, Table]:
    from moe.lab.records import read_all
    from moe.lab.table import Table

    records = read_all(workdir)
    return {name: Table(suite, records) for name, suite in suites.items()}


def _write_pages(workdir: Path, output: Path) -> None:
    """Write the pages over all suites."""
    from moe.lab import step_seconds
    from moe.lab.claims.registration import CLAIMS_FILE, read_claims
    from moe.lab.loading import load_suite, load_suites
    from moe.lab.report import answer, claims_page, paper_tables, sizes

    suites = _suites()
    registered = read_claims(suites / CLAIMS_FILE)
    given = load_suite(_suite_file(), _SIZE.value) if ".py" in _suite_file() else None
    names = [*_names(registered), *(name for name in [sizes.PREDICTED] if (suites / f"{name}.py").exists())]
    tables = _tables(load_suites(suites, names, _SIZE.value, given), workdir)
    found = [name for name, table in tables.items() if table.records]
    if not found:
        raise ConfigError(f"--workdir={workdir}: no run of a suite that {suites / CLAIMS_FILE} names is finished")
    output.mkdir(parents=True, exist_ok=True)
    claims_page.write_page(output, registered, tables)
    papers = paper_tables.read_tables(suites / paper_tables.TABLES_FILE)
    paper_tables.write_page(output / "paper_tables.md", papers, tables)
    sizes.write_page(output, tables)
    if answer.is_asked(registered):
        name = answer.SUITE
        seconds = step_seconds.read(output / name) or step_seconds.read(workdir / name)
        answer.write_page(output, tables[name], registered, seconds, [*tables.values()])
    print(f"{output / 'claims.md'}: from {', '.join(found)}")


def _seed(text: str) -> int:
    seed = whole_number(text)
    if seed is None:
        raise ConfigError(f"--seeds={text}: must be whole numbers, as in 0,1,2")
    return seed


def run() -> None:
    """The program."""
    cli.run(
        main,
        required=() if "--claims" in sys.argv else ("suite",),
        examples=(
            "moe ablate --suite=switch_vs_mixtral --report",
            "moe ablate --suite=capacity_factor --workdir=/tmp/capacity --jobs=2",
        ),
    )
