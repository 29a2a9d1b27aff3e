"""Dotted names of settings, such as ``model.moe.num_experts``: their types, and messages about unknown ones."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence

from moe.config import flat
from moe.config.mixers import FIELD, Mixer
from moe.config.registry import LAYERS
from moe.config.renamed import RENAMED
from moe.config.schema import Config
from moe.routing.interface import Gate
from moe.system.fields import ConfigError, item_name, type_hints

#: The gate and the token mixer: a name, or a value. The fields of the chosen one are settings below it, as
#: ``model.moe.gate.k``.
GATE, MIXER = "model.moe.gate", FIELD
NAMED: Mapping[str, type] = types.MappingProxyType({GATE: Gate, MIXER: Mixer})

#: Names of other libraries, and short ones, by those here.
_SYNONYMS = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "beta1": "b1",
    "beta2": "b2",
    "adam_beta1": "b1",
    "adam_beta2": "b2",
    "max_grad_norm": "gradient_clip",
    "clip": "gradient_clip",
    "bs": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation_steps",
    "steps": "num_steps",
    "max_steps": "num_steps",
    "warmup": "warmup_steps",
    "seq_len": "sequence_length",
    "max_seq_len": "sequence_length",
    "hidden_size": "d_model",
    "dim": "d_model",
    "intermediate_size": "d_ff",
    "moe_intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "n_experts": "num_experts",
    "num_local_experts": "num_experts",
    "n_routed_experts": "num_experts",
    "top_k": "k",
    "topk": "k",
    "data_dir": "directory",
    "num_experts_per_tok": "k",
    "temp": "temperature",
    "aux_loss": "balance",
    "aux_loss_coef": "balance",
    "aux_loss_weight": "balance",
    "router_aux_loss_coef": "balance",
    "moe_aux_loss_coeff": "balance",
    "z_loss": "z",
    "router_z_loss_coef": "z",
    "moe_z_loss_coeff": "z",
    "dp": "data",
    "ep": "expert",
    "tp": "tensor",
    "cp": "context",
    "pp": "pipeline",
}


def field_types(cls: type) -> dict[str, typing.Any]:
    """Type of every field of a dataclass, without class attributes."""
    hints = type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def check_field(path: str) -> None:
    """Check that a dotted name such as ``model.moe.num_experts`` is a field of :class:`Config`.

    Fields of a gate or a mixer are not checked; see :func:`named_field_type`.

    Raises:
        ConfigError: it is not; the message has the nearest name.
    """
    field_type(path)


def field_type(path: str) -> typing.Any:
    """Type of a setting: a section's dataclass, :class:`Gate`, :class:`Mixer`, or the type of a value; ``object`` for a
    field of these two.

    Raises:
        ConfigError: there is no such field; the message has the nearest name.
    """
    if path in RENAMED:
        return RENAMED[path][0]
    hint: typing.Any = Config
    names = path.split(".")
    for depth, name in enumerate(names):
        where = "".join(f"{section}." for section in names[:depth])
        if hint in (Gate, Mixer):  # which fields it has is known once it is chosen
            return object
        if not dataclasses.is_dataclass(hint):
            raise ConfigError(f"{path}: {where[:-1]} is a single value, not a section")
        hints = field_types(typing.cast(type, hint))
        if name not in hints:
            raise ConfigError(no_such_field(name, hints, where, names[depth + 1 :]))
        hint = {Gate | None: Gate, Mixer | None: Mixer}.get(hints[name], hints[name])
    return hint


def is_section(path: str) -> bool:
    """Return True for a name whose fields are settings; gate and mixer are, whatever they are."""
    return dataclasses.is_dataclass(field_type(path))


def named_above(path: str) -> str:
    """The key of :data:`NAMED` below which a setting is; empty if it is below none."""
    return next((chosen for chosen in NAMED if path.startswith(f"{chosen}.")), "")


def named_field_type(chosen: str, value: Gate | Mixer | None, name: str) -> typing.Any:
    """Type of a field of the gate or the mixer that a config has.

    Args:
        chosen: key of :data:`NAMED`.

    Raises:
        ConfigError: it has no such field, or none that can be set.
    """
    if name == "name":
        raise ConfigError(f"{chosen}.name: cannot be set; choose a {chosen.rpartition('.')[2]} by {chosen}")
    if value is None:
        why = "a dense model has no gate" if chosen == GATE else f"{chosen} names no mixer"
        raise ConfigError(f"{chosen}.{name}: no such field; {why}")
    hints = field_types(type(value))
    if name not in hints:
        raise ConfigError(no_such_field(name, hints, f"{chosen}."))
    return hints[name]


def type_name(hint: typing.Any) -> str:
    """Description of the values of a type, for messages that end in ``must be ...``."""
    if hint is Mixer:
        return "none, or module:object"
    if hint is Gate:
        return f"a name: {', '.join(('none', *LAYERS))}, or module:object"
    if dataclasses.is_dataclass(hint):
        return f"set by its fields: {', '.join(field.name for field in dataclasses.fields(hint))}"
    if typing.get_origin(hint) is tuple:
        return f"a tuple of {item_name(typing.get_args(hint)[0])}, as in ('a','b') or (1,2)"
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    return hint.__name__


def no_such_field(name: str, fields: Iterable[str], path: str, below: Sequence[str] = ()) -> str:
    """Message for an unknown field of a section, with the nearest setting or all fields.

    Args:
        name: the field.
        fields: those of the section.
        path: of the section, which ends in a dot or is empty.
        below: names that follow, where an unknown section was named.
    """
    fields = list(fields)
    whole = ".".join((f"{path}{name}", *below))
    nearest = (_nearest(below[-1], (), whole) if below else "") or _nearest(name, fields, f"{path}{name}")
    if path.startswith("moe."):  # of a layer on its own
        nearest = nearest.removeprefix("model.")
    return f"{whole}: no such field; " + (
        f"did you mean {nearest}?" if nearest else f"fields here: {', '.join(fields)}"
    )


def _nearest(name: str, fields: Sequence[str], whole: str) -> str:
    """Dotted name of the setting or section that is most likely meant; "" if none is similar.

    Args:
        name: last part of the dotted name that was given.
        fields: of the section where it was looked for.
        whole: the dotted name.
    """
    section = whole.removesuffix(name)
    meant = _SYNONYMS.get(name, name)
    if meant in fields:
        return f"{section}{meant}"
    if meant == name and section in ("model.moe.", "moe.") and (place := flat.place_of(name)):
        return f"{section}{place}"
    every = [*_places(Config, "")]
    if not (fields and named_above(whole)):  # else the gate is known, and other gates' fields are no settings
        every += [f"{GATE}.{field}" for field in _gate_fields()]
    every = [place for place in every if place != whole]
    leaf = {place: place.rpartition(".")[2] for place in every}
    if found := _closest([place for place in every if leaf[place] == meant], section):
        return found
    if near := difflib.get_close_matches(name, fields, n=1):
        return f"{section}{near[0]}"
    parts = [place for place in every if leaf[place].startswith(f"{name}_") or leaf[place].endswith(f"_{name}")]
    similar = difflib.get_close_matches(name, leaf.values(), n=1, cutoff=0.8)
    return _closest(parts, section) or _closest([place for place in every if leaf[place] in similar], section)


def _closest(places: Sequence[str], section: str) -> str:
    """The setting that shares most sections with a dotted name, of several the first; "" if there is none."""
    named = {*section.split(".")}
    return max(places, key=lambda place: len(named & {*place.split(".")[:-1]}), default="")


def _gate_fields() -> list[str]:
    """Names of the fields of all gates of the package."""
    gates = [type(layer.gate) for layer in LAYERS.values() if layer.gate is not None]
    return list(dict.fromkeys(name for gate in gates for name in field_types(gate) if name != "name"))


def _places(cls: type, path: str) -> Iterator[str]:
    """Dotted names of all sections and settings of a section's dataclass."""
    for name, hint in field_types(cls).items():
        yield f"{path}{name}"
        if dataclasses.is_dataclass(hint):
            yield from _places(typing.cast(type, hint), f"{path}{name}.")


def leaves(tree: Mapping[str, typing.Any], section: str = "") -> Iterator[tuple[str, typing.Any]]:
    """Dotted name and value of every setting of a nested dict; the name of a gate or a mixer is the value of its key in
    :data:`NAMED`.

    Raises:
        ConfigError: an unknown field, or a section that is a value.
    """
    for name, value in tree.items():
        path = section + name
        chosen = path.removesuffix(".name")
        if chosen in NAMED and not (path == chosen and isinstance(value, Mapping)):
            yield chosen, value
        elif not is_section(path):
            yield path, value
        elif isinstance(value, Mapping):
            yield from leaves(value, f"{path}.")
        else:
            raise ConfigError(f"{path}={value!r}: is a section; set its fields instead")


def nested(settings: Mapping[str, typing.Any]) -> dict[str, typing.Any]:
    """The nested dict of settings by dotted name; the name of a gate or a mixer is its section's field ``name``."""
    tree: dict[str, typing.Any] = {}
    for path, value in settings.items():
        *sections, name = (f"{path}.name" if path in NAMED else path).split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree
