"""Typed settings of a run: schema, parsing and checks."""

from moe.config import chosen_gate, run_config
from moe.config.checks import check_path
from moe.config.files import extend_import_path, load_python_file, read_small_file
from moe.config.inherit import inherit_model
from moe.config.layer_pattern import LayerKind, layer_kinds, sparse_layers, stacks
from moe.config.mesh_checks import validate_mesh
from moe.config.moe_section import Capacity, DropPolicy, Losses, MoEConfig
from moe.config.parse import check_field, to_config_dict, to_dict, type_name
from moe.config.references import allow_modules
from moe.config.schema import (
    EMBEDDED_DOMAINS,
    SCHEMES,
    Config,
    DataConfig,
    DistillConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PreferencesConfig,
    RopeScalingConfig,
    StartConfig,
    TrainConfig,
)
from moe.fields import LARGEST, LARGEST_FLOAT, ConfigError

__all__ = [
    "EMBEDDED_DOMAINS",
    "LARGEST",
    "LARGEST_FLOAT",
    "SCHEMES",
    "Capacity",
    "Config",
    "ConfigError",
    "DataConfig",
    "DistillConfig",
    "DropPolicy",
    "LayerKind",
    "LoraConfig",
    "Losses",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PreferencesConfig",
    "RopeScalingConfig",
    "StartConfig",
    "TrainConfig",
    "allow_modules",
    "check_field",
    "check_path",
    "chosen_gate",
    "extend_import_path",
    "inherit_model",
    "layer_kinds",
    "load_python_file",
    "read_small_file",
    "run_config",
    "sparse_layers",
    "stacks",
    "to_config_dict",
    "to_dict",
    "type_name",
    "validate_mesh",
]
