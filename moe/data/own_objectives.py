"""Checks of a user's objective on the first documents of a run, before anything is compiled or written."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np

from moe.config import ConfigError, DataConfig
from moe.config.guarded_objectives import FIELD, naming_objective, of_user
from moe.config.objectives import Arrays, Objective
from moe.data.preparation import Prepared

_DOCUMENTS = 8  # of each split of a domain


def probe(objective: Objective, prepared: Prepared, data: DataConfig) -> str:
    """Refuse examples of other arrays, lengths or ids than the objective's methods say.

    Returns:
        Digest of the examples and their rows; empty for an objective of the package.

    Raises:
        ConfigError: the method is named, and the array.
    """
    if not of_user(objective):
        return ""
    digest = hashlib.sha256()
    with naming_objective(objective, "lengths"):
        lengths = objective.lengths(data)
    for domain in prepared.domains:
        for documents in (prepared.train[domain], prepared.heldout[domain]):
            for text in itertools.islice(documents, _DOCUMENTS):
                if not lengths:
                    with naming_objective(objective, "encode"):
                        ids = objective.encode(text, prepared.tokenizer)
                    _check_ids(objective, "encode", ids, prepared)
                    digest.update(_bytes({"row": ids}))
                    continue
                with naming_objective(objective, "examples"):
                    examples, again = (
                        objective.examples(text, np.random.default_rng(0), data, prepared.tokenizer) for _ in range(2)
                    )
                    if not isinstance(examples, list):
                        raise TypeError(f"gives {type(examples).__name__}, must be a list")
                    for example in examples:
                        _check_example(objective, example, lengths, prepared)
                _require_alike(objective, "examples", examples, again)
                rows = _checked_rows(objective, examples[0], lengths, prepared) if examples else []
                for arrays in (*examples, *rows):
                    digest.update(_bytes(arrays))
    return digest.hexdigest()


def _bytes(arrays: Arrays) -> bytes:
    return b"".join(name.encode() + np.asarray(values).tobytes() for name, values in sorted(arrays.items()))


def _check_example(objective: Objective, example: Arrays, lengths: dict[str, int], prepared: Prepared) -> None:
    where = f"{FIELD}={objective.name!r}: examples"
    if example.keys() != lengths.keys():
        raise ConfigError(f"{where}: has arrays {sorted(example)}, and lengths has {sorted(lengths)}")
    for name, values in example.items():
        if not (isinstance(values, np.ndarray) and values.ndim == 1):
            raise ConfigError(f"{where}: {name} must be an array [n] of numpy")
        if len(values) > lengths[name]:
            raise ConfigError(f"{where}: {name} has {len(values)} elements, and lengths allows {lengths[name]}")
    _check_ids(objective, "examples", example.get("tokens", np.zeros(0, np.int32)), prepared)
    _check_ids(objective, "examples", objective.targets(example), prepared)


def _checked_rows(objective: Objective, example: Arrays, lengths: dict[str, int], prepared: Prepared) -> list[Arrays]:
    """The row that holds one example and padding, as it is trained on and as it is evaluated."""

    def row(method: str) -> Arrays:
        packed = {}
        for name, values in example.items():
            padding = (0, lengths[name] - len(values))
            packed[name] = np.pad(np.asarray(values), padding)
            packed[f"{name}_segment_ids"] = np.pad(np.ones(len(values), np.int32), padding)
            packed[f"{name}_positions"] = np.pad(np.arange(len(values), dtype=np.int32), padding)
        with naming_objective(objective, method):
            made = objective.row(packed, pad_id=prepared.tokenizer.pad_id)
            return objective.heldout_row(made) if method == "heldout_row" else made

    rows = []
    for method in ("row", "heldout_row"):
        found = row(method)
        if not isinstance(found, dict) or not all(isinstance(values, np.ndarray) for values in found.values()):
            raise ConfigError(f"{FIELD}={objective.name!r}: {method}: must return a dictionary of NumPy arrays")
        rows.append(found)
        if "tokens" in found:
            _check_ids(objective, method, found["tokens"], prepared)
        _require_alike(objective, method, [found], [row(method)])
    return rows


def _require_alike(objective: Objective, method: str, one: list[Arrays], other: list[Arrays]) -> None:
    """Refuse a method that gives other arrays when it is called again: a resumed run would read other rows."""
    same = len(one) == len(other) and all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )
    if not same:
        raise ConfigError(
            f"{FIELD}={objective.name!r}: {method}: gives other arrays when it is called again: it must be a pure "
            "function that draws from the given generator alone"
        )


def _check_ids(objective: Objective, method: str, ids: np.ndarray, prepared: Prepared) -> None:
    most = objective.ids(prepared.tokenizer)
    if not np.issubdtype(np.asarray(ids).dtype, np.integer) or (len(ids) and not 0 <= ids.min() <= ids.max() < most):
        raise ConfigError(
            f"{FIELD}={objective.name!r}: {method}: must give token ids from 0 to {most - 1}, those of the tokenizer "
            f"and of {objective.sentinels} sentinels"
        )
