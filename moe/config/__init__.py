"""Settings of a run: typed schema, parsing from ConfigDict trees, and checks."""

from moe.config.checks import check_path, validate_mesh
from moe.config.layer_kinds import LayerKind, layer_kinds, sparse_layers
from moe.config.parse import check_field, to_config_dict, to_dict, type_name
from moe.config.schema import (
    EMBEDDED_DOMAINS,
    GATES_OWN,
    LARGEST,
    LARGEST_FLOAT,
    SCHEMES,
    Config,
    ConfigError,
    DataConfig,
    DistillConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    StartConfig,
    TrainConfig,
)

__all__ = [
    "EMBEDDED_DOMAINS",
    "GATES_OWN",
    "LARGEST",
    "LARGEST_FLOAT",
    "SCHEMES",
    "Config",
    "ConfigError",
    "DataConfig",
    "DistillConfig",
    "LayerKind",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "StartConfig",
    "TrainConfig",
    "check_field",
    "check_path",
    "layer_kinds",
    "sparse_layers",
    "to_config_dict",
    "to_dict",
    "type_name",
    "validate_mesh",
]
