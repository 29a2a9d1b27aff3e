"""Mixture-of-Experts language models in JAX and Flax NNX, sharded by annotation.

docs/api.md describes the public names. They are imported when first used: ``import moe`` alone does not import JAX.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe.config import Capacity, Config, ConfigError, Losses, ModelConfig, MoEConfig
    from moe.config.mixers import Mixer
    from moe.config.registry import find_layer
    from moe.interop import load_huggingface, save_huggingface
    from moe.layers.mixers.interface import MixerLayer
    from moe.layers.moe_layer import MoELayer
    from moe.layers.soft_moe import SoftMoE
    from moe.models.decoder import Transformer
    from moe.models.encoder_decoder import EncoderDecoder
    from moe.objectives.text import NextToken
    from moe.parallel.mesh import mesh_roles
    from moe.routing.interface import Gate, GateInputs, GateOutput
    from moe.routing.routing import Routing
    from moe.system.fields import setting
    from moe.training.train import train

__all__ = [
    "Capacity",
    "Config",
    "ConfigError",
    "EncoderDecoder",
    "Gate",
    "GateInputs",
    "GateOutput",
    "Losses",
    "Mixer",
    "MixerLayer",
    "MoEConfig",
    "MoELayer",
    "ModelConfig",
    "NextToken",
    "Routing",
    "SoftMoE",
    "Transformer",
    "find_layer",
    "load_huggingface",
    "mesh_roles",
    "save_huggingface",
    "setting",
    "train",
]

_MODULES = {
    "Capacity": "moe.config",
    "Config": "moe.config",
    "ConfigError": "moe.config",
    "EncoderDecoder": "moe.models.encoder_decoder",
    "Gate": "moe.routing.interface",
    "GateInputs": "moe.routing.interface",
    "GateOutput": "moe.routing.interface",
    "Losses": "moe.config",
    "Mixer": "moe.config.mixers",
    "MixerLayer": "moe.layers.mixers.interface",
    "MoEConfig": "moe.config",
    "MoELayer": "moe.layers.moe_layer",
    "ModelConfig": "moe.config",
    "NextToken": "moe.objectives.text",
    "Routing": "moe.routing.routing",
    "SoftMoE": "moe.layers.soft_moe",
    "Transformer": "moe.models.decoder",
    "find_layer": "moe.config.registry",
    "load_huggingface": "moe.interop",
    "mesh_roles": "moe.parallel.mesh",
    "save_huggingface": "moe.interop",
    "setting": "moe.system.fields",
    "train": "moe.training.train",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("moe-jax")
    if name not in _MODULES:
        raise AttributeError(f"module 'moe' has no attribute {name!r}; its public names are {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
