"""python scripts/ablate.py --suite=configs/ablations/NAME.py --workdir=DIR: runs what a suite is missing, then reports.

The report (report.md, results.csv, timing.csv, PNGs) is in DIR. A job array runs `--shard=i/n` and then once without,
which finds everything done. `--report --workdir=DIR` only writes the report again, from DIR/results.csv alone.
`--claims --workdir=DIR` reads DIR/*/results.csv and writes the table of all claims to DIR/claims.md.
TensorBoard on DIR/runs compares the variants (scalars and HParams).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe import platform

if __name__ == "__main__":
    platform.prepare()  # before JAX is imported; may restart this program

from absl import flags

from moe import cli
from moe.config import ConfigError

_SUITE = flags.DEFINE_string("suite", "", "File with get_suite(size), in configs/ablations/.")
_WORKDIR = cli.define_path("workdir", "Folder of the suite's runs and report.")
_SIZE = flags.DEFINE_string("size", "laptop", "laptop (two CPU cores) or pod.")
_SEEDS = flags.DEFINE_list("seeds", [], "Instead of the suite's.")
_SHARD = flags.DEFINE_string("shard", "", "i/n: only the i-th of n parts of the runs, counted from 0; no report.")
_REPORT = flags.DEFINE_bool("report", False, "Run nothing; write the report from results.csv.")
_CLAIMS = flags.DEFINE_bool("claims", False, "Run nothing; write claims.md from all suites in the workdir.")


def main() -> None:
    """Flags in, runs and a report out."""
    from moe.lab import report, results, runner
    from moe.lab.suite import load_suite

    workdir = Path(str(_WORKDIR.value))
    if _CLAIMS.value:
        found = {path.parent.name: results.Results.read(path.parent) for path in sorted(workdir.glob("*/results.csv"))}
        if not found:
            raise ConfigError(f"--claims: no results.csv in the folders of {workdir}; each is of a suite of that name")
        report.claims_page(workdir, found)
        print(f"{workdir / 'claims.md'}: from {', '.join(found)}")
        return
    if not _SUITE.value:
        raise ConfigError("--suite: must be given; suites are in configs/ablations/")
    suite = load_suite(_SUITE.value, _SIZE.value)
    command = f"python scripts/ablate.py --suite={_SUITE.value} --workdir=DIR"
    if _SIZE.value != "laptop":
        command += f" --size={_SIZE.value}"
    if _SEEDS.value:
        command += f" --seeds={','.join(_SEEDS.value)}"
    if not _REPORT.value:
        part = _shard(_SHARD.value)
        runs = runner.plan(suite, workdir, [_seed(seed) for seed in _SEEDS.value] or None)
        runner.run_missing(suite, runs if part is None else runner.shard(suite, runs, *part))
        if part is not None:
            print(f"{sum(run.done for run in runs)} of {len(runs)} runs of {suite.name} are done")
            return
        results.write(workdir, *results.collect(suite, runs))
    elif not (workdir / results.RESULTS).exists():
        raise ConfigError(f"--report: {workdir} holds no {results.RESULTS}; run the suite first, without --report")
    report.write(workdir, suite, results.Results.read(workdir), command)
    print(f"{workdir / 'report.md'}")


def _seed(text: str) -> int:
    if not text.isdigit():
        raise ConfigError(f"--seeds={text}: must be whole numbers, as in 0,1,2")
    return int(text)


def _shard(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and 0 <= int(index) < int(count)):
        raise ConfigError(f"--shard={text}: must be i/n with 0 <= i < n, as in 0/4")
    return int(index), int(count)


if __name__ == "__main__":
    cli.run(main, required=("workdir",))
