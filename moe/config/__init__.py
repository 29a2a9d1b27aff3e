"""Typed settings of a run: schema, parsing and checks."""

from moe.config import command_line
from moe.config.changes import Changes, changes_of
from moe.config.command_line import build_layers
from moe.config.files import inherited, read_run
from moe.config.layer_kinds import LayerKind, layer_kinds, stacks
from moe.config.memory_section import MemoryConfig
from moe.config.model_section import DeltaNetConfig, ModelConfig, sparse_layers
from moe.config.moe_section import Capacity, Losses, MoEConfig
from moe.config.names import check_field
from moe.config.parse import from_config_dict, to_dict
from moe.config.references import (
    allow_modules,
    check_path,
    extend_import_path,
    load_python_file,
)
from moe.config.rope_section import RopeScalingConfig
from moe.config.run_sections import (
    EMBEDDED_DOMAINS,
    DataConfig,
    DistillConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    PolicyConfig,
    PreferencesConfig,
    StartConfig,
    TrainConfig,
)
from moe.config.schema import Config, validate_mesh
from moe.system.fields import LARGEST, ConfigError

#: Name of :func:`changes_of` in config files of earlier versions.
to_config_dict = changes_of

__all__ = [
    "EMBEDDED_DOMAINS",
    "LARGEST",
    "Capacity",
    "Changes",
    "Config",
    "ConfigError",
    "DataConfig",
    "DeltaNetConfig",
    "DistillConfig",
    "LayerKind",
    "LoraConfig",
    "Losses",
    "MemoryConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "PreferencesConfig",
    "RopeScalingConfig",
    "StartConfig",
    "TrainConfig",
    "allow_modules",
    "build_layers",
    "changes_of",
    "check_field",
    "check_path",
    "command_line",
    "extend_import_path",
    "from_config_dict",
    "inherited",
    "layer_kinds",
    "load_python_file",
    "read_run",
    "sparse_layers",
    "stacks",
    "to_config_dict",
    "to_dict",
    "validate_mesh",
]
