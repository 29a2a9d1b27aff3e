"""Claims that are registered before the runs: text, rule, margin and published effect, read from a TOML file.

A run's record stores the hash of each claim of its suite as it stood when the run started. A claim whose hash differs
from that of the runs it is tested on was edited afterwards, and is reported as post hoc.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args

from moe.config import ConfigError

#: below, above: of zero. not_above: below the margin. within: between the margin's two sides. less_variance: the first
#: term varies less over seeds than the second (Pitman-Morgan). shown: reported, decides nothing.
Rule = Literal["below", "above", "not_above", "within", "less_variance", "shown"]
CLAIMS_FILE = "claims.toml"


@dataclasses.dataclass(frozen=True)
class Part:
    """One inequality of a claim.

    Attributes:
        what: the quantity, in words.
        rule: how it is decided.
        value: linear combination of results, as in "loss[switch] - loss[dense]" (:mod:`moe.lab.expressions`).
        margin: equivalence margin in the unit of ``value``, for the rules not_above and within.
        published: the paper's effect in the same unit and sign; None if it has none that compares.
    """

    what: str
    rule: Rule
    value: str
    margin: float = 0.0
    published: float | None = None


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of a paper, and what must hold in a suite's results for it to be supported.

    Attributes:
        number: position in the list of claims.
        suite: name of the suite whose results decide it.
        text: the claim.
        source: paper, and the published figures as printed there.
        min_steps: horizon from which the claim applies; shorter results are below the crossing.
        requires: value that must be below zero, interval included, for the claim to apply at all; empty: none.
    """

    number: int
    suite: str
    text: str
    source: str
    parts: tuple[Part, ...]
    min_steps: int = 0
    requires: str = ""

    @property
    def hash(self) -> str:
        """Hash of everything above."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_claims(path: Path) -> tuple[list[Claim], str]:
    """(claims, SHA-256 of the file); ([], "") if there is no such file.

    Raises:
        ConfigError: the file is not a list of claims.
    """
    if not path.exists():
        return [], ""
    content = path.read_bytes()
    try:
        entries = tomllib.loads(content.decode())["claim"]
        claims = [_claim(entry) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a list of claims ({error})") from error
    return claims, hashlib.sha256(content).hexdigest()


def _claim(entry: dict[str, Any]) -> Claim:
    parts = tuple(Part(**part) for part in entry.pop("part"))
    for part in parts:
        if part.rule not in get_args(Rule):
            raise ValueError(f"rule={part.rule!r}: must be one of {', '.join(get_args(Rule))}")
    return Claim(**entry, parts=parts)
