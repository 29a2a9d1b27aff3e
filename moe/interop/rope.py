"""Rotary positions of ``config.json``, both ways."""

from __future__ import annotations

from moe.config import ConfigError, ModelConfig, RopeScalingConfig
from moe.interop.schema import Json, OpenConfig, RopeParameters

#: Constants of YaRN, which have the same names in both configs.
_YARN = ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")
#: Constants of Llama 3's scaling, for which the library has no defaults.
_LLAMA3 = {"low_freq_factor", "high_freq_factor"}


def read_scaling(fields: OpenConfig) -> RopeScalingConfig:
    """The scaling of a file's rotary positions.

    Raises:
        ConfigError: the kind of scaling needs a field that is missing.
    """
    rope = fields.rope
    if rope.short_mscale is not None or rope.long_mscale is not None:
        raise ConfigError(
            f"config.json: short_mscale or long_mscale of rotary positions: must be absent for {fields.model_type}"
        )
    _check_growth(fields)
    if rope.rope_type == "default":
        return RopeScalingConfig()
    # In the library's order: stated beside the scaling, or in it, else the longest context.
    longest = fields.max_position_embeddings
    stated = fields.original_max_position_embeddings or rope.original_max_position_embeddings
    original = stated or longest
    # LongRoPE has a factor for each frequency, so its files may state neither length nor factor.
    ratio = longest / original if rope.rope_type == "longrope" or (stated and rope.rope_type == "yarn") else None
    factor = rope.factor or ratio
    if factor is None:
        raise ConfigError(f"config.json: rope_type={rope.rope_type!r}: needs factor")
    if rope.rope_type == "llama3" and not rope.model_fields_set >= _LLAMA3:
        raise ConfigError(f"config.json: rope_type='llama3': needs {' and '.join(sorted(_LLAMA3))}")
    length = {"linear": 0, "dynamic": longest}.get(rope.rope_type, original)
    return RopeScalingConfig(kind=rope.rope_type, factor=factor, original_length=length, **_constants(rope))


def _constants(rope: RopeParameters) -> Json:
    if rope.rope_type == "llama3":
        return {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.rope_type == "longrope":
        factors = {"short_factors": tuple(rope.short_factor or ()), "long_factors": tuple(rope.long_factor or ())}
        return factors | {"attention_factor": rope.attention_factor or 0.0}
    if rope.rope_type != "yarn":
        return {}
    constants = {name: getattr(rope, name) for name in _YARN if getattr(rope, name) is not None}
    return constants | {"query_growth": rope.llama_4_scaling_beta or 0.0}


def _check_growth(fields: OpenConfig) -> None:
    rope, kind = fields.rope, fields.model_type
    if not fields.grown_queries:
        if rope.llama_4_scaling_beta is not None:
            raise ConfigError(f"config.json: llama_4_scaling_beta: must be absent for {kind}")
        return
    if rope.rope_type != "yarn":
        raise ConfigError(f"config.json: rope_type={rope.rope_type!r}: must be 'yarn' for {kind}")
    for name in ("llama_4_scaling_beta", "original_max_position_embeddings"):
        if getattr(rope, name) is None:
            raise ConfigError(f"config.json: rotary positions: need {name} for {kind}")


def write_grown(model: ModelConfig) -> Json:
    """``rope_parameters`` of families whose queries grow with the position."""
    written = write_scaling(model)
    share = model.rope_dim / model.head_dim if model.rope_dim else 1.0
    result = written.get("rope_scaling", {}) | {"rope_theta": written["rope_theta"], "partial_rotary_factor": share}
    return result | {"llama_4_scaling_beta": model.rope_scaling.query_growth}


def write_scaling(model: ModelConfig) -> Json:
    """``rope_theta`` and, where positions are scaled, ``rope_scaling``."""
    scaling = model.rope_scaling
    if scaling.kind == "none":
        return {"rope_theta": model.rope_theta}
    result: Json = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "dynamic":  # scaled by the longest context itself
        return {
            "rope_theta": model.rope_theta,
            "rope_scaling": result,
            "max_position_embeddings": scaling.original_length,
        }
    if scaling.kind != "linear":
        result["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "longrope":
        result |= {"short_factor": list(scaling.short_factors), "long_factor": list(scaling.long_factors)}
        result |= {"attention_factor": scaling.attention_factor} if scaling.attention_factor else {}
    if scaling.kind == "llama3":
        result |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        unset = ("attention_factor", "mscale", "mscale_all_dim")
        result |= {name: getattr(scaling, name) for name in _YARN if getattr(scaling, name) or name not in unset}
    return {"rope_theta": model.rope_theta, "rope_scaling": result}
