"""Rows that several families share: biases, rotation, windows, experts, gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from moe.config import ConfigError, ModelConfig, layer_kinds, pattern, sparse_layers
from moe.interop.families.rows import Row, always, selection_rule
from moe.interop.rope import write_grown
from moe.interop.schema import (
    Count,
    Fraction,
    OpenConfig,
    OptionalCount,
    Positive,
    RopeParameters,
    RoutedExperts,
    Size,
    Window,
    named,
)

#: Boolean whose null the library reads as false, not as the default.
NullIsFalse = Annotated[bool | None, pydantic.AfterValidator(bool)]

# --- Attention -------------------------------------------------------------------------------------------------------
#: The biases include that of the output.
ALL_BIASES = Row("attention_bias", "attention_bias", names={False: "none", True: "all"})
PARTIAL_ROTATION = Row(
    "partial_rotary_factor",
    "rope_dim",
    here=lambda file: int(file.dim_of_head * file.rope.partial_rotary_factor),
    there=lambda m: (m.rope_dim or m.head_dim) / m.head_dim,
)


class GrownQueries(OpenConfig):
    """Fields of ``config.json`` of families whose queries grow with the position."""

    grown_queries: ClassVar[bool] = True


#: Their rotary positions, with the growth among them, and the fields in whose place they stand.
GROWN_ROTATION = Row("rope_parameters", there=write_grown)
NOT_BESIDE_GROWN = ("rope_scaling", "rope_theta")


def grown_rotation(theta: float, factor: float, original: int) -> RopeParameters:
    """Rotary positions that the library takes for a file of these families that states none."""
    return RopeParameters.model_validate(
        {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": original,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    )


#: Multi-token prediction, which the reader of tensors sets where a file holds its layers.
PREDICTION = Row("num_nextn_predict_layers", type=OptionalCount, default=0, there=lambda m: m.prediction_layers)


def window(file: Any) -> int:
    """``sliding_window``; 0 for null, or where a file turns it off."""
    return (file.sliding_window or 0) if getattr(file, "use_sliding_window", True) else 0


def window_of(model: ModelConfig) -> int:
    """The largest window of all layers; if a family cannot express the others, write_config reports what is lost."""
    return max(kind.window for kind in layer_kinds(model))


def window_kinds(model: ModelConfig) -> list[str]:
    """``layer_types`` of a model with attention in all layers."""
    return ["sliding_attention" if kind.window else "full_attention" for kind in layer_kinds(model)]


#: One window for all layers.
WINDOW = Row("sliding_window", "sliding_window", Window, None, here=window, there=lambda m: window_of(m) or None)
USE_WINDOW = Row("use_sliding_window", type=bool, default=False, there=lambda m: window_of(m) > 0)
#: First layer with a window, in files without ``layer_types``.
MAX_WINDOW_LAYERS = Row("max_window_layers", type=OptionalCount, default=28)


def windowed_layers(file: Any, has_window: Callable[[int, Any], bool]) -> list[int]:
    """Numbers of the layers with a window; ``has_window`` tells those of files without ``layer_types``."""
    numbers = range(file.num_hidden_layers)
    if not window(file):
        return []
    if file.layer_types:
        return [layer for layer in numbers if file.layer_types[layer] == "sliding_attention"]
    return [layer for layer in numbers if has_window(layer, file)]


def window_size(has_window: Callable[[int, Any], bool]) -> Row:
    """``sliding_window`` of files some of whose layers may have one (:func:`windowed_layers`)."""
    return Row(
        "sliding_window",
        "sliding_window",
        Window,
        4096,
        here=lambda file: window(file) if windowed_layers(file, has_window) else 0,
        there=lambda m: window_of(m) or None,
    )


def windows(
    has_window: Callable[[int, Any], bool], write_kinds: Callable[[ModelConfig], Any] = window_kinds
) -> tuple[Row, Row]:
    """``sliding_window`` and ``layer_types``; ``has_window`` tells the layers of files without the second field."""

    def words(file: Any) -> str | None:
        windowed, numbers = {*windowed_layers(file, has_window)}, range(file.num_hidden_layers)
        if len(windowed) in (0, len(numbers)):
            return None
        return pattern.write(["sliding" if layer in windowed else "attention" for layer in numbers])

    return window_size(has_window), Row("layer_types", "pattern", here=words, there=write_kinds)


def rotated_windows(alone: Callable[[Any], bool]) -> Row:
    """Rotary positions in the layers with windows alone, where ``alone`` says so of a file's fields."""
    return Row("", "rotated_layers", here=lambda file: "sliding" if alone(file) else None)


UPPER_WINDOWS = (*windows(lambda layer, file: layer >= file.max_window_layers), MAX_WINDOW_LAYERS)

# --- Experts ---------------------------------------------------------------------------------------------------------
#: Hidden size of experts in families all of whose layers are MoE.
EXPERT_SIZE = Row("intermediate_size", there=lambda m: m.moe.d_ff)
JITTER = Row("router_jitter_noise", "moe.jitter", Fraction, 0.0)


def some_layers(layers: Sequence[int], file: Any) -> tuple[int, ...] | None:
    """``moe.layers`` for the numbers of the MoE layers; None, the setting's default, where all are."""
    return None if len(layers) == file.num_hidden_layers else tuple(layers)


def first_sparse(model: ModelConfig) -> int:
    """Number of the first MoE layer; that of all layers if none is."""
    sparse = sparse_layers(model)
    return sparse.index(True) if any(sparse) else model.num_layers


def shared_experts(model: ModelConfig) -> int:
    """Number of shared experts of the others' hidden size."""
    return model.moe.shared_d_ff // model.moe.d_ff


def shared_size(theirs: str, default: int) -> Row:
    """A number of shared experts of the others' hidden size."""
    return Row(
        theirs,
        "moe.shared_d_ff",
        OptionalCount,
        default,
        here=lambda file: file.moe_intermediate_size * getattr(file, theirs),
        there=shared_experts,
    )


#: Sizes of DeepSeek's experts, some of them shared.
SHARED_AND_ROUTED = (
    Row("n_routed_experts", "moe.num_experts", RoutedExperts),
    Row("moe_intermediate_size", "moe.d_ff", Size),
    shared_size("n_shared_experts", 0),
)


def leading_dense(theirs: str, default: int) -> Row:
    """A number of dense layers, after which all are MoE layers."""
    return Row(
        theirs,
        "moe.layers",
        OptionalCount,
        default,
        here=lambda file: some_layers(range(getattr(file, theirs), file.num_hidden_layers), file),
        there=first_sparse,
    )


LEADING_DENSE = leading_dense("first_k_dense_replace", 0)


def listed_layers(dense: Callable[[Any], int]) -> Row:
    """``mlp_layer_types``; without it, dense layers come first, whose number ``dense`` returns."""

    def layers(file: Any) -> tuple[int, ...] | None:
        kinds, num_layers = file.mlp_layer_types, file.num_hidden_layers
        if kinds is None:
            return some_layers(range(dense(file), num_layers), file)
        if len(kinds) != num_layers:
            raise ConfigError(f"config.json: mlp_layer_types has {len(kinds)} entries, not {num_layers}")
        return some_layers([layer for layer, kind in enumerate(kinds) if kind == "sparse"], file)

    def kinds(model: ModelConfig) -> list[str]:
        return ["sparse" if sparse else "dense" for sparse in sparse_layers(model)]

    type_ = list[Literal["dense", "sparse"]] | None
    return Row("mlp_layer_types", "moe.layers", type_, None, here=layers, there=kinds)


# --- Gates -----------------------------------------------------------------------------------------------------------
#: Softmax top-k, whose weights are divided by their sum or not.
SOFTMAX_GATE = Row(
    "norm_topk_prob",
    "moe.gate.name",
    names={False: "switch", True: "mixtral"},
    there=lambda m: selection_rule(m.moe) is True,
)
#: Groups of experts, and the scale of the weights, of gates like DeepSeek-V3's.
GROUPS_AND_SCALE = (
    Row("n_group", "moe.gate.groups", Count, 1),
    Row("topk_group", "moe.gate.kept_groups", Count, 1),
    Row("", "moe.gate.scores_per_group", here=lambda file: 2 if file.n_group > 1 else 1),
    Row("norm_topk_prob", "moe.gate.renormalise"),
    Row("routed_scaling_factor", "moe.gate.scale", Positive, 1.0),
)
#: DeepSeek-V3's gate.
SIGMOID_GATE = (always("moe.gate.name", "deepseek_v3"), *GROUPS_AND_SCALE)
#: The same gate without groups and scale.
PLAIN_GATE = {"name": "deepseek_v3", "groups": 1, "kept_groups": 1, "scores_per_group": 1, "scale": 1.0}
#: Balance of each sequence, or of the batch.
SEQUENCE_LOSS = Row("seq_aux", "moe.losses.scope", bool, True, names={False: "batch", True: "sequence"})
BATCH_LOSS = always("moe.losses.scope", "batch")

# --- Other names -----------------------------------------------------------------------------------------------------
#: Fields that Sarvam's own code names differently from the library.
SARVAM_NAMES = (
    Row(
        "n_routed_experts",
        type=Annotated[Count, named("n_routed_experts", "num_local_experts", "num_experts")],
        default=128,
    ),
    Row("n_shared_experts", type=Annotated[OptionalCount, named("n_shared_experts", "num_shared_experts")], default=1),
)
