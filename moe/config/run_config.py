"""Config file that reads the ``config.json`` of a run: what ``--config=DIR/config.json`` loads."""

from __future__ import annotations

import json
from typing import Any

import ml_collections

from moe.config.parse import assign_changes, build, to_config_dict
from moe.config.references import code_fields, read_small_file, refuse_modules
from moe.config.schema import Config
from moe.fields import ConfigError


def get_config(path: str, gate: str | None = None) -> ml_collections.ConfigDict:
    """The settings of a run, all of them assigned: nothing is inherited from ``start.checkpoint`` a second time.

    Args:
        path: of the file.
        gate: replaces the run's gate, with the constants of its paper; settings in which the run differed from the
            constants of its old gate are kept.

    Raises:
        ConfigError: the file is missing or is not the config of a run.
    """
    content = read_small_file(path)
    try:
        tree = json.loads(content)
        refuse_modules(code_fields(tree), f"{path}: ")
        config = build(Config, tree, "")
    except (ValueError, RecursionError, AttributeError, TypeError) as error:  # not text, not JSON, or not a config
        raise ConfigError(f"{path}: not the config of a run ({error})") from error
    tree: Any = to_config_dict(config)
    if gate is not None:
        assign_changes(tree.model.moe)
        tree.model.moe.gate = gate
    _assign_all(tree)
    return tree


def _assign_all(tree: ml_collections.ConfigDict) -> None:
    for name, value in tree.items():
        if isinstance(value, ml_collections.ConfigDict):
            _assign_all(value)
        else:
            tree[name] = value
