"""The identity of a run: a canonical form of the settings that decide its result, and its hash.

Names and neutral values are the lab's own, so that a record stays valid when the config is restructured: such a change
affects how :func:`canonical` reads the config, never what it returns. A setting with its neutral value is left out; a
new setting gets the neutral value that older runs had. Settings that change no result beyond rounding are always left
out: folders, logging, checkpoints, the mesh and the way in which experts are computed. A setting that names a file or
a workdir stands for its content, by a hash, so that an edited tokenizer makes another run and a moved one does not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, get_args

from etils import epath

from moe.checkpoints.manager import complete_steps
from moe.checkpoints.pinned import digest as digest_of_checkpoint
from moe.config import (
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    StartConfig,
    TrainConfig,
    layer_kinds,
    sparse_layers,
)
from moe.config.flat import PLACES
from moe.config.pattern import Word
from moe.config.registry import find_gate, find_layer
from moe.config.user_code import user_code
from moe.data.corpora import EmbeddedCorpus
from moe.data.json_tokenizer import JSON_CONFIG_FILE, TEMPLATE_FILE
from moe.data.tokenizer_files import MIXTRAL, companions
from moe.routing.balancing_rules import BalancingRule
from moe.routing.interface import Gate
from moe.system.fields import is_off
from moe.system.reading import read_small_file
from moe.system.sealed_folder import CONFIG

#: Version of the canonical form. A new version needs a conversion of older records.
VERSION = 1

Canonical = dict[str, Any]


def _same(section: type[Any], *otherwise: str) -> Canonical:
    """Fields of a section that have the same name in the canonical form, and their neutral values; None: it has none.
    Those that change no result are left out.

    Args:
        otherwise: fields that have another name there, or a condition.
    """
    return {
        field.name: field.metadata.get("neutral", field.default)
        for field in dataclasses.fields(section)
        if field.metadata.get("result") != "none"
        and field.metadata.get("resume") != "free"
        and field.name not in otherwise
    }


_MODEL = _same(ModelConfig, "d_ff", "moe", "pattern") | dict.fromkeys(("sliding_window_layers", "mixer_layers"), ())
#: Of these, those that follow from ``model.pattern``.
_LISTS = ("delta_net", "sliding_window_layers", "mixer_layers")
_MOE = _same(
    MoEConfig,
    *("gate", "layer_gates", "num_experts", "d_ff", "shared_d_ff", "every", "layers", "first_dense", "group_size"),
    *("dispatch", "capacity", "losses", "drop_policy", "overflow_to_next"),
)
_DATA = _same(DataConfig)
_OPTIMIZER = _same(OptimizerConfig, "name", "final_learning_rate_fraction")
_TRAIN = _same(TrainConfig)
_START = _same(StartConfig, "checkpoint", "optimizer")

#: Settings that are left out where they have these values, in JSON; those of the model are left out in ``_model``.
_NEUTRAL: Canonical = json.loads(json.dumps(_MOE | _DATA | _OPTIMIZER | _TRAIN | _START)) | {
    # MoE
    "shared_dim": 0, "null_balance": 1.0, "expert_capacity": 0, "balance_weight": 0.0, "z_loss_weight": 0.0,
    "importance_weight": 0.0, "load_weight": 0.0, "device_balance_weight": 0.0, "balance_scope": "batch",
    "score": "softmax",
    "bias_update": "none", "bias_update_rate": 0.0, "expert_groups": 1, "kept_expert_groups": 1,
    "scores_per_group": 1, "renormalise": False, "routing_scale": 1.0, "slots_per_expert": 1,
    "drop_policy": "position", "overflow_to_next": False,
    # optimizer, start, distillation
    "optimizer": "adamw", "final_rate_fraction": 0.1, "start": "", "optimizer_state": "reset", "teacher": "",
    "soft_share": 0.25, "lora": 0, "preference_beta": 0.0, "policy": 0,
    # a user's gates, layers and optimizer
    "code": "",
}  # fmt: skip

_LOSSES = {
    "balance": "balance_weight", "z": "z_loss_weight", "importance": "importance_weight", "load": "load_weight",
    "device": "device_balance_weight", "scope": "balance_scope", "null": "null_balance",
}  # fmt: skip
#: Fields of a gate, and their names in the flat form of ``model.moe``.
_GATE = {
    place.removeprefix("gate."): name
    for name, place in PLACES.items()
    if place.startswith("gate.") and place not in ("gate.k", "gate.bias", "gate.bias_rate")
} | {"score": "score"}


def canonical(config: Config) -> Canonical:
    """The settings that decide a run's result, by name, without those that are neutral."""
    form: Canonical = {"seed": config.seed, "text": text_versions(config.data)}
    form |= _model(config.model)
    for section, names in (
        (config.data, _DATA), (config.optimizer, _OPTIMIZER), (config.train, _TRAIN), (config.start, _START),
    ):  # fmt: skip
        form |= {name: getattr(section, name) for name in names}
    form["optimizer"] = config.optimizer.name
    form["code"] = user_code(config)
    form["final_rate_fraction"] = config.optimizer.final_learning_rate_fraction
    form["tokenizer"] = _of_file(config.data.tokenizer, JSON_CONFIG_FILE, TEMPLATE_FILE)
    form["chat_template"] = _of_file(config.data.chat_template)
    form["start"] = _of_workdir(config.start.checkpoint)
    form["optimizer_state"] = config.start.optimizer if form["start"] else "reset"
    form["teacher"] = _of_workdir(config.distill.teacher)
    form["lora"] = dataclasses.asdict(config.lora) if config.lora.rank else _NEUTRAL["lora"]
    own = config.objective.section
    form["preference_beta"] = config.preferences.beta if own == "preferences" else 0.0
    form["policy"] = dataclasses.asdict(config.policy) if own == "policy" else _NEUTRAL["policy"]
    form["soft_share"] = config.distill.soft_share if form["teacher"] else _NEUTRAL["soft_share"]
    if not all(sparse_layers(config.model)):
        form["dense_dim"] = config.model.d_ff
    if any(sparse_layers(config.model)):
        form |= _moe(config)
    form = json.loads(json.dumps(form))  # tuples become lists, as in a record that is read back
    return {name: value for name, value in sorted(form.items()) if name not in _NEUTRAL or _NEUTRAL[name] != value}


def _model(model: ModelConfig) -> Canonical:
    """The settings of the model, without those that are neutral and those of its FFNs."""
    form: Canonical = _lists_of_layers(model)
    for name, neutral in _MODEL.items():
        if name in _LISTS:
            continue
        value: Any = getattr(model, name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            if not is_off(value):
                form[name] = dataclasses.asdict(value)
        elif value != neutral:
            form[name] = value
    return form


def _lists_of_layers(model: ModelConfig) -> Canonical:
    """The layers of each mixer, under the names that settings of earlier versions had, without those that are neutral:
    a window, or a mixer of one's own, in all layers but those of gated DeltaNet."""
    words = () if model.encoder_layers else model.mixer_words
    layers = {word: [layer for layer, own in enumerate(words) if own == word] for word in get_args(Word)}
    form: Canonical = {}
    if layers["delta"]:
        form["delta_net"] = {"layers": layers["delta"], **dataclasses.asdict(model.delta_net)}
    if layers["sliding"] and layers["attention"]:
        form["sliding_window_layers"] = layers["sliding"]
    if layers["mixer"] and (layers["attention"] or layers["sliding"]):
        form["mixer_layers"] = layers["mixer"]
    return form


def _of_file(path: str, *beside: str) -> str:
    """Hash of a file and of those of the given names beside it; the name itself where it is not a file's."""
    file = epath.Path(path).expanduser()
    if path in ("", MIXTRAL) or not file.exists():
        return path
    names = (file.name, *(name for name in beside if (file.parent / name).exists()))
    return _hash([hashlib.sha256(read_small_file(file.parent / name)).hexdigest() for name in names])


def _of_workdir(path: str) -> str:
    """Hash of the newest checkpoint, the config and the tokenizer of a workdir; the name itself where it is not a
    workdir's, as that of a run of the suite."""
    folder = epath.Path(path).expanduser()
    if not path or not complete_steps(folder):
        return path
    step = complete_steps(folder)[-1]
    files = {CONFIG: read_small_file(folder / CONFIG), **companions(folder)}
    contents = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    # Earlier versions imported without checksums.
    return _hash([digest_of_checkpoint(folder, step) or [path, step], sorted(contents.items())])


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _moe(config: Config) -> Canonical:
    """The settings of the MoE layers."""
    model, moe = config.model, config.model.moe
    gates = [_layer_gate(kind.gate, moe) for kind in layer_kinds(model)]
    form: Canonical = {
        "gates": gates if any(gate != gates[0] for gate in gates) else gates[0],
        "experts": moe.num_experts,
        "k": moe.experts_per_token,
        "expert_dim": moe.d_ff,
        "shared_dim": moe.shared_d_ff,
    }
    form |= {name: getattr(moe, name) for name in _MOE}
    form |= {name: getattr(moe.losses, field) for field, name in _LOSSES.items()}
    form |= _gate(moe)
    # Without drops the capacity has no effect; the group size still does where a loss is computed per group.
    form["drops"] = moe.dispatch != "dropless"
    if form["drops"]:
        form |= {"drop_policy": moe.drop_policy, "overflow_to_next": moe.overflow_to_next}
    sized = form["drops"] or any(gate.experts_choose for gate in moe.gates)  # experts that choose take C tokens each
    if sized:
        if moe.capacity.fixed:
            form["expert_capacity"] = moe.capacity.fixed
        else:
            form |= {"capacity_factor": moe.capacity.train, "eval_capacity_factor": moe.capacity.eval}
    if sized or moe.losses.scope == "group":
        form["group_tokens"] = moe.group_size or config.data.sequence_length
    return form


def _layer_gate(gate: Gate | None, moe: MoEConfig) -> Any:
    """Name of a layer's gate if it is the model's gate or the name implies its fields; otherwise its fields."""
    if gate is None or gate == moe.gate:
        return "none" if gate is None else gate.name
    named = find_gate(gate.name).with_k(moe.experts_per_token)
    return gate.name if gate == named and ":" not in gate.name else dataclasses.asdict(gate)


def _gate(moe: MoEConfig) -> Canonical:
    """The settings of the gate, and what the balancing loss counts where that differs from the gate's paper."""
    gate, layer = moe.gate, find_layer(moe.gate_name)
    assert gate is not None
    assert layer.gate is not None
    form: Canonical = _balancing(gate.balancing)
    form |= {name: getattr(gate, field) for field, name in _GATE.items() if hasattr(gate, field)}
    if form.get("expert_groups") == 1:  # with one group it has no effect, and takes the paper's value
        form["scores_per_group"] = getattr(layer.gate, "scores_per_group", 1)
    known = {*_GATE, "name", "k", "bias", "bias_rate", "penalty_rate", "threshold_rate"}
    for field in dataclasses.fields(gate):
        value = getattr(gate, field.name)
        # The code behind a user's module:object may have been edited since an earlier run.
        if field.name not in known and (":" in gate.name or value != getattr(layer.gate, field.name)):
            form[f"gate.{field.name}"] = value
    if ":" in gate.name or moe.losses.counts != layer.losses.counts:
        form["balance_counts"] = moe.losses.counts
    return form


def _balancing(rule: BalancingRule | None) -> Canonical:
    """The rule that moves a router's state, and its fields."""
    fields = {} if rule is None else dataclasses.asdict(rule)
    own = {"bias_update": rule.name if rule else "none", "bias_update_rate": fields.pop("rate", 0.0)}
    return own | {f"balancing.{name}": value for name, value in fields.items()}


def text_source(data: DataConfig) -> Any:
    """Settings that name a text; another text may have domains of the same names."""
    return data.dataset, data.text_suffixes


def text_versions(data: DataConfig) -> dict[str, str]:
    """Domain → version of its text, where the config determines it; other datasets have to be opened first."""
    own = data.domains if data.dataset == "embedded" else ()
    return {domain: str(EmbeddedCorpus.VERSION) for domain in own}


def digest(form: Mapping[str, Any]) -> str:
    """Hash of a canonical form."""
    text = json.dumps({"version": VERSION, **form}, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
