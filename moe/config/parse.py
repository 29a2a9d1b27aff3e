"""Typed configs from changes, nested dicts and keyword arguments, and back, with checks of names and types."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping

from moe.config import flat, renamed
from moe.config.changes import Changes, with_value
from moe.config.mixers import Mixer
from moe.config.model_section import ModelConfig, check_is_model
from moe.config.moe_section import MoEConfig
from moe.config.names import MIXER, field_types, named_field_type, nested, no_such_field
from moe.config.references import code_fields, refuse_modules
from moe.config.registry import find_gate, find_mixer, layer_fields
from moe.config.run_sections import EMBEDDED_DOMAINS
from moe.config.schema import Config
from moe.routing.interface import Gate
from moe.system.fields import ConfigError, check_type


def to_dict(config: Config) -> dict[str, typing.Any]:
    """Convert to a nested dict of JSON types and tuples."""
    return dataclasses.asdict(config)


def build(cls: type, tree: dict[str, typing.Any], path: str, base: typing.Any = None) -> typing.Any:
    """Build a dataclass from a nested dict, checking names and types.

    Args:
        tree: its fields, or some of them; for a :class:`Config`, ``model.moe`` may have the form of older runs
            (:mod:`moe.config.flat`).
        path: prefix of the fields in messages.
        base: the other fields; None: the defaults.
    """
    hints = field_types(cls)
    values = {} if base is None else {field.name: getattr(base, field.name) for field in dataclasses.fields(cls)}
    if cls is Config:
        tree = flat.present(tree)
    if cls is ModelConfig:
        tree = renamed.present(tree, (ModelConfig() if base is None else base).num_layers)
    if cls is MoEConfig:
        tree, values = _with_gate(tree, path)
    for name, value in tree.items():
        if name not in hints:
            raise ConfigError(no_such_field(name, hints, path))
        if hints[name] == Mixer | None:
            values[name] = _mixer(value, f"{path}{name}")
        elif not dataclasses.is_dataclass(hints[name]):
            values[name] = check_type(hints[name], value, f"{path}{name}")
        elif isinstance(value, hints[name]):
            values[name] = value
        else:
            section = typing.cast(type, hints[name])
            values[name] = build(section, _items(value, f"{path}{name}"), f"{path}{name}.", values.get(name))
    return cls(**values)


#: Settings of an MoE layer that belong to the model, not to its MoE section.
_LAYER_SETTINGS = ("d_model", "activation", "init_scale")


def layer_config(
    config: object, gate: str | Gate | None, settings: Mapping[str, object], defaults: Mapping[str, object]
) -> ModelConfig:
    """Config of one MoE layer: the config of a model with the layer's own gate, or one for a standalone layer.

    Args:
        config: a :class:`ModelConfig`, or None.
        gate: the gate, its name, or ``module:object``; None: the config's, or the default.
        settings: without a config, fields of ``model.moe`` and the model's that a layer reads.
        defaults: values of settings that are not given.

    Raises:
        ConfigError: an unknown setting, or an impossible value or combination.
    """
    if gate is not None and not isinstance(gate, (str, Gate)):
        raise ConfigError(f"gate={gate!r}: must be a name, 'module:object', or a Gate")
    if config is not None:
        model = check_is_model(config)
        if settings:
            raise ConfigError(f"MoELayer: give a config or {', '.join(settings)}, not both")
        gate = find_gate(gate) if isinstance(gate, str) else gate
        return model if gate is None else dataclasses.replace(model, moe=model.moe.with_gate(gate))
    missing = [name for name in ("d_model", "d_ff") if name not in settings]
    if missing:
        raise ConfigError(f"MoELayer: needs {' and '.join(missing)}, or the config of a model")
    # A layer on its own need not be causal.
    moe = {"accept_future_leak": True, **defaults, **settings, **({} if gate is None else {"gate": gate})}
    of_model = {name: moe.pop(name) for name in _LAYER_SETTINGS if name in moe}
    return build(ModelConfig, {**of_model, "moe": moe}, "")


def from_config_dict(tree: object) -> Config:
    """Build the config of changes, or of a nested dict.

    Args:
        tree: :class:`Changes`, a dict of sections, or an object with a method ``to_dict``, as an
            ``ml_collections.ConfigDict``.

    Raises:
        ConfigError: an unknown field (with the nearest name), a wrong type, or an impossible value or combination.
    """
    config = build(Config, nested(tree.settings) if isinstance(tree, Changes) else as_dict(tree), "")
    if config.data.dataset == "embedded" and not config.data.domains:  # stored configs name them
        return with_value(config, ["data", "domains"], EMBEDDED_DOMAINS)
    return config


def from_workdir_dict(tree: object) -> Config:
    """:func:`from_config_dict` for the content of a workdir's file, which imports no module that the user did not name.

    The optimizer and the writers may name such modules, since reading a workdir creates neither.
    """
    refuse_modules({name: value for name, value in code_fields(tree).items() if name.startswith(("model.", "data."))})
    return from_config_dict(tree)


def as_dict(tree: typing.Any) -> dict[str, typing.Any]:
    """The sections of a config as a nested dict. Raises ConfigError for what has none."""
    tree = tree.to_dict() if hasattr(tree, "to_dict") else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"a config is an object with the sections of moe.config.Config, not {type(tree).__name__}")
    return tree


def _with_gate(tree: dict[str, typing.Any], path: str) -> tuple[dict[str, typing.Any], dict[str, typing.Any]]:
    """The section of MoE layers without its gate, and the values of all its fields that the gate brings."""
    tree = dict(tree)
    values = _brought(tree.pop("gate", MoEConfig().gate_name), f"{path}gate")
    gates = tree.get("layer_gates", ())
    if isinstance(gates, (list, tuple)):
        tree["layer_gates"] = tuple(_layer_gate(own, values["gate"], f"{path}layer_gates") for own in gates)
    return tree, values


def _layer_gate(own: typing.Any, gate: Gate | None, path: str) -> typing.Any:
    """The gate of a name, or of a section with a name; the model's gate for its own name. Other values are returned
    unchanged and refused later."""
    if gate is not None and own == gate.name:
        return gate
    return _brought(own, path)["gate"] if isinstance(own, (str, dict)) else own


def _brought(gate: typing.Any, path: str) -> dict[str, typing.Any]:
    """Settings that a gate brings: a value, a name, or a section with either as its ``name`` and fields of the gate."""
    single = gate is None or isinstance(gate, (str, Gate))
    fields = {"name": gate} if single else _items(gate, path)
    name = fields.pop("name", MoEConfig().gate_name)
    if not (name is None or isinstance(name, Gate)):
        check_type(str, name, f"{path}.name")
    values = layer_fields(name)
    if values["gate"] is None and fields:
        raise ConfigError(f"{path}.{next(iter(fields))}: no such field; a dense model has no gate")
    if fields:
        values["gate"] = build(type(values["gate"]), fields, f"{path}.", values["gate"])
    return values


def _mixer(value: typing.Any, path: str) -> Mixer | None:
    """A token mixer: a value, a name, or a section with either as its ``name`` and with fields of the mixer."""
    fields = {"name": value} if value is None or isinstance(value, (str, Mixer)) else _items(value, path)
    name = fields.pop("name", None)
    mixer = name if name is None or isinstance(name, Mixer) else find_mixer(check_type(str, name, f"{path}.name"))
    if not fields:
        return mixer
    named_field_type(MIXER, mixer, next(iter(fields)))
    return build(type(mixer), fields, f"{path}.", mixer)


def _items(value: typing.Any, field: str) -> dict[str, typing.Any]:
    """Fields of a section."""
    if not isinstance(value, dict):
        raise ConfigError(f"{field}={value!r}: is a section; set its fields instead")
    return dict(value)
