"""Model settings taken from the checkpoint that a run starts from."""

from __future__ import annotations

import json
import typing

import ml_collections
from etils import epath

from moe.config import flat
from moe.config.parse import assigned_fields, choose_gate
from moe.config.references import check_path, code_fields, read_small_file, refuse_modules
from moe.fields import ConfigError


def inherit_model(tree: typing.Any, workdir: str = "") -> None:
    """Copy the model fields that were not assigned from ``start.checkpoint``; without a checkpoint do nothing.

    Where the gate is assigned and differs from the checkpoint's, as in upcycling, no field of ``model.moe`` is copied:
    they have the defaults of the new gate.

    Args:
        tree: ConfigDict of :func:`moe.config.parse.to_config_dict`. Others do not record what was assigned
            and are left unchanged.
        workdir: of the run; its own config has the inherited values and is read if ``start.checkpoint`` is gone.

    Raises:
        ConfigError: the checkpoint's config cannot be read.
    """
    if "_assigned" not in tree.__dict__ or not tree.start.checkpoint:
        return
    source = tree.start.checkpoint
    check_path("start.checkpoint", source)
    path, where = epath.Path(source) / "config.json", f"start.checkpoint={source!r}: must be the workdir of a run or"
    if workdir and not path.exists() and (epath.Path(workdir) / "config.json").exists():
        path = epath.Path(workdir) / "config.json"
    try:
        content = read_small_file(path)
    except ConfigError as error:
        raise ConfigError(f"{where} an import; {error}") from error
    assigned = assigned_fields(tree)
    try:
        model = _section(json.loads(content), "model")
        moe = _section(model, "moe")
        refuse_modules(code_fields({"model": {"moe": moe}}), f"{path}: ")
        _fill(tree.model, model, assigned, "model.")
        _inherit_moe(tree.model.moe, flat.nested(moe) if flat.is_flat(moe) else moe, assigned)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} an import; {path} cannot be read as one ({error})") from error


def _section(tree: typing.Any, name: str) -> dict[str, typing.Any]:
    """Remove a section from a config's JSON and return it. Raises ValueError if there is none."""
    section = tree.pop(name, None) if isinstance(tree, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"it has no section {name!r}")
    return section


def _inherit_moe(section: typing.Any, theirs: dict[str, typing.Any], assigned: set[str]) -> None:
    gate = theirs.get("gate") or "none"
    gate = {"name": gate} if isinstance(gate, str) else gate
    if not isinstance(gate, dict) or not isinstance(gate.get("name"), str):
        raise ValueError(f"model.moe.gate={gate!r}: must have a name")
    if section.gate.name != gate["name"]:
        if not assigned.isdisjoint(("model.moe.gate", "model.moe.gate.name")):
            return
        choose_gate(section, gate["name"])
    _fill(section, theirs | {"gate": gate}, assigned, "model.moe.")


def _fill(section: typing.Any, theirs: dict[str, typing.Any], assigned: set[str], path: str) -> None:
    for name, value in theirs.items():
        if name not in section:
            raise ValueError(f"{path}{name}: there is no such field")
        if isinstance(section[name], ml_collections.ConfigDict) and isinstance(value, dict):
            _fill(section[name], value, assigned, f"{path}{name}.")
        elif path + name not in assigned:
            try:
                section[name] = tuple(value) if isinstance(value, list) else value
            except TypeError as error:
                raise ValueError(f"{path}{name}={value!r}: must be {type(section[name]).__name__}") from error
