"""Rows of a family's table: a field of ``config.json`` and the setting that it states.

The schema of the file, reading and writing follow from the rows (:class:`moe.interop.families.family.Family`).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

from moe.config import ModelConfig, MoEConfig
from moe.interop.schema import Json
from moe.routing.gates import GShard, TopK

_GATE = "moe.gate."
#: Result of ``Row.there`` for a model of which the field is not written.
ABSENT = object()


@dataclasses.dataclass(frozen=True)
class Row:
    """A field of ``config.json`` and the setting that it states.

    Attributes:
        theirs: name of the field; empty: no field states the setting.
        ours: path of the setting below ``model.``; empty: no setting, or the rows of other fields read this one.
        type: of the field in the schema; None: the family's base schema has the field.
        default: of the field, that of the library; ``...``: the field must be there.
        names: value of the field → value of the setting. A setting with another value is written as the first one, and
            the export then says that the family lacks the setting.
        here: all fields → the setting; None as the result leaves the setting at its default.
        there: model → the field; needed where the field is not the setting or a name of it.
    """

    theirs: str
    ours: str = ""
    type: Any = None
    default: Any = ...
    names: Mapping[Any, Any] = dataclasses.field(default_factory=dict)
    here: Callable[[Any], Any] | None = None
    there: Callable[[ModelConfig], Any] | None = None

    def read(self, source: Any) -> Json:
        """The setting by its path; empty if the row has none, or if it keeps its default."""
        if not self.ours or not (self.theirs or self.here):
            return {}
        value = self.here(source) if self.here else getattr(source, self.theirs)
        value = self.names[value] if self.names else value
        return {} if value is None else {self.ours: value}

    def write(self, model: ModelConfig) -> Json:
        """The field by its name; empty if the row writes none."""
        if not self.theirs or not (self.ours or self.there):
            return {}
        value = self.there(model) if self.there else setting_of(model, self.ours)
        if value is ABSENT:
            return {}
        if self.names and not self.there:
            value = next((name for name, named in self.names.items() if named == value), next(iter(self.names)))
        return {self.theirs: value}


def always(ours: str, value: Any) -> Row:
    """A setting that all models of the family have."""
    return Row("", ours, here=lambda _: value)


def constant(theirs: str, type_: Any, value: Any) -> Row:
    """A field with one value, which is written too."""
    return Row(theirs, type=type_, default=value, there=lambda _: value)


def setting_of(model: ModelConfig, path: str) -> Any:
    """A setting by its path below ``model.``; a gate without the field has the default of top-k gates."""
    if path.startswith(_GATE):
        return gate_field(model.moe, path.removeprefix(_GATE))
    return operator.attrgetter(path)(model)


def gate_field(moe: MoEConfig, name: str) -> Any:
    """A field of a top-k gate; its default for a gate without it."""
    return getattr(moe.gate, name, getattr(TopK(), name))


def selection_rule(moe: MoEConfig) -> bool | str:
    """``norm_topk_prob``, for softmax top-k; the gate's name if its rule is another."""
    limited = gate_field(moe, "kept_groups") < gate_field(moe, "groups") or gate_field(moe, "scale") != 1.0
    plain = gate_field(moe, "score") == "softmax" and gate_field(moe, "bias") == "none" and not limited
    standard = plain and type(moe.gate) in (TopK, GShard)
    return gate_field(moe, "renormalise") if standard else moe.gate_name


def nested(settings: Json) -> Json:
    """A nested dict of settings by their paths; a later path replaces what earlier ones stated below it."""
    result: Json = {}
    for path, value in settings.items():
        *sections, name = path.split(".")
        section = result
        for each in sections:
            section = section.setdefault(each, {})
        section[name] = dict(value) if isinstance(value, dict) else value
    return result
