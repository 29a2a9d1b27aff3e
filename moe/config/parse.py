"""Conversion of ConfigDict trees and of keyword arguments to typed configs and back, with checks of names and types."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import operator
import typing
from collections.abc import Mapping

import ml_collections

from moe.config import flat
from moe.config.model_section import ModelConfig, check_is_model
from moe.config.moe_section import Capacity, Losses, MoEConfig
from moe.config.references import code_fields, refuse_modules
from moe.config.registry import CONSTANTS, LAYERS, find_gate, find_layer, is_balanced
from moe.config.run_sections import EMBEDDED_DOMAINS
from moe.config.schema import Config
from moe.fields import ConfigError, check_type, facts_of, item_name, type_hints
from moe.routing.interface import Gate


class _TrackedConfigDict(ml_collections.ConfigDict):
    """ConfigDict that remembers which of its fields were assigned; see :func:`assigned_fields`."""

    def __setitem__(self, key: str, value: typing.Any) -> None:
        super().__setitem__(key, value)
        self.__dict__.setdefault("_assigned", set()).add(key)

    def copy_and_resolve_references(self, visit_map: typing.Any = None) -> typing.Any:
        """A copy that remembers the same."""
        result = super().copy_and_resolve_references(visit_map)
        result.__dict__["_assigned"] = set(self.__dict__.get("_assigned", ()))
        return result


class _MoESection(_TrackedConfigDict):
    """Section ``model.moe``, whose field ``gate`` can be assigned a name; see :func:`choose_gate`."""

    def __setitem__(self, key: str, value: typing.Any) -> None:
        if self.is_locked and key not in self:
            raise ConfigError(_no_such_field(key, self.keys(), "model.moe."))
        if key == "gate" and isinstance(value, str):
            choose_gate(self, value)
            self.__dict__["_assigned"].add("gate")
        else:
            super().__setitem__(key, value)

    def update(self, *other: typing.Any, **kwargs: typing.Any) -> None:
        """Update the section as any ConfigDict; ``gate`` may be a name."""
        values = {**{name: value for section in other for name, value in section.items()}, **kwargs}
        gate = values.get("gate")
        if isinstance(gate, str):
            self["gate"] = values.pop("gate")
        elif isinstance(gate, dict) and "name" in gate:
            self["gate"] = gate["name"]
        super().update(values)


def choose_gate(moe: typing.Any, name: str) -> None:
    """Give a section of :func:`to_config_dict` another gate, with the constants of its paper.

    Assigned fields keep their values.

    Raises:
        ConfigError: no such gate, or one that lacks a field that was assigned.
    """
    layer = find_layer(name)
    gate = _gate_section(layer.gate)
    for field in sorted(moe.gate.__dict__["_assigned"] - {"name"}) if layer.gate is not None else ():
        check_gate_field(gate, field)
        gate[field] = moe.gate[field]
    with moe.unlocked():
        del moe["gate"]
        _set_unmarked(moe, "gate", gate)
    for constant in CONSTANTS if layer.gate is not None else ():
        value = getattr(layer, constant)
        if dataclasses.is_dataclass(value):
            section = moe[constant]
            for field in dataclasses.fields(value):
                if field.name not in section.__dict__.get("_assigned", ()):
                    _set_unmarked(section, field.name, getattr(value, field.name))
        elif constant not in moe.__dict__.get("_assigned", ()):
            _set_unmarked(moe, constant, value)


def assign_changes(moe: typing.Any) -> None:
    """Mark as assigned what differs from the constants of the paper, in a section of :func:`to_config_dict`."""
    layer = find_layer(moe.gate.name)
    pairs: list[tuple[typing.Any, typing.Any]] = [(moe.gate, _gate_section(layer.gate))]
    published: typing.Any = _section(layer)
    for constant in CONSTANTS:
        if isinstance(moe[constant], ml_collections.ConfigDict):
            pairs.append((moe[constant], published[constant]))
        elif moe[constant] != published[constant]:
            moe[constant] = moe[constant]
    for ours, theirs in pairs:
        for name, value in ours.items():
            if value != theirs[name]:
                ours[name] = value


def _set_unmarked(section: typing.Any, name: str, value: typing.Any) -> None:
    ml_collections.ConfigDict.__setitem__(section, name, value)


def assigned_fields(tree: ml_collections.ConfigDict, path: str = "") -> set[str]:
    """Dotted names of the fields that a config file or the command line set in a tree of :func:`to_config_dict`."""
    assigned = tree.__dict__.get("_assigned", set())
    names = {path + name for name in assigned}
    for name, value in tree.items():
        if isinstance(value, ml_collections.ConfigDict):
            names |= assigned_fields(value, f"{path}{name}.")
    return names


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """Convert to a locked, type-checked ConfigDict, for files in ``configs/`` and command-line overrides.

    A field that follows others, and has the value that follows from them, gets its default, so that it follows changes.
    """
    tree = _section(config)
    for path in facts_of(Config, "follows"):
        *sections, name = path.split(".")
        owner = operator.attrgetter(".".join(sections))(config)
        default = next(field.default for field in dataclasses.fields(owner) if field.name == name)
        if _with(config, path.split("."), default) == config:
            _set_unmarked(functools.reduce(getattr, sections, tree), name, default)
    return tree


def _with(node: typing.Any, names: list[str], value: typing.Any) -> typing.Any:
    """Copy of a dataclass with another value of one field, which may be nested."""
    name, *inner = names
    return dataclasses.replace(node, **{name: _with(getattr(node, name), inner, value) if inner else value})


def _section(node: typing.Any) -> ml_collections.ConfigDict:
    result = (_MoESection if isinstance(node, MoEConfig) else _TrackedConfigDict)()
    hints = type_hints(type(node))
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if field.name == "gate" and isinstance(node, MoEConfig):
            value = _gate_section(value)
        elif dataclasses.is_dataclass(value):
            value = _section(value)
        elif hints[field.name] is float:
            value = float(value)
        ml_collections.ConfigDict.__setitem__(result, field.name, value)
    result.__dict__["_assigned"] = set()
    return result.lock()


def _gate_section(gate: Gate | None) -> ml_collections.ConfigDict:
    """Fields of a gate; for no gate only its name."""
    if gate is not None:
        return _section(gate)
    result = _TrackedConfigDict()
    _set_unmarked(result, "name", "none")
    result.__dict__["_assigned"] = set()
    return result.lock()


def to_dict(config: Config) -> dict[str, typing.Any]:
    """Convert to a nested dict of JSON types and tuples."""
    return dataclasses.asdict(config)


def check_field(path: str) -> None:
    """Check that a dotted name such as ``model.moe.num_experts`` is a field of :class:`Config`.

    Fields of a gate are not checked; see :func:`check_gate_field`.

    Raises:
        ConfigError: it is not; the message has the nearest name.
    """
    cls: typing.Any = Config
    names = path.split(".")
    for depth, name in enumerate(names):
        where = "".join(f"{section}." for section in names[:depth])
        if cls is None:
            raise ConfigError(f"{path}: {where[:-1]} is a single value, not a section")
        if cls is Gate:  # which fields it has is known once it is chosen
            return
        hints = _field_types(cls)
        if name not in hints:
            raise ConfigError(_no_such_field(name, hints, where))
        hint = Gate if hints[name] == Gate | None else hints[name]
        cls = hint if dataclasses.is_dataclass(hint) else None


def _gate_hints() -> dict[str, typing.Any]:
    """Types of the fields of all named gates."""
    return {name: hint for layer in LAYERS.values() for name, hint in _field_types(type(layer.gate)).items()}


def check_gate_field(gate: ml_collections.ConfigDict, name: str) -> None:
    """Raise a ConfigError unless the gate of a tree has this field, and the field may be set."""
    if name == "name":
        raise ConfigError("model.moe.gate.name: cannot be set; choose a gate by model.moe.gate")
    if name not in gate:
        raise ConfigError(_no_such_field(name, gate.keys(), "model.moe.gate."))


def type_name(path: str) -> str:
    """Description of the values that a field takes, for error messages."""
    hint: typing.Any = Config
    for name in path.split("."):
        hint = _gate_hints().get(name, object) if hint is Gate else type_hints(hint)[name]
        hint = Gate if hint == Gate | None else hint
    if hint is Gate:
        return f"a name: {', '.join(('none', *LAYERS))}, or module:object"
    if dataclasses.is_dataclass(hint):
        return f"set by its fields: {', '.join(field.name for field in dataclasses.fields(hint))}"
    if typing.get_origin(hint) is tuple:
        return f"a tuple of {item_name(typing.get_args(hint)[0])}, as in ('a','b') or (1,2)"
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    return hint.__name__


def _field_types(cls: type) -> dict[str, typing.Any]:
    """Type of every field of a dataclass, without class attributes."""
    hints = type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _no_such_field(name: str, fields: typing.Iterable[str], path: str) -> str:
    fields = list(fields)
    near = difflib.get_close_matches(name, fields, n=1)
    moved = flat.place_of(name) if path in ("model.moe.", "moe.") else ""
    nearest = moved or (near[0] if near else "")
    return f"{path}{name}: no such field; " + (
        f"did you mean {path}{nearest}?" if nearest else f"fields here: {', '.join(fields)}"
    )


def build(cls: type, tree: dict[str, typing.Any], path: str, base: typing.Any = None) -> typing.Any:
    """Build a dataclass from a nested dict, checking names and types.

    Args:
        tree: its fields, or some of them; for a :class:`Config`, ``model.moe`` may have the form of older runs
            (:mod:`moe.config.flat`).
        path: prefix of the fields in messages.
        base: the other fields; None: the defaults.
    """
    hints = _field_types(cls)
    values = {} if base is None else {field.name: getattr(base, field.name) for field in dataclasses.fields(cls)}
    if cls is Config:
        tree = flat.present(tree)
    if cls is MoEConfig:
        tree, values = _chosen_gate(tree, path)
    for name, value in tree.items():
        if name not in hints:
            raise ConfigError(_no_such_field(name, hints, path))
        if not dataclasses.is_dataclass(hints[name]):
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
    """Build the typed config of a tree.

    Raises:
        ConfigError: an unknown field (with the nearest name), a wrong type, or an impossible value or combination.
    """
    config = build(Config, dict(_sections(tree).items()), "")
    if config.data.dataset == "embedded" and not config.data.domains:  # stored configs name them
        return _with(config, ["data", "domains"], EMBEDDED_DOMAINS)
    return config


def from_workdir_dict(tree: object) -> Config:
    """:func:`from_config_dict` for the content of a workdir's file, which imports no module that the user did not name.

    The optimizer and the writers may name such modules, since reading a workdir creates neither.
    """
    refuse_modules({name: value for name, value in code_fields(tree).items() if name.startswith("model.")})
    return from_config_dict(tree)


def _sections(tree: object) -> dict[str, typing.Any] | ml_collections.ConfigDict:
    if not isinstance(tree, (dict, ml_collections.ConfigDict)):
        raise ConfigError(f"a config is an object with the sections of moe.config.Config, not {type(tree).__name__}")
    return tree


def _chosen_gate(tree: dict[str, typing.Any], path: str) -> tuple[dict[str, typing.Any], dict[str, typing.Any]]:
    """The section of MoE layers without its gate, and the gate with the constants of its paper that it brings."""
    tree = dict(tree)
    gate = tree.pop("gate", MoEConfig().gate_name)
    values: dict[str, typing.Any] = {"gate": gate}
    if not isinstance(gate, Gate):
        values = _named_layer(gate, f"{path}gate")
    elif not is_balanced(gate):
        values["losses"] = Losses()
        if gate.router == "slots":
            values["capacity"] = Capacity(train=1.0, eval=1.0)
    gates = tree.get("layer_gates", ())
    if isinstance(gates, (list, tuple)):
        tree["layer_gates"] = tuple(_layer_gate(own, values["gate"], f"{path}layer_gates") for own in gates)
    return tree, values


def _layer_gate(own: typing.Any, gate: Gate | None, path: str) -> typing.Any:
    """The gate of a name, or of a section with a name; the model's gate for its own name. Other values are returned
    unchanged and refused later."""
    if gate is not None and own == gate.name:
        return gate
    return _named_layer(own, path)["gate"] if isinstance(own, (str, dict, ml_collections.ConfigDict)) else own


def _named_layer(gate: typing.Any, path: str) -> dict[str, typing.Any]:
    """The gate of a name, or of a section with a name, and the constants of its paper."""
    gate = "none" if gate is None else gate
    fields = {"name": gate} if isinstance(gate, str) else _items(gate, path)
    layer = find_layer(check_type(str, fields.pop("name", MoEConfig().gate_name), f"{path}.name"))
    if layer.gate is None and fields:
        raise ConfigError(f"{path}.{next(iter(fields))}: no such field; a dense model has no gate")
    values = {name: getattr(layer, name) for name in CONSTANTS}
    return values | {"gate": layer.gate and build(type(layer.gate), fields, f"{path}.", layer.gate)}


def _items(value: typing.Any, field: str) -> dict[str, typing.Any]:
    """Fields of a section."""
    if not isinstance(value, (dict, ml_collections.ConfigDict)):
        raise ConfigError(f"{field}={value!r}: is a section; set its fields instead")
    return dict(value.items())
