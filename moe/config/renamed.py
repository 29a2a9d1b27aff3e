"""Settings of the version before that have another name now; configs may use them for one version."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from moe.config import pattern
from moe.system.fields import ConfigError, check_type

#: Former setting → (its type, the setting that replaces it).
RENAMED: Mapping[str, tuple[Any, str]] = types.MappingProxyType(
    {
        "model.sliding_window_layers": (tuple[int, ...], "model.pattern"),
        "model.mixer_layers": (tuple[int, ...], "model.pattern"),
        "model.delta_net.layers": (tuple[int, ...], "model.pattern"),
    }
)


def present(model: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Section ``model`` with the present names: the layers that three settings listed become a pattern.

    Args:
        model: its fields, or some of them.
        num_layers: L, where the section does not have it.

    Raises:
        ConfigError: layers that do not exist or have two mixers, or a pattern beside former settings.
    """
    delta_net = model.get("delta_net")
    former = {name: model[name] for name in ("sliding_window_layers", "mixer_layers") if name in model}
    if isinstance(delta_net, dict) and "layers" in delta_net:
        former["delta_net.layers"] = delta_net["layers"]
        model = model | {"delta_net": {name: value for name, value in delta_net.items() if name != "layers"}}
    model = {name: value for name, value in model.items() if name not in former}
    lists = {name: check_type(tuple[int, ...], value, f"model.{name}") for name, value in former.items()}
    lists = {name: layers for name, layers in lists.items() if layers}
    if not lists:
        return model
    if model.get("pattern"):
        name = next(iter(lists))
        raise ConfigError(f"model.pattern={model['pattern']!r}: replaces model.{name}; set only the pattern")
    count = check_type(int, model.get("num_layers", num_layers), "model.num_layers")
    for name, layers in lists.items():
        if list(layers) != sorted({*layers} & {*range(count)}):
            allowed = f"must be increasing layer numbers from 0 to {count - 1}"
            raise ConfigError(f"model.{name}={layers!r}: {allowed} (renamed to model.pattern)")
    return model | {"pattern": _pattern(lists, count, model)}


def _pattern(lists: dict[str, tuple[int, ...]], count: int, model: dict[str, Any]) -> str:
    delta = lists.get("delta_net.layers", ())
    has_mixer = model.get("mixer") not in (None, "none", {"name": None}, {"name": "none"})
    of_mixer = lists.get("mixer_layers", tuple(range(count)) if has_mixer else ())
    windowed = lists.get("sliding_window_layers", tuple(range(count)) if model.get("sliding_window") else ())
    for one, other in (
        ("delta_net.layers", "sliding_window_layers"),
        ("mixer_layers", "delta_net.layers"),
        ("mixer_layers", "sliding_window_layers"),
    ):
        if both := {*lists.get(one, ())} & {*lists.get(other, ())}:
            raise ConfigError(f"model.{one}={lists[one]!r}: must list none of model.{other}, as layer {min(both)} is")
    words: list[pattern.Word] = []
    for layer in range(count):
        if layer in delta:
            words.append("delta")
        elif layer in of_mixer:
            words.append("mixer")
        else:
            words.append("sliding" if layer in windowed else "attention")
    return pattern.write(words)
