"""Conversion between ``config.json`` of an open checkpoint and :class:`moe.config.Config`.

A setting that the family's own code supports and this code does not is refused by name, never guessed.
"""

from __future__ import annotations

import dataclasses

import pydantic

from moe.config import Config, ConfigError, DataConfig, ModelConfig, MoEConfig, layer_kinds, sparse_layers, to_dict
from moe.config.mixers import GatedDelta
from moe.config.parse import build, from_config_dict
from moe.config.registry import find_layer
from moe.interop import balance
from moe.interop.families import FAMILIES, MISSING
from moe.interop.families.family import Family
from moe.interop.families.rows import Row, gate_field, nested, selection_rule
from moe.interop.rope import read_scaling, write_scaling
from moe.interop.schema import ACTIVATIONS, MOST_EXPERTS, Json, OpenConfig, parse
from moe.system.fields import is_off

#: Field of an import's copy of ``config.json``: the dtype of selection biases in the files, where it is not float32.
BIAS_DTYPE = "selection_bias_dtype"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def family_of(source: Json) -> Family:
    """The family of a ``config.json``.

    Raises:
        ConfigError: an unsupported ``model_type``.
    """
    kind = source.get("model_type")
    missing = MISSING.get(kind.removesuffix("_text")) if isinstance(kind, str) else None
    if missing:
        raise ConfigError(f"config.json: model_type={kind!r}: needs {missing}, which no model here computes")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConfigError(f"config.json: model_type={kind!r}: must be one of {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def read_config(source: Json) -> Config:
    """The config of a model that computes what the family's code computes from this ``config.json``, dropless.

    ``data.sequence_length`` becomes the longest context of the model.

    Raises:
        ConfigError: a missing or malformed field, or a setting that is not supported.
    """
    family = family_of(source)
    fields: OpenConfig = parse(family.schema, source)
    changes = family.read(fields)
    if fields.rope.partial_rotary_factor != 1 and "rope_dim" not in changes:
        raise ConfigError(f"config.json: partial_rotary_factor={fields.rope.partial_rotary_factor}: must be 1")
    if fields.rope.alpha is not None and "rope_theta" not in changes:
        raise ConfigError(
            f"config.json: alpha={fields.rope.alpha} of rotary positions: must be absent for {family.model_type}"
        )
    common: Json = {"moe.jitter": 0.0, "moe.dispatch": "dropless"}
    for row in _COMMON:
        common |= row.read(fields)
    model_settings = nested(common | changes)
    settings = model_settings.pop("moe")
    settings["losses"] = {"z": 0.0, **settings.get("losses", {})}
    settings["gate"] = _with_k(family, settings["gate"], fields.num_experts_per_tok)
    # Built in one call: the checks must not see sizes that the family replaces, such as head dims of latent attention.
    model = build(ModelConfig, model_settings, "model.")
    total = settings.get("num_experts", 0) * model.num_layers
    if total > MOST_EXPERTS:
        raise ConfigError(f"config.json: {total} experts in {model.num_layers} layers: must be at most {MOST_EXPERTS}")
    moe = build(MoEConfig, settings, "model.moe.")
    model = dataclasses.replace(model, moe=moe)
    if moe.gate is not None:
        weight = balance.weight_here(family, getattr(fields, family.balance_field), model)
        losses = dataclasses.replace(moe.losses, balance=weight)
        model = dataclasses.replace(model, moe=dataclasses.replace(moe, losses=losses))
    data = DataConfig(sequence_length=fields.max_position_embeddings)
    if model.encoder_layers:
        data = dataclasses.replace(data, objective="span_corruption", input_length=data.sequence_length)
    return from_config_dict(to_dict(Config(model=model, data=data)))


def _with_k(family: Family, gate: str | Json, k: int) -> Json:
    """The section of a gate, given by its name or by a section, with K.

    K = 1 with renormalised weights, which no gate here supports, is refused by the name of the file's field.
    """
    section = {"name": gate} if isinstance(gate, str) else gate
    layer = find_layer(section["name"])
    if layer.gate is None:
        return section
    name = family.name(_EXPERTS_PER_TOKEN)
    if not k:
        raise ConfigError(f"config.json: {name}: must be there, and above 0, in a {family.model_type} with experts")
    if k == 1 and section.get("renormalise", gate_field(layer, "renormalise")):
        raise ConfigError(
            f"config.json: {name}=1: must be above 1 in a {family.model_type} whose weights are divided by their sum: "
            "the only weight would always be 1, and no gate here computes that"
        )
    return section | {"k": k} if layer.gate.sets_k else section


#: Fields that all families state in the same way.
_COMMON = (
    Row("vocab_size", "vocab_size"),
    Row("hidden_size", "d_model"),
    Row("intermediate_size", "d_ff"),
    Row("num_hidden_layers", "num_layers"),
    Row("num_attention_heads", "num_heads"),
    Row("num_key_value_heads", "num_kv_heads", here=lambda file: file.num_key_value_heads or file.num_attention_heads),
    Row("head_dim", "head_dim", here=lambda file: file.dim_of_head),
    Row("hidden_act", "activation", names=ACTIVATIONS),
    Row("rms_norm_eps", "norm_eps"),
    Row("tie_word_embeddings", "tie_embeddings"),
    Row("", "rope_theta", here=lambda file: file.rope.rope_theta),
    Row("", "rope_scaling", here=read_scaling),
)


def write_config(config: Config, model_type: str = "") -> Json:
    """A ``config.json`` from which Hugging Face transformers builds the same model.

    Args:
        config: of the model.
        model_type: a key of :data:`FAMILIES`; empty: the first family that can express the model.

    Raises:
        ConfigError: no family can; the message names what the nearest ones lack.
    """
    if model_type and model_type not in FAMILIES:
        raise ConfigError(f"model_type={model_type!r}: must be one of {', '.join(FAMILIES)}")
    reasons: list[tuple[int, str]] = []
    for name in [model_type] if model_type else FAMILIES:
        result = _write_as(config, FAMILIES[name])
        try:
            lost = _differences(config.model, _read_back(result, config.model))
        except ConfigError as error:
            reasons.append((1000, f"{name} cannot ({error})"))
            continue
        if not lost:
            return result
        more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
        reasons.append((len(lost), f"{name} lacks {', '.join(lost[:4])}{more}"))
    nearest = [reason for _, reason in sorted(reasons, key=lambda each: each[0])]
    further = f"; {len(nearest) - 4} others are further away" if len(nearest) > 4 else ""
    raise ConfigError(f"no open architecture computes this model: {'; '.join(nearest[:4])}{further}")


def keep_fields(source: Json, config: Config, model_type: str = "") -> Json:
    """A ``config.json`` for a model that was imported: the fields of the source, except those that have changed since.

    The source's quantisation is left out, since the weights are floats.

    The longest context is the source's, unless the model was trained on a longer one.

    Raises:
        ConfigError: see :func:`write_config`.
    """
    absent = (
        "quantization_config",
        "auto_map",
        BIAS_DTYPE,
    )  # the second names files of code, which an export does not hold
    source = {name: value for name, value in source.items() if name not in absent}
    before = read_config(source)
    length = max(config.data.sequence_length, before.data.sequence_length)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=length))
    kept_type = source["model_type"]
    if model_type not in ("", kept_type) or _differences(
        config.model, _read_back(_write_as(config, FAMILIES[kept_type]), config.model)
    ):
        return write_config(config, model_type)
    ours, theirs = _write_as(config, FAMILIES[kept_type]), _write_as(before, FAMILIES[kept_type])
    changed = {name: value for name, value in ours.items() if theirs.get(name) != value}
    aliases = [field.validation_alias for field in FAMILIES[kept_type].schema.model_fields.values()]
    named = [{str(name) for name in alias.choices} for alias in aliases if isinstance(alias, pydantic.AliasChoices)]
    # Of two names of one field the library may read the one that was not changed.
    stale = {name for names in named if names & changed.keys() for name in names}
    source = {name: value for name, value in source.items() if name not in stale}
    result = {"architectures": ours["architectures"]} | source | changed
    depth = config.model.prediction_layers  # the source states layers that were not imported, too
    if _differences(config.model, _read_back(result | {_PREDICTION: depth}, config.model)):
        # The source also states a changed setting under another name, such as rope_parameters.
        known = {*FAMILIES[kept_type].schema.model_fields}.union(*named) - set(TOKEN_IDS)
        result = {name: value for name, value in source.items() if name not in known} | ours
    return result


def _read_back(written: Json, model: ModelConfig) -> ModelConfig:
    """The model of a ``config.json`` written by this module for ``model``, with the layers of multi-token prediction.

    Whether the two stacks of an untied Switch have tables of their own is said by the tensors, not by this file.
    """
    read, family = read_config(written).model, FAMILIES[written["model_type"]]
    read = dataclasses.replace(read, prediction_layers=written.get(_PREDICTION) or 0)
    by_tensors = family.copies and not family.ties_by_file and not read.tie_embeddings
    if by_tensors and model.encoder_vocab_size == read.vocab_size:
        read = dataclasses.replace(read, encoder_vocab_size=read.vocab_size)
    return read


def _write_as(config: Config, family: Family) -> Json:
    model = config.model
    if config.objective.prefix and not model.encoder_layers:
        raise ConfigError(
            f"data.objective={config.data.objective!r}: no open architecture attends to a prompt in both directions"
        )
    result: Json = {"architectures": [family.architecture], "model_type": family.model_type}
    for row in _COMMON:
        result |= row.write(model)
    result["max_position_embeddings"] = config.data.sequence_length
    if any(sparse_layers(model)):
        result[_EXPERTS_PER_TOKEN] = model.moe.experts_per_token
        result[family.balance_field] = balance.coefficient_there(family, model)
    result |= write_scaling(model)
    named = {family.name(field): value for field, value in result.items() if field not in family.unwritten}
    return named | family.write(model)


_PREDICTION, _EXPERTS_PER_TOKEN = "num_nextn_predict_layers", "num_experts_per_tok"
#: Fields of a model that change what it computes in evaluation; :func:`_facts` adds those with rules of their own.
_MODEL_FACTS = tuple(
    field.name
    for field in dataclasses.fields(ModelConfig)
    if "result" not in field.metadata
    and field.name not in ("rope_dim", "logit_scale", "sliding_window", "pattern", "delta_net", "d_ff", "moe")
)
#: Settings that decide which assignments a capacity drops.
_DROP_FACTS = ("group_size", "overflow_to_next", "drop_policy", "route_padding")
#: Fields of MoE layers that do; the router's dtype changes no more than rounding there.
_MOE_FACTS = (
    "experts_per_token",
    *(
        field.name
        for field in dataclasses.fields(MoEConfig)
        if "result" not in field.metadata
        and field.metadata.get("resume") != "free"
        and field.name not in ("gate", "every", "layers", "first_dense", "dispatch", "capacity", "losses")
        and field.name not in ("router_dtype", *_DROP_FACTS)
    ),
)
#: Fields of gates that change nothing in evaluation.
_NO_GATE_FACTS = {"name", "bias_rate", "penalty_rate", "threshold_rate"}


def _differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """Names of the settings in which two models differ and that change what a model computes in evaluation."""
    left, right = _facts(ours), _facts(theirs)
    return [name for name in left if left[name] != right.get(name)]


def _facts(model: ModelConfig) -> Json:
    """Every setting that changes what a model computes in evaluation."""
    sparse, moe = sparse_layers(model), model.moe
    facts = {f"model.{name}": getattr(model, name) for name in _MODEL_FACTS}
    facts |= {name: None for name, value in facts.items() if dataclasses.is_dataclass(value) and is_off(value)}
    facts["model.rope_dim"] = model.rope_dim or model.head_dim
    facts["model.logit_scale"] = float(f"{model.logit_scale:.12g}")  # files hold its reciprocal
    facts |= {"model.moe.layers": sparse, "model.sliding_window": tuple(kind.window for kind in layer_kinds(model))}
    has_delta = [isinstance(kind.mixer, GatedDelta) for kind in layer_kinds(model)]
    facts["model.delta_net"] = (model.delta_net, has_delta) if any(has_delta) else None
    if not all(sparse):
        facts["model.d_ff"] = model.d_ff
    if any(sparse):
        facts |= {f"model.moe.{name}": getattr(moe, name) for name in _MOE_FACTS}
        facts["model.moe.capacity.fixed"] = moe.capacity.fixed
        if moe.capacity.fixed:  # which assignments are dropped
            facts |= {f"model.moe.{name}": getattr(moe, name) for name in _DROP_FACTS}
        rule = selection_rule(moe)
        facts["model.moe.gate"] = rule
        if isinstance(rule, str) and moe.gate is not None:
            names = {field.name for field in dataclasses.fields(moe.gate)} - _NO_GATE_FACTS
            facts |= {f"model.moe.gate.{name}": getattr(moe.gate, name) for name in sorted(names)}
    return facts
