"""Validated schema of a foreign ``config.json``: names, types and bounds of the fields that are read.

Both generations of the file are read: ``rope_theta`` and ``torch_dtype`` at the top level, or ``rope_parameters`` and
``dtype``. Unknown fields are ignored. A null counts as absent where a field has no meaning for null.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from moe.config.model_section import Activation
from moe.system import foreign_files
from moe.system.foreign_files import Json, check


def named(*names: str) -> Any:
    """Field that a file may give under several names, of which the first counts."""
    return pydantic.Field(validation_alias=pydantic.AliasChoices(*names))


def _refuse_true(value: bool) -> bool:
    if value:
        raise ValueError("must be false")
    return value


def _refuse_false(value: bool) -> bool:
    if not value:
        raise ValueError("must be true")
    return value


# Bounds far above every published model keep shapes within 64-bit arithmetic and loops over layers short.
Count = Annotated[int, pydantic.Field(ge=1, le=1 << 16)]
Size = Annotated[int, pydantic.Field(ge=1, le=1 << 24)]
OptionalCount = Annotated[int, pydantic.Field(ge=0, le=1 << 16)]
Layers = Annotated[int, pydantic.Field(ge=1, le=1024)]
Experts = Annotated[int, pydantic.Field(ge=1, le=4096)]
# E of the fields that the library also takes by a second name, the first being the one that it writes.
NumExperts = Annotated[Experts, named("num_experts", "num_local_experts")]
OptionalNumExperts = Annotated[int, pydantic.Field(ge=0, le=4096), named("num_experts", "num_local_experts")]
NumLocalExperts = Annotated[Experts, named("num_local_experts", "num_experts")]
RoutedExperts = Annotated[Count, named("n_routed_experts", "num_local_experts")]
Window = Annotated[int, pydantic.Field(ge=0, le=(1 << 31) - 1)] | None
Context = Annotated[int, pydantic.Field(ge=1, le=(1 << 31) - 1)]
Positive = Annotated[float, pydantic.Field(gt=0, le=1e30, allow_inf_nan=False)]
Coefficient = Annotated[float, pydantic.Field(ge=0, le=1e30, allow_inf_nan=False)]
Fraction = Annotated[float, pydantic.Field(ge=0, lt=1)]
Off = Annotated[bool, pydantic.AfterValidator(_refuse_true)]
On = Annotated[bool, pydantic.AfterValidator(_refuse_false)]
LayerNumbers = list[Annotated[int, pydantic.Field(ge=0, lt=1024)]]
Factors = Annotated[list[Positive], pydantic.Field(max_length=1 << 15)]
LayerTypes = list[Literal["sliding_attention", "full_attention", "linear_attention"]]
TokenIds = int | list[int] | None

#: Names of activations there → model.activation.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
    "gelu": "geglu_exact",
    "relu": "reglu",
}
HiddenAct = Literal["silu", "swish", "gelu_pytorch_tanh", "gelu_new", "gelu", "relu"]

#: Bound on experts times layers, several times that of the largest published model.
MOST_EXPERTS = 1 << 17


class Fields(foreign_files.Fields):
    """Base of all schemas: strict types, unknown fields ignored, null taken as absent where it is not a value."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        nullable = {name for name, field in cls.model_fields.items() if type(None) in _members(field.annotation)}
        return {name: value for name, value in tree.items() if value is not None or name in nullable}


class RopeParameters(Fields):
    """Rotary positions and their scaling; ``type`` is the older name of ``rope_type``."""

    model_config = pydantic.ConfigDict(extra="forbid")

    rope_type: Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"] = pydantic.Field(
        "default", validation_alias=pydantic.AliasChoices("rope_type", "type")
    )
    rope_theta: Positive | None = None
    partial_rotary_factor: Positive = 1.0
    alpha: Positive | None = None
    mrope_section: list[int] | None = None  # of images and video; all tokens of a text have one position
    mrope_interleaved: bool | None = None
    factor: Annotated[float, pydantic.Field(ge=1, le=1e6)] | None = None
    original_max_position_embeddings: Context | None = None
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: Annotated[bool | None, pydantic.AfterValidator(bool)] = True  # null is false, as in the library
    attention_factor: Positive | None = None
    mscale: Coefficient | None = None
    mscale_all_dim: Coefficient | None = None
    short_factor: Factors | None = None
    long_factor: Factors | None = None
    short_mscale: Positive | None = None  # this and the next one: only Phi-3.5-MoE
    long_mscale: Positive | None = None
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    llama_4_scaling_beta: Coefficient | None = None  # only Mistral 4 and Ministral 3
    max_position_embeddings: Context | None = None  # in files of Mistral 4; unused
    finetuned: bool | None = None  # in files of YaRN's authors; unused

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_second_type(cls, tree: Any) -> Any:
        """Drop ``type`` where ``rope_type`` says the same."""
        if isinstance(tree, dict) and "type" in tree and tree.get("rope_type") == tree["type"]:
            return {name: value for name, value in tree.items() if name != "type"}
        return tree


class OpenConfig(Fields):
    """Fields that every decoder family has; a family adds its own (:mod:`moe.interop.families`)."""

    #: Kinds of layers that the family computes.
    kinds: ClassVar[tuple[str, ...]] = ("sliding_attention", "full_attention")
    #: Whether queries grow with the position.
    grown_queries: ClassVar[bool] = False

    model_type: str
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    hidden_act: HiddenAct = "silu"
    max_position_embeddings: Context = 2048
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 10_000.0
    rope_parameters: RopeParameters | None = None
    rope_scaling: RopeParameters | None = None
    partial_rotary_factor: Positive = 1.0
    original_max_position_embeddings: Context | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    is_causal: On = True
    per_layer_config: Annotated[dict[str, Any], pydantic.Field(max_length=0)] | None = None  # settings of single layers
    layer_types: LayerTypes | None = None
    num_nextn_predict_layers: OptionalCount = 0
    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None
    pad_token_id: TokenIds = None

    # Of MoE families; a dense family leaves them out.
    num_experts_per_tok: Count = 2
    router_aux_loss_coef: Coefficient = 0.001
    norm_topk_prob: bool = False

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_empty_scaling(cls, tree: Any) -> Any:
        """Treat an empty ``rope_scaling`` as absent, as the library does."""
        if isinstance(tree, dict) and tree.get("rope_scaling") in (None, {}):
            return {name: value for name, value in tree.items() if name != "rope_scaling"}
        return tree

    @pydantic.model_validator(mode="after")
    def _check_layer_types(self) -> OpenConfig:
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries, must be {self.num_hidden_layers}")
        if other := set(self.layer_types or ()) - set(self.kinds):
            raise ValueError(f"layer_types has {min(other)!r}, must be of {', '.join(self.kinds)}")
        return self

    @property
    def dim_of_head(self) -> int:
        """H; without ``head_dim`` D over the number of heads."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope(self) -> RopeParameters:
        """Rotary positions, from the older field or the newer one, in the library's order; ``rope_theta`` is set."""
        given = self.rope_scaling if "rope_scaling" in self.model_fields_set else None
        rope = given or self.rope_parameters or self.rope_scaling or RopeParameters.model_validate({})
        theta = rope.rope_theta or self.rope_theta
        own_factor = "partial_rotary_factor" in rope.model_fields_set
        factor = rope.partial_rotary_factor if own_factor else self.partial_rotary_factor
        return rope.model_copy(update={"rope_theta": theta, "partial_rotary_factor": factor})


def parse(schema: type[OpenConfig], source: Json) -> Any:
    """The typed fields of a ``config.json``.

    Raises:
        ConfigError: one sentence that names the first wrong field.
    """
    return check(source, pydantic.TypeAdapter(schema), "config.json")


def _members(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__args__", ())


_FileName = Annotated[str, pydantic.Field(pattern=r"^[^/\\\x00.][^/\\\x00]*\.safetensors$")]


class _Index(Fields):
    weight_map: dict[str, _FileName]


_INDEX = pydantic.TypeAdapter(_Index)


def parse_index(source: Json, path: Path) -> dict[str, str]:
    """The ``weight_map`` of an index: tensor → name of a file beside it.

    Raises:
        ConfigError: no such map, or a file name that leaves the folder or is not a safetensors file.
    """
    return check(source, _INDEX, str(path)).weight_map
