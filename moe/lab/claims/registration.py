"""Claims that are registered before the runs: text, rule, margin and published effect, read from a TOML file.

A run's record stores the hash of each claim of its suite as it stood when the run started. A claim whose hash differs
from that of the runs it is tested on was edited afterwards, and is reported as post hoc.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pydantic
import pydantic.dataclasses

from moe.config import ConfigError
from moe.lab.expressions import parse
from moe.system.atomic_files import write_atomic
from moe.system.foreign_files import Amount, Step, first_sentence, read_json
from moe.system.reading import read_small_file

#: below, above: relative to zero. not_above: below the margin. within: between -margin and margin. less_variance: the
#: first term varies less over seeds than the second (Pitman-Morgan). shown: reported, decides nothing.
Rule = Literal["below", "above", "not_above", "within", "less_variance", "shown"]
CLAIMS_FILE = "claims.toml"
#: Sets of claims whose p-values are adjusted together: the primary one; the same contrasts on other seeds; those at the
#: initial scale of Switch's paper.
FAMILIES = ("primary", "replication", "paper_scale")
#: Largest number of claims in a family.
MOST_OF_FAMILY = 5


_STRICT = pydantic.ConfigDict(extra="forbid")


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Part:
    """One inequality of a claim.

    Attributes:
        what: the quantity, in words.
        rule: how it is decided.
        value: linear combination of results, as in "loss[switch] - loss[dense]" (:mod:`moe.lab.expressions`).
        margin: equivalence margin in the unit of ``value``, for the rules not_above and within.
        published: the paper's effect in the same unit and sign; None if it has no comparable one.
        spread: standard deviation of ``value`` over seeds that was expected at registration, by which the number of
            seeds and the margin were chosen; None: none was stated.
        differs: how the setting of the published number differs from that of ``value``; such a number is shown but not
            compared. Empty: it does not, but for the size of the model.

    ``spread`` and ``differs`` are not part of the claim's hash.
    """

    what: str
    rule: Rule
    value: str
    margin: Amount = 0.0
    published: float | None = None
    spread: Amount | None = None
    differs: str = ""


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Claim:
    """A claim of a paper, and what must hold in a suite's results for it to be supported.

    Attributes:
        number: position in the list of claims.
        suite: name of the suite whose results decide it.
        text: the claim.
        source: paper, and the published figures as printed there.
        min_steps: horizon from which the claim applies; shorter results are below the crossing.
        requires: value that must be below zero, interval included, for the claim to apply at all; empty: none.
        family: one of :data:`FAMILIES`, or empty for an exploratory claim.
        wording: text in the place of ``text``, where that misnames the arms or the bound; not part of the hash, since
            what is tested stays as it was registered. Empty: none.
    """

    number: Step
    suite: str
    text: str
    source: str
    parts: tuple[Part, ...]
    min_steps: Step = 0
    requires: str = ""
    family: Literal["", "primary", "replication", "paper_scale"] = ""
    wording: str = ""

    @property
    def sentence(self) -> str:
        """Text that reports print: the wording, if the registered text was found to be wrong."""
        return self.wording or self.text

    @property
    def hash(self) -> str:
        """Hash of all fields that say what is tested."""
        fields = dataclasses.asdict(self)
        del fields["wording"]
        for part in fields["parts"]:
            del part["spread"], part["differs"]
        text = json.dumps(fields, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Primary:
    """The primary family: the contrasts that the runs are made to decide.

    Attributes:
        question: the question that they answer together.
        claims: their numbers, at most five.
        smallest: smallest effect of interest, in nats.
        equivalence: an effect whose interval lies within ± this counts as none.
        pilot: what was known when the family was registered.
    """

    question: str
    claims: tuple[int, ...]
    smallest: Amount
    equivalence: Amount
    pilot: str


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class _File:
    claim: tuple[Claim, ...]
    primary: Primary | None = None


@dataclasses.dataclass(frozen=True)
class Registered:
    """A file of claims.

    Attributes:
        claims: all of them.
        primary: the family; None: every claim is exploratory.
        digest: SHA-256 of the file; empty without one.
    """

    claims: tuple[Claim, ...] = ()
    primary: Primary | None = None
    digest: str = ""


def read_claims(path: Path) -> Registered:
    """The claims of a file; none if there is no such file.

    Raises:
        ConfigError: the file is not a list of claims.
    """
    if not path.exists():
        return Registered()
    content = read_small_file(path)
    found = _read(path, content)
    return Registered(found.claim, found.primary, hashlib.sha256(content).hexdigest())


def _read(path: Path, content: bytes) -> _File:
    try:
        tree = tomllib.loads(content.decode())
        if not isinstance(tree["claim"], list):
            raise ValueError("write [[claim]], a list")
        for entry in tree["claim"]:
            entry["parts"] = entry.pop("part")
        found = _FILE.validate_python(tree)
        for claim in found.claim:
            for text in (*(part.value for part in claim.parts), *filter(None, [claim.requires])):
                parse(text)
        _check(found)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a list of claims ({first_sentence(error)})") from error
    return found


_FILE = pydantic.TypeAdapter(_File)


def _check(found: _File) -> None:
    numbers = [claim.number for claim in found.claim]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"claim numbers {numbers}: must be different")
    for claim in found.claim:
        if not claim.parts:
            raise ValueError(f"claim {claim.number}: has no part")
        if all(part.rule == "shown" for part in claim.parts):
            raise ValueError(f"claim {claim.number}: all its parts are 'shown', which decide nothing")
        if claim.family and len(claim.parts) > 1:
            raise ValueError(f"claim {claim.number}: a claim of a family must have exactly one part")
    families = {name: [claim.number for claim in found.claim if claim.family == name] for name in FAMILIES}
    for name, members in families.items():
        if len(members) > MOST_OF_FAMILY:
            raise ValueError(f"claims {members} are of the family {name!r}: at most {MOST_OF_FAMILY}")
    if families["primary"] != sorted(found.primary.claims if found.primary else ()):
        raise ValueError(f"claims {families['primary']} of family 'primary': must be those that primary.claims names")


#: Number of a claim → its hash.
_HASHES: pydantic.TypeAdapter[dict[str, str]] = pydantic.TypeAdapter(dict[str, str])


def hashes_at_start(path: Path, claims: Sequence[Claim]) -> dict[str, str]:
    """Number → hash of the claims when a run first started; kept in a file, so that a resumed run has the same."""
    if not path.exists():
        write_atomic(path, json.dumps({str(claim.number): claim.hash for claim in claims}).encode())
    return read_json(path, _HASHES)
