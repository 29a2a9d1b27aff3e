"""Typed settings of a run: schema, parsing and checks."""

from moe.config import chosen_gate, run_config
from moe.config.inherit import inherit_model
from moe.config.model_section import (
    DeltaNetConfig,
    LayerKind,
    ModelConfig,
    RopeScalingConfig,
    layer_kinds,
    sparse_layers,
    stacks,
)
from moe.config.moe_section import Capacity, Losses, MoEConfig
from moe.config.parse import check_field, from_config_dict, to_config_dict, to_dict, type_name
from moe.config.references import (
    allow_modules,
    check_path,
    extend_import_path,
    load_python_file,
    open_regular,
    read_small_file,
)
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
from moe.fields import LARGEST, ConfigError

__all__ = [
    "EMBEDDED_DOMAINS",
    "LARGEST",
    "Capacity",
    "Config",
    "ConfigError",
    "DataConfig",
    "DeltaNetConfig",
    "DistillConfig",
    "LayerKind",
    "LoraConfig",
    "Losses",
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
    "check_field",
    "check_path",
    "chosen_gate",
    "extend_import_path",
    "from_config_dict",
    "inherit_model",
    "layer_kinds",
    "load_python_file",
    "open_regular",
    "read_small_file",
    "run_config",
    "sparse_layers",
    "stacks",
    "to_config_dict",
    "to_dict",
    "type_name",
    "validate_mesh",
]
