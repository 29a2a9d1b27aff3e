"""One JSON file per finished run: everything that tables, statistics and the report need.

A folder of records is the state of a suite: a run with a record is not trained again, so copying ``records/`` to
another machine resumes the suite there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from moe.atomic_files import write_atomic
from moe.config import ConfigError

RECORDS = "records"
#: Domain under which the mean loss over a suite's primary domains is stored.
PRIMARY = "primary"
FINISHED, DIVERGED = "finished", "diverged"


class Key(NamedTuple):
    """Identity of a run within its suite."""

    variant: str
    steps: int
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """File name of the record, without its ending."""
        return f"{self.variant}.steps_{self.steps}.lr_{self.learning_rate:g}.seed_{self.seed}"

    @property
    def path(self) -> Path:
        """Workdir of the run below ``runs/``."""
        return Path(self.variant) / f"steps_{self.steps}" / f"lr_{self.learning_rate:g}" / f"seed_{self.seed}"

    def __str__(self) -> str:
        return f"{self.variant}, {self.steps} steps, learning rate {self.learning_rate:g}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
        variant: arm.
        steps: horizon.
        learning_rate: peak, before the arm's ``rate_scale``.
        seed: of the suite's.
        status: ``finished`` or ``diverged`` (an outcome; its losses may be missing or not finite).
        reason: why it counts as diverged.
        commit: of the code, with "+changes" if the checkout had uncommitted changes.
        claims: claim → hash of its text when the run started (:mod:`moe.lab.claims.registration`).
        data: domain → version of its text.
        hardware: devices and the CPU cores that the process was pinned to.
        seconds: wall-clock time of the run, evaluation included.
        costs: quantity → value (:meth:`moe.lab.suite.Suite.costs`).
        rows: [step, quantity, domain, layer, value] of everything logged.
        row_domains: domain of each stored held-out row.
        row_losses: nats per target of each stored held-out row at the last step.
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
    probes: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> Key:
        """Identity of the run within its suite."""
        return Key(self.variant, self.steps, self.learning_rate, self.seed)

    @property
    def primary_loss(self) -> float:
        """Mean loss over the primary domains at the last step; infinite if the run diverged."""
        if self.status == DIVERGED:
            return math.inf
        wanted = (self.steps, "loss", PRIMARY)
        return next(value for step, quantity, domain, _, value in self.rows if (step, quantity, domain) == wanted)

    def write(self, directory: Path) -> None:
        """Write ``records/NAME.json`` below the suite's folder, atomically."""
        (directory / RECORDS).mkdir(parents=True, exist_ok=True)
        text = json.dumps(_rounded(dataclasses.asdict(self)), separators=(",", ":"))
        # One line per logged value, so that a diff is readable.
        write_atomic(directory / RECORDS / f"{self.key.name}.json", text.replace("],[", "],\n[").encode() + b"\n")


def read_all(directory: Path) -> list[Record]:
    """All records of a suite's folder, in the order of their names.

    Raises:
        ConfigError: a file is no record.
    """
    found = []
    for path in sorted((directory / RECORDS).glob("*.json")):
        try:
            found.append(Record(**json.loads(path.read_text())))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{path}: not a record of this version of the lab; delete it to repeat the run"
            ) from error
    return found


def commit() -> str:
    """The commit of this checkout, with "+changes" if tracked files differ from it; "unknown" outside of one."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+changes" if git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _rounded(value: Any) -> Any:
    """Seven significant digits, as much as float32 holds."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
