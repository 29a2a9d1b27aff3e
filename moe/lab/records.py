"""A record of each finished run: everything that tables, statistics and the report need.

Runs write JSON files; finished results are kept in one compressed table.
A folder of records is the state of any number of suites: a run with a record is not trained again, so copying
``records/`` to another machine resumes them there. A record is found by the hash of its run's canonical form
(:mod:`moe.lab.identity`), never by its name: an arm that was edited is trained anew, and suites share equal runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pydantic

from moe.config import ConfigError
from moe.lab import identity
from moe.system.atomic_files import sole_writer, write_atomic
from moe.system.foreign_files import first_sentence
from moe.system.reading import read_small_file

RECORDS = "records"
#: Field of a written record with the checksum of the others.
CHECKSUM = "crc32"
#: File name of a table of records.
TABLE = "records.parquet"
#: Domain under which the mean loss over a suite's primary domains is stored.
PRIMARY = "primary"
#: How "loss" was measured.
DROPLESS, OWN = "dropless", "own capacity"
FINISHED, DIVERGED = "finished", "diverged"


class Key(NamedTuple):
    """A run as its suite names it."""

    variant: str
    steps: int
    learning_rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.variant}, {self.steps} steps, learning rate {self.learning_rate!r}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
        variant: arm, in the suite that trained it.
        steps: horizon.
        learning_rate: peak, before the arm's ``rate_scale``.
        seed: one of the suite's seeds.
        status: ``finished`` or ``diverged`` (an outcome; its losses may be missing or not finite).
        reason: why it counts as diverged.
        commit: of the code, with "+changes" if the checkout had uncommitted changes.
        claims: claim → hash of its text when the run started (:mod:`moe.lab.claims.registration`).
        data: domain → version of its text.
        hardware: devices and the CPU cores that the process was pinned to.
        seconds: wall-clock time since the run's last start, evaluation included.
        costs: quantity → value (:meth:`moe.lab.suite.Suite.costs`).
        rows: [step, quantity, domain, layer, value] of everything logged. "loss" is measured without drops,
            "own_loss" at the arm's own evaluation capacity.
        row_domains: domain of each stored held-out row.
        row_losses: nats per target of each stored held-out row at the last step, without drops.
        run: hash of ``form``.
        form: canonical form of the run's settings.
        evaluated: how "loss" was measured: "dropless", or "own capacity" for a gate that has no dropless form.
        last_losses: training loss of each batch of the last tenth of the steps, under the capacity of training.
        probes: quantity, or quantity@layer → value.
    """

    variant: str
    steps: int
    learning_rate: float
    seed: int
    status: str
    reason: str
    commit: str
    claims: dict[str, str]
    data: dict[str, str]
    hardware: str
    seconds: float
    costs: dict[str, float]
    rows: list[tuple[int, str, str, str, float]]
    row_domains: list[str]
    row_losses: list[float]
    run: str
    form: dict[str, Any]
    evaluated: str
    last_losses: list[float]
    probes: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> Key:
        """The run as the suite that trained it names it."""
        return Key(self.variant, self.steps, self.learning_rate, self.seed)

    @property
    def primary_loss(self) -> float:
        """Mean loss over the primary domains at the last step; infinite if the run diverged."""
        if self.status == DIVERGED:
            return math.inf
        return self.losses()[0]

    def losses(self) -> list[float]:
        """The mean loss over the primary domains at the last step; empty if it was not measured."""
        wanted = (self.steps, "loss", PRIMARY)
        return [value for step, quantity, domain, _, value in self.rows if (step, quantity, domain) == wanted]

    @property
    def name(self) -> str:
        """File name of the record without its ending, and of the run's workdir."""
        return run_name(self.key, self.run)

    def write(self, directory: Path) -> None:
        """Write ``records/NAME.json``, atomically."""
        (directory / RECORDS).mkdir(parents=True, exist_ok=True)
        entry = dataclasses.asdict(self) | _rounded(self)
        text = json.dumps(entry | {CHECKSUM: _checksum(entry)}, separators=(",", ":"))
        # One line per logged value, so that a diff is readable.
        write_atomic(directory / RECORDS / f"{self.name}.json", text.replace("],[", "],\n[").encode() + b"\n")


def run_name(key: Key, run: str) -> str:
    """Name of a run's files: readable, and unique by its hash."""
    return f"{key.variant}.steps_{key.steps}.seed_{key.seed}.{run}"


_SCHEMA = pydantic.TypeAdapter(Record)
#: Columns of a table of records that hold JSON, and those that hold the fields of ``rows``.
_JSON = ("claims", "data", "costs", "form", "probes")
_ROWS = ("row_step", "row_quantity", "row_domain", "row_layer", "row_value")


def read_all(directory: Path) -> list[Record]:
    """All records of a folder, sorted by name: its ``records/*.json``, and the tables in it and its direct subfolders.

    A run may be stored under the names of several arms, each with the probes of its suite: its record gets all probes.

    Raises:
        ConfigError: a file is not a record or a table of records.
    """
    found: dict[str, Record] = {}
    for path in (*sorted(directory.glob(TABLE)), *sorted(directory.glob(f"*/{TABLE}"))):
        for record in read_table(path):
            _add(found, record)
    for path in sorted((directory / RECORDS).glob("*.json")):
        try:
            record = _checked(json.loads(read_small_file(path)))
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{path}: not a record of this version of the lab ({first_sentence(error)}); delete it"
            ) from error
        _add(found, record)
    return sorted(found.values(), key=lambda record: record.name)


def _add(found: dict[str, Record], record: Record) -> None:
    """Replace an earlier record of the same run, keeping its probes."""
    if before := found.get(record.run):
        record = dataclasses.replace(record, probes=before.probes | record.probes)
    found[record.run] = record


def _checksum(entry: dict[str, Any]) -> int:
    """Checksum of a record's values, however a file writes them."""
    values = dataclasses.asdict(_SCHEMA.validate_python(entry))
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _checked(entry: Any) -> Record:
    """The record; earlier versions wrote them without a checksum."""
    record = _SCHEMA.validate_python(entry)
    if record.run != identity.digest(record.form):
        raise ValueError("its form was edited")
    if (saved := entry.get(CHECKSUM)) is not None and saved != _checksum(entry):
        raise ValueError("its checksum does not match")
    if len(record.row_domains) != len(record.row_losses):
        raise ValueError("row_domains and row_losses differ in length")
    if record.status == FINISHED and not record.losses():
        raise ValueError("it has no loss at its last step")
    return record


def write_table(path: Path, records: Iterable[Record]) -> None:
    """Write records as one compressed Parquet table, one row per run, atomically.

    Raises:
        ConfigError: pyarrow is not installed.
    """
    entries = []
    for record in records:
        entry = dataclasses.asdict(record) | _rounded(record)
        entry[CHECKSUM] = _checksum(entry)
        columns = list(zip(*entry.pop("rows"), strict=True)) or [()] * len(_ROWS)
        entry |= {name: list(column) for name, column in zip(_ROWS, columns, strict=True)}
        entries.append(entry | {name: json.dumps(entry[name], sort_keys=True) for name in _JSON})
    content = io.BytesIO()
    with _parquet(path):
        pd.DataFrame(entries).to_parquet(content, index=False, compression="zstd", compression_level=19)
    write_atomic(path, content.getvalue())


def update_table(path: Path, records: Sequence[Record]) -> None:
    """Write records into a table, keeping its other runs and the probes that the records lack: for runs without JSON
    files the table is the only copy.

    Raises:
        ConfigError: see :func:`write_table` and :func:`read_table`.
    """
    with sole_writer(path):
        before = read_table(path) if path.exists() else []
        known = {record.run: record.probes for record in before}  # a run with two names has a record under each
        own = [dataclasses.replace(record, probes=known.get(record.run, {}) | record.probes) for record in records]
        runs = {record.run for record in own}
        others = [record for record in before if record.run not in runs]
        write_table(path, [*own, *others])


def read_table(path: Path) -> list[Record]:
    """Records of a table that :func:`write_table` wrote.

    Raises:
        ConfigError: pyarrow is not installed, or the file is not such a table.
    """
    with _parquet(path):
        content = read_small_file(path)
        try:
            entries = pd.read_parquet(io.BytesIO(content)).to_dict("records")
            return [_from_columns(entry) for entry in entries]
        except ImportError:
            raise
        except Exception as error:  # pyarrow's errors, and any that a foreign table causes
            raise ConfigError(
                f"{path}: not a table of records of this version of the lab ({first_sentence(error)})"
            ) from error


def _from_columns(entry: dict[Any, Any]) -> Record:
    rows = list(zip(*(entry.pop(name).tolist() for name in _ROWS), strict=True))
    lists = {name: entry[name].tolist() for name in ("row_domains", "row_losses", "last_losses")}
    return _checked({**entry, **{name: json.loads(entry[name]) for name in _JSON}, **lists, "rows": rows})


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"{path}: tables of records need pyarrow; install it with pip install pyarrow") from error


def _rounded(record: Record) -> dict[str, Any]:
    """Measured values, rounded to seven significant digits, the precision of float32."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.7g}")
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        return [rounded(item) for item in value] if isinstance(value, list | tuple) else value

    names = ("seconds", "costs", "rows", "row_losses", "last_losses", "probes")
    return {name: rounded(getattr(record, name)) for name in names}


def refuse_other_text(versions: Mapping[str, str], records: Iterable[Record]) -> None:
    """Refuse a folder of text that has changed since these records: their runs would be compared with later ones.

    Where the version of a text is part of the run's identity, another version is another run and nothing is refused.

    Raises:
        ConfigError: a domain has another version than in a record.
    """
    for record in records:
        for domain, version in versions.items():
            before = record.data.get(domain, version)
            if before != version and domain not in record.form.get("text", {}):
                raise ConfigError(
                    f"the text of {domain!r} has changed since the run {record.variant}, {record.steps:,} steps, seed "
                    f"{record.seed} (version {before}, now {version}); use another --workdir, or put the text back"
                )
