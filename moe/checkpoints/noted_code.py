"""Note in a workdir of the code of a user's gates, layers and optimizer, so that an edit is said when a run resumes."""

from __future__ import annotations

import json
from typing import Any

import jax
import pydantic
from etils import epath

from moe.config import Config
from moe.config.user_code import user_code
from moe.system.atomic_files import write_atomic
from moe.system.foreign_files import Fields, read_json

NOTE = "user_code.json"


class _Note(Fields):
    sha256: str
    computed: str = ""
    under: str = ""


_NOTE = pydantic.TypeAdapter(_Note)


def edited_code(config: Config, workdir: epath.Path) -> dict[str, list[Any]]:
    """The change to record if the code of :func:`moe.config.user_code.user_code` is not that of the run's last start:
    name → [old hash, new hash]. Empty if it is, or if there is no note yet.

    Raises:
        ConfigError: a damaged note.
    """
    path = workdir / NOTE
    old = read_json(path, _NOTE).sha256 if path.exists() else ""
    new = user_code(config)
    return {"code of the user's modules": [old, new]} if old and old != new else {}


def other_values(computed: dict[str, str], workdir: epath.Path) -> dict[str, list[Any]]:
    """The change to record if the code computes something else than at the run's last start: under the same settings
    and versions, it reads a file, a variable of the environment, the order of a set or a device that is another one.

    Args:
        computed: of :meth:`moe.training.own_code.PureCode.computed`.

    Raises:
        ConfigError: a damaged note.
    """
    path = workdir / NOTE
    if not computed or not path.exists():
        return {}
    old = read_json(path, _NOTE)
    if old.computed in ("", computed["computed"]):
        return {}
    name = "what the user's modules compute"
    if old.under != computed["under"]:
        name += ", as other settings or versions may"
    return {name: [old.computed, computed["computed"]]}


def note_code(config: Config, workdir: epath.Path, computed: dict[str, str] | None = None) -> None:
    """Write the note; without code of a user there is none."""
    if jax.process_index() == 0 and (code := user_code(config)):
        write_atomic(workdir / NOTE, json.dumps({"sha256": code, **(computed or {})}))
