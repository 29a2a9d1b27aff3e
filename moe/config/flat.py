"""Reader of the flat form of ``model.moe``: one level of fields; -1 and "gate" mean the constant of the gate's paper.

Runs of version 0.2 and earlier wrote it to their ``config.json``; it is read only in configs of whole runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping
from typing import Any

from moe.config.registry import find_layer
from moe.routing.interface import Gate
from moe.system.fields import ConfigError, check_type

#: Flat fields, and where their values are now.
PLACES: Mapping[str, str] = types.MappingProxyType(
    {
        "experts_per_token": "gate.k",
        "score_function": "gate.score",
        "renormalise": "gate.renormalise",
        "routing_scale": "gate.scale",
        "bias_update": "gate.bias",
        "bias_update_rate": "gate.bias_rate",
        "expert_groups": "gate.groups",
        "kept_expert_groups": "gate.kept_groups",
        "scores_per_group": "gate.scores_per_group",
        "slots_per_expert": "gate.slots",
        "capacity_factor": "capacity.train",
        "eval_capacity_factor": "capacity.eval",
        "expert_capacity": "capacity.fixed",
        "load_balancing_weight": "losses.balance",
        "z_loss_weight": "losses.z",
        "importance_weight": "losses.importance",
        "load_weight": "losses.load",
        "device_balance_weight": "losses.device",
        "balance_scope": "losses.scope",
        "null_balance": "losses.null",
    }
)

_RATES = ("bias_rate", "penalty_rate", "threshold_rate")
_PLAIN: Mapping[str, Any] = types.MappingProxyType(
    {"score_function": "softmax", "renormalise": False, "routing_scale": 1.0, "slots_per_expert": 1}
)


def is_flat(moe: Mapping[str, Any]) -> bool:
    """Whether a section has fields of the flat form."""
    return any(name in PLACES for name in moe)


def present(config: dict[str, Any]) -> dict[str, Any]:
    """The sections of a run's config, with ``model.moe`` in the present form.

    Raises:
        ConfigError: see :func:`nested`.
    """
    model = config.get("model")
    moe = model.get("moe") if isinstance(model, dict) else None
    if isinstance(model, dict) and isinstance(moe, dict) and is_flat(moe):
        return config | {"model": model | {"moe": nested(moe)}}
    return config


def nested(moe: Mapping[str, Any]) -> dict[str, Any]:
    """A section in the flat form, complete or not, as sections of its gate, capacity and losses.

    Raises:
        ConfigError: an unknown gate, or a value that the gate does not read.
    """
    name = check_type(str, moe.get("gate", "mixtral"), "model.moe.gate")
    values = {field: value for field, value in moe.items() if not _is_default(field, value)}
    result: dict[str, Any] = {field: value for field, value in values.items() if field not in PLACES}
    sections: dict[str, dict[str, Any]] = {"gate": {}, "capacity": {}, "losses": {}}
    for section in ("capacity", "losses"):
        sections[section].update(check_type(dict, moe.get(section, {}), f"model.moe.{section}"))
    for field, place in PLACES.items():
        section, _, own = place.partition(".")
        if field in values:
            sections[section][own] = values[field]
    gate = None if name == "none" else find_layer(name).gate
    fields = {} if gate is None else _gate_fields(gate, sections["gate"], moe)
    return result | {"gate": {"name": name, **fields}} | {key: sections[key] for key in ("capacity", "losses")}


def _is_default(field: str, value: Any) -> bool:
    others = ("zero_experts", "copy_experts", "constant_experts", "jitter", "drop_policy")
    return (field in PLACES or field in others) and value in (-1, "gate")


def _gate_fields(gate: Gate, values: dict[str, Any], moe: Mapping[str, Any]) -> dict[str, Any]:
    """The values of fields that the gate has; other values must equal what the gate does without them."""
    own = {field.name for field in dataclasses.fields(gate)}
    groups = check_type(int, values.get("groups", 1), "model.moe.expert_groups")
    if groups > 1 and "kept_groups" not in values and getattr(gate, "kept_groups", 1) == 1:
        values["kept_groups"] = groups
    if groups == 1 and "groups" in values and "scores_per_group" in own:
        values["scores_per_group"] = 1  # not used with one group
    if values.get("renormalise") in (0, 1):
        values["renormalise"] = bool(values["renormalise"])
    if "bias_rate" in values and "bias_rate" not in own:
        values[next((rate for rate in _RATES if rate in own), "bias_rate")] = values.pop("bias_rate")
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in own:
            found[name] = value
            continue
        field = next(flat for flat, place in PLACES.items() if place == f"gate.{name}")
        if not _is_neutral(field, value, gate, moe):
            raise ConfigError(f"model.moe.{field}={value!r}: the gate {gate.name!r} does not read it")
    return found


def _is_neutral(field: str, value: Any, gate: Gate, moe: Mapping[str, Any]) -> bool:
    if field in _PLAIN:
        return value == _PLAIN[field]
    if field == "experts_per_token":
        return value == gate.experts_per_token(moe.get("num_experts", 8))
    if field == "bias_update":
        return value == (gate.balancing.name if gate.balancing else "none")
    if field == "bias_update_rate":
        return value == getattr(gate.balancing, "rate", 0.0)
    return value == 1 or moe.get("device_balance_weight", 0) in (0, -1)  # groups of experts


def place_of(name: str) -> str:
    """Present path of a flat field, or of the one with the most similar name; empty if none is similar."""
    near = difflib.get_close_matches(name, PLACES, n=1, cutoff=0.8)
    return PLACES[near[0]] if near else ""
