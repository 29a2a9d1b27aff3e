"""Settings that a config file returns: those that differ from the defaults, by dotted name, written as attributes."""

from __future__ import annotations

import dataclasses
import functools
import operator
import typing
from collections.abc import Callable, Mapping

from moe.config.mixers import Mixer
from moe.config.moe_section import MoEConfig
from moe.config.names import GATE, MIXER, NAMED, field_type, is_section, leaves, named_field_type
from moe.config.registry import find_layer, find_mixer, layer_fields
from moe.config.renamed import RENAMED
from moe.config.schema import Config
from moe.routing.interface import Gate
from moe.system.fields import ConfigError, facts_of


class Changes:
    """Settings by dotted name, over the defaults and what the gate's name brings.

    Fields are read and written as attributes: ``changes.model.moe.gate = "switch"``, ``changes.train.batch_size``. A
    field that was not set reads as its default. Their order does not matter, except that the gate "none" drops fields
    of a gate that were set before. Names are checked at once, values and fields of the gate when the config is built
    (:func:`moe.config.parse.from_config_dict`).
    """

    _settings: dict[str, typing.Any]
    _section: str

    def __init__(self, settings: Mapping[str, typing.Any] | None = None) -> None:
        """Create changes with these settings, dotted name → value."""
        vars(self).update(_settings={}, _section="")
        self.update_from_flattened_dict(settings or {})

    @property
    def settings(self) -> dict[str, typing.Any]:
        """Dotted name → value of the fields that were set; the name of the gate is ``model.moe.gate``."""
        return dict(self._settings)

    def copy(self) -> Changes:
        """Changes that can be edited without effect on these."""
        return Changes(self._settings)

    def __getitem__(self, name: str) -> typing.Any:
        path = self._section + name
        if is_section(path):
            section = Changes()
            vars(section).update(_settings=self._settings, _section=f"{path}.")
            return section
        return self._settings[path] if path in self._settings else _default(path, self._settings)

    def __setitem__(self, name: str, value: typing.Any) -> None:
        """Set a field, or the fields of a section: those of a dict or a dataclass, or those set in other changes."""
        path = self._section + name
        if isinstance(value, Changes):
            section = value._section
            inside = {key: each for key, each in value._settings.items() if key.startswith(section)}
            self[name].update_from_flattened_dict({key.removeprefix(section): each for key, each in inside.items()})
            return
        if dataclasses.is_dataclass(value) and is_section(path) and path not in NAMED:
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        for leaf, each in leaves({name: value}, self._section):
            if leaf == GATE and each in (None, "none"):  # a dense model has none of the gate's fields
                self._drop(f"{GATE}.")
            if leaf == MIXER and each != self._settings.get(MIXER, each):  # another mixer has fields of its own
                self._drop(f"{MIXER}.")
            self._settings[leaf] = each

    def _drop(self, section: str) -> None:
        for path in [path for path in self._settings if path.startswith(section)]:
            del self._settings[path]

    def __getattr__(self, name: str) -> typing.Any:
        if name.startswith("_"):  # of a protocol, such as copying
            raise AttributeError(name)
        return self[name]

    def __setattr__(self, name: str, value: typing.Any) -> None:
        self[name] = value

    def update(self, section: Mapping[str, typing.Any] | None = None, **fields: typing.Any) -> None:
        """Set several fields of this section; those of a section in it are a dict."""
        for name, value in {**(section or {}), **fields}.items():
            self[name] = value

    def update_from_flattened_dict(self, settings: Mapping[str, typing.Any]) -> None:
        """Set fields by dotted name, relative to this section."""
        for path, value in settings.items():
            *sections, name = path.split(".")
            functools.reduce(operator.getitem, sections, self)[name] = value


def _default(path: str, settings: Mapping[str, typing.Any]) -> typing.Any:
    """Value of a setting that is not set, in a config whose gate and mixer are those of other settings."""
    if path in RENAMED:
        return ()
    section, _, name = path.rpartition(".")
    if section == MIXER:
        mixer = settings.get(MIXER)
        return _named_default(MIXER, find_mixer(mixer) if isinstance(mixer, str) else mixer, name)
    *inner, field = path.removeprefix("model.moe.").split(".")
    if not path.startswith("model.moe."):
        owner: typing.Any = field_type(section) if section else Config
        return next(field.default for field in dataclasses.fields(owner) if field.name == name)
    node: typing.Any = layer_fields(settings.get(GATE, MoEConfig().gate_name))
    if section == GATE:
        return _named_default(GATE, node["gate"], name)
    return getattr(node[inner[0]], field) if inner else node[field]


def _named_default(chosen: str, value: Gate | Mixer | None, name: str) -> typing.Any:
    if name == "name":
        return "none" if value is None else value.name
    named_field_type(chosen, value, name)
    return getattr(value, name)


def settings_of(config: Config) -> dict[str, typing.Any]:
    """Dotted name → value of all settings of a config; the name of the gate is ``model.moe.gate``.

    A field that follows others, and has the value that follows from them, has its default, so that it follows changes.
    """
    settings = dict(leaves(_tree(config)))
    for path in facts_of(Config, "follows"):
        default = _default(path, {})
        if with_value(config, path.split("."), default) == config:
            settings[path] = default
    return settings


def changes_of(config: Config) -> Changes:
    """The fewest changes from which a config is built again."""
    settings = settings_of(config)
    moe, mixer = config.model.moe, config.model.mixer
    if not _is_known(moe.gate, lambda: find_layer(moe.gate_name).gate):
        settings = {path: value for path, value in settings.items() if not path.startswith(f"{GATE}.")}
        settings[GATE] = moe.gate
    if mixer is not None and not _is_known(mixer, lambda: find_mixer(mixer.name)):
        settings = {path: value for path, value in settings.items() if not path.startswith(f"{MIXER}.")}
        settings[MIXER] = mixer
    return Changes(differences(settings))


def _is_known(value: Gate | Mixer | None, find: Callable[[], Gate | Mixer | None]) -> bool:
    """Whether the name of a value stands for one of its class."""
    try:
        return type(find()) is type(value)
    except ConfigError:
        return False


def differences(settings: Mapping[str, typing.Any]) -> dict[str, typing.Any]:
    """The settings that are not their defaults, among all settings of a config."""
    gate = settings[GATE]
    found = {path: value for path, value in settings.items() if path != GATE and value != _default(path, settings)}
    return found if gate == MoEConfig().gate_name else {GATE: gate, **found}


def with_value(node: typing.Any, names: list[str], value: typing.Any) -> typing.Any:
    """Copy of a dataclass with another value of one field, which may be nested."""
    name, *inner = names
    return dataclasses.replace(node, **{name: with_value(getattr(node, name), inner, value) if inner else value})


def _tree(node: typing.Any) -> dict[str, typing.Any]:
    """Fields of a dataclass, sections as dicts; no gate is its name."""
    tree = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    if isinstance(node, MoEConfig) and node.gate is None:
        tree["gate"] = node.gate_name
    return {name: _tree(value) if dataclasses.is_dataclass(value) else value for name, value in tree.items()}
