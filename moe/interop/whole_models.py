"""Models of text, images and sound whose text model is read by itself; their other parts are left out.

Positions of images (``mrope_section``) do not matter: all tokens of a text have one position.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from moe.config import ConfigError
from moe.interop.families.family import FUSED_EXPERTS, Family, Tensor
from moe.interop.schema import Json

#: Fields of the whole model that its text model has too.
_OF_BOTH = ("tie_word_embeddings", "quantization_config")


@dataclasses.dataclass(frozen=True)
class WholeModel:
    """A larger model and the family of its text model.

    Attributes:
        family: ``model_type`` of the text model here.
        sections: path of the text model's fields in ``config.json``.
        inside: prefix of the text model's tensors → that prefix in files of the text model alone.
        parts: the text model's fields → (prefix of the tensors of other parts, or pattern of their names → what they
            are).
        defaults: fields of the text model, where a file states none and the family's own default is another one.
        fields: fields that the whole model's code does not read, with the values by which the family computes the same.
        fused: fused tensors of the experts, where they are not those of the family.
        tensors: other tensors that are not those of the family.
        text: fields of the text model as the whole model has them → as the family has them.
    """

    family: str
    sections: tuple[str, ...]
    inside: Mapping[str, str]
    parts: Callable[[Json], Mapping[str | re.Pattern[str], str]]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fused: Mapping[str, str | Tensor] = dataclasses.field(default_factory=dict)
    tensors: Mapping[str, str | Tensor] = dataclasses.field(default_factory=dict)
    text: Callable[[Json], Json] = lambda text: text

    def text_model(self, family: Family, source: Json) -> Family:
        """The family with the names that its tensors have within the whole model of this ``config.json``."""
        changes: dict[str, Any] = {"inside": self.inside}
        changes["skipped"] = {**family.skipped, **self.parts(_sections(source, self)[-1])}
        if self.fused:
            changes["fused"] = self.fused
        if self.tensors and not callable(family.tensors):
            changes["tensors"] = {**family.tensors, **self.tensors}
        return dataclasses.replace(family, **changes)


_LANGUAGE_MODEL = {"model.language_model.": "model."}


def _vision(text: Json) -> Mapping[str | re.Pattern[str], str]:
    del text
    return {"model.visual.": "the vision model"}


def _omni(text: Json) -> Mapping[str | re.Pattern[str], str]:
    del text
    return {
        "thinker.visual.": "the vision model",
        "thinker.audio_tower.": "the audio model",
        "talker.": "the talker",
        "code2wav.": "the vocoder",
    }


def _ernie_parts(text: Json) -> Mapping[str | re.Pattern[str], str]:
    """A layer's experts of images are numbered after those of texts."""
    experts = text.get("moe_num_experts", 64)
    numbers = "|".join(str(experts + number) for number in range(experts)) if isinstance(experts, int) else ""
    return {
        "model.vision_model.": "the vision model",
        "model.resampler_model.": "the vision model's resampler",
        re.compile(rf"model\.layers\.\d+\.mlp\.(gate\.weight_1$|experts\.({numbers})\.)"): "experts of images",
    }


def _consecutive(layers: list[int]) -> bool:
    return bool(layers) and layers == list(range(layers[0], layers[-1] + 1))


def _ernie_text(text: Json) -> Json:
    """The first size of experts is that of texts; ``mlp_layer_types`` as the bounds of the MoE layers."""
    result = dict(text)
    size = result.get("moe_intermediate_size", 1536)
    result["moe_intermediate_size"] = size[0] if isinstance(size, list) and size else size
    kinds = result.pop("mlp_layer_types", None)
    if isinstance(kinds, list):
        sparse = [layer for layer, kind in enumerate(kinds) if kind == "sparse"]
        if len(kinds) != text.get("num_hidden_layers") or not _consecutive(sparse):
            raise ConfigError(
                "config.json: mlp_layer_types: must list each layer, and the MoE layers must be consecutive"
            )
        result |= {"moe_layer_start_index": sparse[0], "moe_layer_end_index": sparse[-1], "moe_layer_interval": 1}
    return result


#: Experts in two tensors with matrices [inputs, outputs].
_INPUTS_FIRST = {
    name: dataclasses.replace(tensor, inputs_first=True) if ".experts." in name else tensor
    for name, tensor in FUSED_EXPERTS.items()
}

#: By ``model_type`` of the whole model.
WHOLE_MODELS = {
    "qwen3_5_moe": WholeModel("qwen3_5_moe_text", ("text_config",), _LANGUAGE_MODEL, _vision),
    "qwen3_vl_moe": WholeModel(
        "qwen3_moe",
        ("text_config",),
        _LANGUAGE_MODEL,
        _vision,
        defaults={"max_position_embeddings": 128000, "num_key_value_heads": 16, "rope_theta": 5e5, "num_experts": 60}
        | {"num_experts_per_tok": 4, "moe_intermediate_size": 1408, "intermediate_size": 5632},
        fields={"norm_topk_prob": True, "use_sliding_window": False},
        fused=_INPUTS_FIRST,
    ),
    "qwen3_omni_moe": WholeModel(
        "qwen3_moe",
        ("thinker_config", "text_config"),
        {"thinker.model.": "model.", "thinker.lm_head.": "lm_head."},
        _omni,
        defaults={"rope_theta": 1e6, "moe_intermediate_size": 768, "norm_topk_prob": True},
        fields={"use_sliding_window": False},
    ),
    "glm4v_moe": WholeModel(
        "glm4_moe",
        ("text_config",),
        _LANGUAGE_MODEL,
        _vision,
        defaults={"max_position_embeddings": 65536, "attention_bias": True},
        fields={"use_qk_norm": False},
    ),
    "ernie4_5_vl_moe": WholeModel(
        "ernie4_5_moe",
        ("text_config",),
        {},
        _ernie_parts,
        tensors={
            "moe.router.kernel": Tensor("mlp.gate.weight", inputs_first=True),
            "moe.router.bias": Tensor("mlp.moe_statics.e_score_correction_bias", rows=2, axes=((), (0,))),
        },
        text=_ernie_text,
    ),
}


def whole_model(source: Json) -> WholeModel | None:
    """The larger model that a ``config.json`` describes; None for a text model."""
    kind = source.get("model_type")
    whole = WHOLE_MODELS.get(kind) if isinstance(kind, str) else None
    return whole if whole and _sections(source, whole) else None


def text_fields(source: Json) -> Json:
    """The fields of the text model, as a ``config.json`` of its family has them."""
    whole = whole_model(source)
    if whole is None:
        return source
    *outer, text = [source, *_sections(source, whole)]
    shared = {name: each[name] for each in outer for name in _OF_BOTH if name in each}
    other = text.get("model_type") != whole.family
    own = {name: value for name, value in text.items() if not (other and name == "architectures")}
    own = whole.text(own)
    result = {**whole.defaults, **own, **shared, **whole.fields, "model_type": whole.family}
    if isinstance(quantization := result.get("quantization_config"), dict):
        result["quantization_config"] = rename_modules(quantization, whole.inside)
    return result


def rename_modules(quantization: Json, inside: Mapping[str, str]) -> Json:
    """A ``quantization_config`` with the names that modules have in the text model by itself."""
    kept = quantization.get("modules_to_not_convert")
    if not isinstance(kept, list):
        return quantization
    names = [renamed(name, inside) if isinstance(name, str) else name for name in kept]
    return quantization | {"modules_to_not_convert": names}


def renamed(name: str, inside: Mapping[str, str]) -> str:
    """The name of a tensor or module in the text model by itself."""
    prefix = next((prefix for prefix in inside if name.startswith(prefix)), "")
    return inside.get(prefix, "") + name.removeprefix(prefix)


def _sections(source: Json, whole: WholeModel) -> list[Json]:
    """The sections on the path to the text model; empty if one of them is missing."""
    found: list[Json] = []
    for name in whole.sections:
        section = (found or [source])[-1].get(name)
        if not isinstance(section, dict):
            return []
        found.append(section)
    return found
