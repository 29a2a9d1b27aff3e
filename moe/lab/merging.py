"""Records of a suite that were made elsewhere: checked, then taken into a workdir, with a page of entries.

A record names its run by the hash of the settings that decide the result; what the hash does not cover, the text and
the held-out rows, is checked here. A result cannot be proven without its run, so each entry stays named on the page.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pydantic

from moe.config import ConfigError
from moe.data.corpora import EmbeddedCorpus
from moe.lab.claims.registration import Claim
from moe.lab.records import FINISHED, PRIMARY, Key, Record, read_all, read_table
from moe.lab.report.markdown import spans
from moe.lab.schedule import PlannedRuns
from moe.lab.suite import Suite
from moe.system.atomic_files import write_atomic
from moe.system.escaping import markdown_page, markdown_table, markdown_text
from moe.system.foreign_files import read_json
from moe.system.reading import read_small_file

ENTRIES = "entries.json"
PAGE = "entries.md"
#: Largest difference between a stored mean and the mean of the stored rows; records keep seven digits.
_ROUNDING = 1e-5


@dataclasses.dataclass(frozen=True)
class Entry:
    """One merged file.

    Attributes:
        suite: name of the suite.
        digest: SHA-256 of the file.
        runs: arm → seeds of the runs that were new.
        repeated: number of runs that had a record already; those records were kept.
        largest_difference: largest difference in loss between a repeated run and the record kept, in nats.
        commits: of the code that made the records.
        hardware: devices on which they were made.
        post_hoc: numbers of the suite's claims that read otherwise when these runs started.
    """

    suite: str
    digest: str
    runs: Mapping[str, tuple[int, ...]]
    repeated: int
    largest_difference: float
    commits: tuple[str, ...]
    hardware: tuple[str, ...]
    post_hoc: tuple[int, ...]


_ENTRIES: pydantic.TypeAdapter[list[Entry]] = pydantic.TypeAdapter(list[Entry])


def merge(workdir: Path, path: Path, suite: Suite, claims: Sequence[Claim]) -> Entry:
    """Take a table of records into a workdir, all or none.

    Args:
        workdir: folder of records.
        path: table in the form of records.parquet.
        suite: whose runs they must be, on its registered seeds or those of its sweep.
        claims: all that are registered.

    Raises:
        ConfigError: the file is no such table, or a record is not of a run of the suite, of another text, or does not
            have the suite's held-out rows.
    """
    records = read_table(path)
    if not records:
        raise ConfigError(f"--merge={path}: has no record")
    known = {record.run: record for record in read_all(workdir)}
    names = _runs(suite, [*known.values(), *records])
    own = [claim for claim in claims if claim.suite == suite.name]
    for record in records:
        _check(path, suite, names, record)
    new = [record for record in records if record.run not in known]
    repeated = [record for record in records if record.run in known]
    seeds: dict[str, list[int]] = {}
    for record in new:
        key = names[record.run]
        dataclasses.replace(record, variant=key.variant, seed=key.seed).write(workdir)
        seeds.setdefault(key.variant, []).append(key.seed)
    entry = Entry(
        suite.name,
        hashlib.sha256(read_small_file(path)).hexdigest(),
        {arm: tuple(sorted(found)) for arm, found in seeds.items()},
        len(repeated),
        max((abs(r.primary_loss - known[r.run].primary_loss) for r in repeated), default=0.0),
        tuple(sorted({record.commit for record in records})),
        tuple(sorted({record.hardware for record in records})),
        tuple(c.number for c in own if any(r.claims.get(str(c.number)) != c.hash for r in records)),
    )
    _keep(workdir, entry)
    return entry


def _runs(suite: Suite, records: Sequence[Record]) -> dict[str, Key]:
    """Hash → run, of every arm, horizon, registered seed and rate that the suite may train."""
    plan, found = PlannedRuns(suite, records), {}
    rates = suite.sweep.learning_rates if suite.sweep else (suite.learning_rate,)
    swept = suite.sweep.seeds if suite.sweep else ()
    for arm in suite.variants:
        for steps in suite.steps:
            for seed in (*suite.registered_seeds, *swept):
                for rate in rates:
                    key = Key(arm, steps, rate, seed)
                    found[plan.run(key)] = key
    return found


def _check(path: Path, suite: Suite, names: Mapping[str, Key], record: Record) -> None:
    """Refuse a record that is not a run of the suite on the suite's text and rows. Raises ConfigError."""
    where = f"--merge={path}: the run {record.variant}, {record.steps:,} steps, seed {record.seed}"
    if record.run not in names:
        raise ConfigError(f"{where} is none of suite {suite.name!r}: an arm, seed, rate, text or evaluation differs")
    config = suite.config(names[record.run].variant)
    if config.data.dataset == "embedded":
        domains = (*config.data.domains, *suite.unseen)
        version = str(EmbeddedCorpus.VERSION)
        if other := {name: record.data.get(name) for name in domains if record.data.get(name) != version}:
            raise ConfigError(f"{where} read the text {other}; this version reads {version}")
    if record.status != FINISHED:
        return
    if not math.isfinite(record.primary_loss):
        raise ConfigError(f"{where} is finished with a loss that is not finite")
    counts = Counter(record.row_domains)
    if any(count > suite.heldout_rows for count in counts.values()) or set(suite.primary_domains) - counts.keys():
        raise ConfigError(
            f"{where} has held-out rows {dict(counts)}; must have at most {suite.heldout_rows} of each of "
            f"{', '.join(suite.primary_domains)}"
        )
    losses, domains = np.asarray(record.row_losses), np.asarray(record.row_domains)
    by_domain = {name: float(losses[domains == name].mean()) for name in counts}
    stored = {d: v for step, quantity, d, _, v in record.rows if (step, quantity) == (record.steps, "loss")}
    means = by_domain | {PRIMARY: float(np.mean([by_domain[name] for name in suite.primary_domains or counts]))}
    for name, mean in means.items():
        if not abs(stored.get(name, math.nan) - mean) <= _ROUNDING * max(1.0, abs(mean)):
            raise ConfigError(
                f"{where} has a loss of {stored.get(name)} on {name!r}, and its held-out rows have a mean of {mean:.6f}"
            )


def _keep(workdir: Path, entry: Entry) -> None:
    """Add an entry to the list, and write the page."""
    path = workdir / ENTRIES
    entries = [e for e in (read_json(path, _ENTRIES) if path.exists() else []) if e.digest != entry.digest]
    entries.append(entry)
    write_atomic(path, _ENTRIES.dump_json(entries, indent=2) + b"\n")
    rows = [
        (
            e.suite,
            "; ".join(f"{arm}: {spans(found)}" for arm, found in e.runs.items()) or "–",
            f"{e.repeated}, at most {e.largest_difference:.4f} apart" if e.repeated else "–",
            ", ".join(map(str, e.post_hoc)) or "–",
            markdown_text(", ".join(e.hardware)),
            ", ".join(f"`{commit[:12]}`" for commit in e.commits),
            f"`{e.digest[:16]}`",
        )
        for e in entries
    ]
    header = (
        "suite",
        "new runs: seeds",
        "repeated runs",
        "claims post hoc",
        "hardware",
        "commit",
        "SHA-256 of the file",
    )
    text = (
        "# Entries\n\nRecords that were made elsewhere. Each was checked against its suite: the hash of its settings, "
        "the version of its text, and its held-out rows, whose mean is its loss. Of a run that had a record already, "
        f"that one was kept.\n\n{markdown_table(header, rows)}\n"
    )
    write_atomic(workdir / PAGE, markdown_page(text))
