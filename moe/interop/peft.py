"""Low-rank adapters without their base model, in PEFT's layout: ``adapter_config.json`` and safetensors.

PEFT adds alpha / r · B A to the weight [outputs, inputs] of a linear module, with A [r, inputs] and B [outputs, r]. So
an adapter can be expressed if its matrix is a separate tensor in the family's layout, as each expert's is in the layout
with three tensors for each expert.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from moe.checkpoints.parameters import read_adapters
from moe.checkpoints.workdir import read_config
from moe.config import Config, ConfigError
from moe.interop.families import FAMILIES
from moe.interop.layout import Parameter, layout
from moe.interop.load import ADAPTER_FILE
from moe.interop.workdirs import open_source
from moe.models.adapters import LORA_A, LORA_B, LORA_COMMON_A
from moe.system.atomic_files import new_folder, write_atomic

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def export_adapters(
    workdir: str | os.PathLike[str], directory: str | os.PathLike[str], *, model_type: str = ""
) -> None:
    """Write the adapters of the newest checkpoint of a run; an A that experts share is written once for each.

    Args:
        workdir: of a run with ``lora.rank``.
        directory: must be new or empty.
        model_type: family whose names are used; empty: the import's, else the first that can express the model.

    Raises:
        ConfigError: the run has no adapters, trains whole parts beside them, or adapts a matrix that shares its tensor
            with others; or see :func:`moe.interop.workdirs.open_source`.
    """
    config = read_config(workdir)
    if not config.lora.rank:
        raise ConfigError(f"{workdir}: trains no adapters (lora.rank); export it without adapters=True")
    if config.lora.trained:
        raise ConfigError(f"lora.trained={config.lora.trained}: cannot be part of an adapter; export the merged model")
    _, source, written = open_source(workdir, config, model_type)
    adapters = read_adapters(workdir, config)
    tensors: dict[str, np.ndarray] = {}
    for parameter in layout(config.model, FAMILIES[written["model_type"]]):
        node: Any = adapters
        for name in parameter.path:
            node = node.get(name) if isinstance(node, dict) else None
        if node is not None:
            tensors |= _factors(parameter, node)
    with new_folder(epath.Path(directory)):
        write_atomic(Path(directory) / WEIGHTS_FILE, safetensors.numpy.save(tensors, {"format": "pt"}))
        content = _config(config, tensors, (source or {}).get("_name_or_path"))
        write_atomic(Path(directory) / ADAPTER_FILE, json.dumps(content, indent=2) + "\n")


def _factors(parameter: Parameter, node: dict[str, Any]) -> dict[str, np.ndarray]:
    """A and B of every piece of a parameter, by PEFT's names."""
    if parameter.tensor.shared or parameter.pieces[0].expert is not None:
        raise ConfigError(
            f"{parameter.pieces[0].name}: holds several adapted matrices, which PEFT cannot tell apart; export "
            "the merged model, or leave their part out of lora.parts"
        )
    common = LORA_COMMON_A in node
    a, b = (np.asarray(node[name]) for name in (LORA_COMMON_A if common else LORA_A, LORA_B))
    rank, found = a.shape[-1], {}
    for piece in parameter.pieces:
        module = _PREFIX + piece.name.removesuffix(".weight")
        slot = piece.slot[:-1] if common else piece.slot  # without the expert
        found[f"{module}.lora_A.weight"] = np.ascontiguousarray(a[slot].reshape(-1, rank).T)
        found[f"{module}.lora_B.weight"] = np.ascontiguousarray(b[piece.slot].reshape(rank, -1).T)
    return found


def _config(config: Config, tensors: dict[str, np.ndarray], base: str | None) -> dict[str, Any]:
    modules = sorted({name.removeprefix(_PREFIX).partition(".lora_")[0] for name in tensors})
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if config.model.encoder_layers else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
    }
