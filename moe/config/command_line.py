"""Settings of a command line, ``--config.SECTION.FIELD=VALUE``, over those of a config file and a checkpoint."""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Mapping, Sequence

from absl import flags

from moe.config.changes import Changes
from moe.config.files import Settings, inherited, read_config_file
from moe.config.mixers import Mixer
from moe.config.moe_section import MoEConfig
from moe.config.names import GATE, MIXER, NAMED, field_type, named_above, named_field_type, type_name
from moe.config.parse import from_config_dict
from moe.config.registry import LAYERS, find_mixer, layer_fields
from moe.config.schema import Config
from moe.routing.interface import Gate
from moe.system.fields import ConfigError, type_hints

#: Dotted name → texts, in the order in which they were given.
Texts = Mapping[str, Sequence[str]]

_PARSERS = {bool: flags.BooleanParser(), int: flags.IntegerParser(), float: flags.FloatParser()}


def split(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Separate the settings of a command line from its other words.

    A setting is ``--config.FIELD=TEXT`` or ``--config.FIELD TEXT``; of a truth value also ``--config.FIELD`` and
    ``--noconfig.FIELD``.

    Returns:
        The other words, and the texts of each setting.

    Raises:
        ConfigError: there is no such field.
    """
    others: list[str] = []
    texts: dict[str, list[str]] = {}
    rest = iter(words)
    for word in rest:
        flag, equals, text = word.lstrip("-").partition("=")
        path = flag.removeprefix("no").removeprefix("config.")
        if word == "--" or not word.startswith("-") or flag not in (f"config.{path}", f"noconfig.{path}"):
            others += [word, *rest] if word == "--" else [word]
            continue
        switch = field_type(path) is bool or _is_switch_of_gate(path)
        if flag.startswith("no"):
            if equals or not switch:
                raise ConfigError(f"{word}: must be --config.{path}=VALUE")
            text = "false"
        elif not equals:
            text = "true" if switch else next(rest, None)
            if text is None:
                raise ConfigError(f"{word}: needs a value, as in {word}=VALUE")
        texts.setdefault(path, []).append(text)
    return others, texts


def layers(path: str, texts: Texts, workdir: str = "") -> tuple[Settings, Settings, Settings]:
    """Settings of the checkpoint that the run starts from, of the config file, and of the command line.

    Args:
        path: of the config file; see :func:`moe.config.files.read_config_file`.
        texts: from :func:`split`.
        workdir: of the run; see :func:`moe.config.files.inherited`.

    Raises:
        ConfigError: a file that cannot be read, a value of the wrong type, or a field that the gate or the mixer lacks.
    """
    own = {name: _value(field_type(name), words, name) for name, words in texts.items() if not named_above(name)}
    file = read_config_file(path, own.get(GATE))
    checkpoint = inherited({**file, **own}, workdir)
    given = {**checkpoint, **file, **own}
    for name, words in texts.items():
        if chosen := named_above(name):
            value = _named_value(chosen, given)
            own[name] = _value(named_field_type(chosen, value, name.removeprefix(f"{chosen}.")), words, name)
    return checkpoint, file, own


def build_layers(*settings: Settings) -> Config:
    """The config of layers of settings over the defaults; later layers win.

    Raises:
        ConfigError: see :func:`moe.config.parse.from_config_dict`.
    """
    changes = Changes()
    for layer in settings:  # a mixer's name before its fields
        changes.update_from_flattened_dict(dict(sorted(layer.items(), key=lambda setting: setting[0] != MIXER)))
    return from_config_dict(changes)


def _named_value(chosen: str, settings: Settings) -> Gate | Mixer | None:
    """The gate or the mixer of settings."""
    if chosen == GATE:
        return layer_fields(settings.get(GATE, MoEConfig().gate_name))["gate"]
    mixer = settings.get(MIXER)
    return find_mixer(mixer) if isinstance(mixer, str) else mixer


def _is_switch_of_gate(path: str) -> bool:
    """Whether a gate of the package has a truth value of this name: the chosen gate is not known yet."""
    name = path.removeprefix(f"{GATE}.")
    return named_above(path) == GATE and any(
        type_hints(type(layer.gate)).get(name) is bool for layer in LAYERS.values()
    )


def _value(hint: typing.Any, texts: Sequence[str], path: str) -> typing.Any:
    """Value of a type that texts stand for: the last one, or a tuple of all."""
    try:
        if typing.get_origin(hint) is tuple:
            return tuple(entry for text in texts for entry in _entries(text))
        if hint in _PARSERS:
            return _PARSERS[hint].parse(texts[-1])
        if dataclasses.is_dataclass(hint) and path not in NAMED:
            raise ValueError(f"{path} is a section")
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise ConfigError(f"{path}={texts[-1]!r}: must be {type_name(hint)}") from error
    return texts[-1]


def _entries(text: str) -> tuple[typing.Any, ...]:
    """Entries of a tuple: a Python literal, or one text without quotes."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        if isinstance(error, SyntaxError) and ("," in text or " " in text):
            raise
        return (text,)
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
