"""Predictions that were written down before a number was known, and their scores once one is published.

``docs/results/predictions.jsonl`` has a line for each, which is never changed: the step with its interval, what it was
made from (a hash of the compiled program, or of the shapes; a hash of the prices; the commit; the date), and a stamp, a
hash of all that. ``docs/results/outcomes.jsonl`` has a line for each number that was published since, with the stamp of
its prediction and its source.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe.config import ConfigError
from moe.system.atomic_files import sole_writer, write_atomic
from moe.system.foreign_files import Fields, Positive, kept_whole, parse
from moe.system.reading import read_small_file

_Json = dict[str, Any]


class _Prediction(Fields):
    """Fields of a prediction that are read."""

    model: str
    topology: str
    tokens: Positive
    seconds: Positive
    low: Positive
    high: Positive
    made_from: str
    program: str
    prices: str
    commit: str
    date: str
    stamp: str


class _Outcome(Fields):
    """Fields of an outcome."""

    stamp: str
    seconds: Positive
    source: str


_PREDICTION, _OUTCOME = kept_whole(_Prediction), kept_whole(_Outcome)

#: 90 % quantile of the normal distribution: the ends of an 80 % interval, in standard deviations.
_Z90 = 1.2816


def stamp(entry: _Json) -> str:
    """Hash of a prediction without its stamp."""
    rest = {name: value for name, value in entry.items() if name != "stamp"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def prediction(model: str, figures: _Json, made_from: str, program: str, commit: str, settings: _Json) -> _Json:
    """A stamped prediction of today.

    Args:
        model: its name.
        figures: of a plan, as JSON.
        made_from: "compiled program" or "shapes".
        program: hash of it.
        commit: of the source.
        settings: from which the same plan can be made again.
    """
    low, high = figures["step_interval"]
    entry = {
        "model": model, "topology": figures["topology"], "tokens": figures["tokens"],
        "seconds": figures["step_seconds"], "low": low, "high": high, "mfu": figures["mfu"], "made_from": made_from,
        "program": program, "prices": figures["prices"], "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "settings": settings,
    }  # fmt: skip
    return entry | {"stamp": stamp(entry)}


def read(path: Path) -> list[_Json]:
    """All predictions of a file.

    Raises:
        ConfigError: a line is no prediction, or it was changed after it was stamped.
    """
    entries = _lines(path, _PREDICTION, "a prediction")
    for number, entry in enumerate(entries, 1):
        if stamp(entry) != entry["stamp"]:
            raise ConfigError(f"{path}, line {number}: was changed after it was stamped {entry['stamp']}")
    return entries


def _lines(path: Path, schema: Any, what: str) -> list[_Json]:
    lines = read_small_file(path).splitlines() if path.exists() else []
    return [parse(line, schema, f"{path}, line {number}: not {what}") for number, line in enumerate(lines, 1)]


def add(path: Path, entry: _Json) -> None:
    """Append a prediction.

    Raises:
        ConfigError: the same one stands there already.
    """
    same = ("model", "topology", "tokens", "program", "prices")
    with sole_writer(path):
        known = read(path)
        for old in known:
            if all(old[name] == entry[name] for name in same):
                raise ConfigError(f"{path}: this plan was registered on {old['date']}, stamp {old['stamp']}")
        write_atomic(path, "".join(json.dumps(each) + "\n" for each in [*known, entry]))


def scores(predictions: Sequence[_Json], outcomes: Sequence[_Json]) -> list[_Json]:
    """Outcomes with their prediction: the logarithm of published over predicted time ("error"), whether it lies in the
    interval ("inside"), and the logarithm of the density that the prediction gave to the logarithm of the time
    ("score", nats), a normal one with another width on each side.

    Raises:
        ConfigError: an outcome of no prediction.
    """
    by_stamp = {entry["stamp"]: entry for entry in predictions}
    made = []
    for outcome in outcomes:
        entry = by_stamp.get(outcome["stamp"])
        if entry is None:
            raise ConfigError(f"outcomes.jsonl: stamp={outcome['stamp']}: must be that of a prediction")
        error = math.log(outcome["seconds"] / entry["seconds"])
        below = math.log(entry["seconds"] / entry["low"]) / _Z90
        above = math.log(entry["high"] / entry["seconds"]) / _Z90
        away = error / (below if error < 0 else above)
        score = math.log(2 / (below + above)) - math.log(2 * math.pi) / 2 - away**2 / 2
        inside = entry["low"] <= outcome["seconds"] <= entry["high"]
        made.append({"model": entry["model"], "topology": entry["topology"], "error": error, "inside": inside})
        made[-1]["score"] = score
    return made


def report(predictions_path: Path, outcomes_path: Path) -> str:
    """The scores of a register as text."""
    predictions = read(predictions_path)
    made = scores(predictions, _lines(outcomes_path, _OUTCOME, "an outcome"))
    lines = [f"{len(predictions)} predictions, of which {len(made)} have a published number"]
    for each in made:
        lines.append(
            f"  {each['model']} on {each['topology']}: log(published / predicted) {each['error']:+.2f}, "
            f"{'inside' if each['inside'] else 'outside'}, log score {each['score']:+.2f}"
        )
    if made:
        count = len(made)
        lines.append(
            f"inside {sum(each['inside'] for each in made)} of {count}, bias "
            f"{sum(each['error'] for each in made) / count:+.2f}, mean log score "
            f"{sum(each['score'] for each in made) / count:+.2f}"
        )
    return "\n".join(lines)
