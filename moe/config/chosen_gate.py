"""Config file that loads another one and chooses its gate: ``--config=FILE`` beside ``--config.model.moe.gate``.

ml_collections cannot set a section to a name, and the fields of the new gate must exist before they are set.
"""

from __future__ import annotations

import json
from typing import Any

import ml_collections

from moe.config import run_config
from moe.config.parse import check_gate_field
from moe.config.references import load_python_file


def request(path: str, gate: str | None, fields: list[str]) -> str:
    """Argument of ``--config`` that loads a file through this one.

    Args:
        path: of the config file, with its own argument.
        gate: name of the gate; None: the file's.
        fields: names of fields of the gate that are set afterwards.
    """
    return f"{__file__}:{json.dumps({'path': path, 'gate': gate, 'fields': fields})}"


def asked_for(config_file: str, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Path of the config file of a command line, and the fields that were set, the gate among them.

    Args:
        config_file: value of ``--config``, which may be a :func:`request`.
        fields: dotted name → value of the fields set by other flags.
    """
    path, _, argument = config_file.partition(":")
    if path != __file__:
        return config_file, dict(fields)
    content = json.loads(argument)
    gate = {"model.moe.gate": content["gate"]} if content["gate"] else {}
    return content["path"], gate | fields


def get_config(asked: str) -> ml_collections.ConfigDict:
    """The config of another file with the gate of a :func:`request`.

    Raises:
        ConfigError: no such gate, or one without these fields.
    """
    content = json.loads(asked)
    file, colon, argument = content["path"].partition(":")
    tree: Any
    if file == run_config.__file__:
        tree = run_config.get_config(argument, content["gate"])
    else:
        module = load_python_file(file)
        tree = module.get_config(argument) if colon else module.get_config()
        if content["gate"] is not None:
            tree.model.moe.gate = content["gate"]
    for name in content["fields"]:
        check_gate_field(tree.model.moe.gate, name)
    return tree
