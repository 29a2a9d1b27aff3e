"""Layers of settings that files hold: a config file's, those of a run's ``config.json``, a checkpoint's model."""

from __future__ import annotations

import typing
from collections.abc import Mapping

from etils import epath

from moe.config import flat
from moe.config.changes import Changes, differences, settings_of
from moe.config.model_section import ModelConfig
from moe.config.names import GATE, leaves
from moe.config.parse import as_dict, build
from moe.config.references import check_path, code_fields, load_python_file, refuse_modules
from moe.config.schema import Config
from moe.routing.interface import Gate
from moe.system.fields import ConfigError, raised_as_errors
from moe.system.reading import read_small_file
from moe.system.sealed_folder import unsealed

#: Dotted name → value.
Settings = Mapping[str, typing.Any]


def read_config_file(path: str, gate: str | None = None) -> dict[str, typing.Any]:
    """Settings of what ``--config`` names.

    Args:
        path: ``config.json`` of a run, or a Python file; what follows a colon is the argument of its ``get_config``.
        gate: the gate that is chosen over it; see :func:`read_run`.

    Raises:
        ConfigError: the file is missing, raises an error, or returns no settings.
    """
    if path.endswith(".json"):  # a bucket's has a colon
        return read_run(path, gate)
    file, colon, argument = path.partition(":")
    with raised_as_errors(f"--config={path}"):
        module = load_python_file(file)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"--config={path}: has no function get_config()")
        changes = module.get_config(argument) if colon else module.get_config()
        if isinstance(changes, Changes):
            return changes.settings
        if not (isinstance(changes, dict) or hasattr(changes, "to_dict")):
            what = "must return Changes (moe.config) or a dict of sections"
            raise ConfigError(f"--config={path}: get_config() {what}, not {type(changes).__name__}")
        return dict(leaves(as_dict(changes)))


def read_run(path: str, gate: str | None = None) -> dict[str, typing.Any]:
    """All settings of a run, so that nothing is inherited from ``start.checkpoint`` a second time.

    Args:
        path: of the run's ``config.json``.
        gate: with another gate than the run's, settings of ``model.moe`` that the run's gate brought are left out.

    Raises:
        ConfigError: the file is missing or is not the config of a run.
    """
    content = read_small_file(path)
    try:
        tree = unsealed(content)
        refuse_modules(code_fields(tree), f"{path}: ")
        config = build(Config, tree, "")
    except (ValueError, RecursionError, AttributeError, TypeError) as error:  # not text, not JSON, or not a config
        raise ConfigError(f"{path}: not the config of a run ({error})") from error
    settings = settings_of(config)
    if gate is None:
        return settings
    kept = differences(settings)
    return {name: value for name, value in settings.items() if name in kept or not name.startswith("model.moe.")}


def inherited(settings: Settings, workdir: str = "") -> dict[str, typing.Any]:
    """Settings of the model of ``start.checkpoint``, over which these are set; empty without a checkpoint.

    Where these name another gate than the checkpoint's, as in upcycling, no field of ``model.moe`` is inherited: they
    are those of the new gate.

    Args:
        settings: those of the config file and the command line.
        workdir: of the run; its own config has the inherited values and is read if ``start.checkpoint`` is gone.

    Raises:
        ConfigError: the checkpoint's config cannot be read.
    """
    source = settings.get("start.checkpoint")
    if not source or not isinstance(source, str):
        return {}
    check_path("start.checkpoint", source)
    path, where = epath.Path(source) / "config.json", f"start.checkpoint={source!r}: must be the workdir of a run or"
    if workdir and not path.exists() and (epath.Path(workdir) / "config.json").exists():
        path = epath.Path(workdir) / "config.json"
    try:
        content = read_small_file(path)
    except ConfigError as error:
        raise ConfigError(f"{where} an import; {error}") from error
    try:
        model = _section(unsealed(content), "model")
        moe = _section(model, "moe")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} an import; {path} cannot be read as one ({error})") from error
    refuse_modules(code_fields({"model": model | {"moe": moe}}), f"{path}: ")
    try:
        moe = flat.nested(moe) if flat.is_flat(moe) else moe
        gate = settings.get(GATE, _gate_name(moe))
        keeps_layers = _gate_name(moe) == (gate.name if isinstance(gate, Gate) else gate)
        build(ModelConfig, model | {"moe": moe if keeps_layers else {"gate": "none"}}, "model.")
    except (ConfigError, RecursionError) as error:
        raise ConfigError(f"{where} an import; {path} cannot be read as one ({error})") from error
    return dict(leaves({"model": model | ({"moe": moe} if keeps_layers else {})}))


def _section(tree: typing.Any, name: str) -> dict[str, typing.Any]:
    """Remove a section from a config's JSON and return it. Raises ValueError if there is none."""
    section = tree.pop(name, None) if isinstance(tree, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"it has no section {name!r}")
    return section


def _gate_name(moe: dict[str, typing.Any]) -> str:
    """Name of the gate of a section in the present form. Raises ConfigError if it has none."""
    gate = moe.get("gate") or "none"
    name = gate.get("name") if isinstance(gate, dict) else gate
    if not isinstance(name, str):
        raise ConfigError(f"{GATE}={gate!r}: must have a name")
    return name
