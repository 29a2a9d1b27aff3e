"""All settings of a run, and the rules across its sections. A config that exists is complete and valid."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping

from moe.config import mixers
from moe.config.guarded_objectives import FIELD
from moe.config.layer_kinds import layer_kinds, require_ability, unread_settings
from moe.config.model_section import ModelConfig
from moe.config.objectives import Objective, find_objective
from moe.config.run_sections import (
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
from moe.system.fields import LARGEST, Section, facts_of, require, setting

_MOE = "model.moe."


@dataclasses.dataclass(frozen=True)
class Config(Section):
    """All settings of a run.

    Fields that follow others are filled in: objective and input length of an encoder-decoder.

    Raises:
        ConfigError: an impossible combination. What needs devices is checked by :func:`validate_mesh`.
    """

    seed: int = setting(0, least=0)  # of initialisation, data order and routing noise
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    start: StartConfig = StartConfig()
    distill: DistillConfig = DistillConfig()
    lora: LoraConfig = LoraConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    policy: PolicyConfig = PolicyConfig()

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", _filled(self.data, bool(self.model.encoder_layers)))
        super().__post_init__()
        _check_objective(self)
        _check_steps(self)
        _check_lora(self)
        _check_clipping(self)
        _check_transfer(self)
        self.objective.check(self)
        if self.model.moe.gate is not None:
            _check_causality(self.model)
            _check_group_size(self)

    @property
    def objective(self) -> Objective:
        """The objective that ``data.objective`` names."""
        return find_objective(self.data.objective).bound(self.data, self)

    @property
    def tokens_per_step(self) -> int:
        """B·T, after any ramp-up; for an encoder-decoder, of the decoder."""
        return self.train.batch_size * self.data.sequence_length

    def tokens_until(self, step: int) -> int:
        """Tokens of the first steps, up to this one, with the smaller batches of a ramp-up."""
        return self.train.rows_until(step) * self.data.sequence_length


def _filled(data: DataConfig, encoder: bool) -> DataConfig:
    """The data section, with objective and input length filled in for a model with an encoder."""
    if not encoder:
        return data
    objective = "span_corruption" if data.objective == "causal" else data.objective
    return dataclasses.replace(data, objective=objective, input_length=data.input_length or data.sequence_length)


def _check_objective(config: Config) -> None:
    """Check what every objective asks of a config; :meth:`moe.config.objectives.Objective.check` is the rest."""
    model = config.model
    data = config.data
    objective = config.objective
    encoder, name = model.encoder_layers, f"{FIELD}={data.objective!r}"
    if objective.models == "decoder":
        require(encoder == 0, FIELD, data.objective, "needs a decoder-only model (model.encoder_layers=0)")
    if objective.models == "encoder-decoder":
        require(encoder > 0, FIELD, data.objective, "needs model.encoder_layers above 0")
    require(
        data.input_length >= 2 if encoder else data.input_length == 0,
        "data.input_length",
        data.input_length,
        f"must be {'at least 2' if encoder else '0'} where model.encoder_layers={encoder}",
    )
    allowed = "must be empty unless data.objective is chat or preferences"
    require(objective.conversations or not data.chat_template, "data.chat_template", data.chat_template, allowed)
    allowed = f"must be 0 with {name}, whose loss does not include them; start.checkpoint may have them"
    predicts = "prediction" in objective.abilities or not model.prediction_layers
    require(predicts, "model.prediction_layers", model.prediction_layers, allowed)


def _check_steps(config: Config) -> None:
    """Check rows, tokens and steps of the schedule."""
    data = config.data
    train = config.train
    optimizer = config.optimizer
    tokens = config.tokens_per_step
    require(tokens <= LARGEST, "train.batch_size * data.sequence_length", tokens, f"must be at most {LARGEST}")
    divides = data.streams == 0 or train.rows_read % data.streams == 0
    what = "the rows of a microbatch, " if train.rampup_rows else "train.batch_size="
    allowed = f"must divide {what}{train.rows_read}, or be 0"
    require(divides, "data.streams", data.streams, allowed)
    allowed = f"must be below train.num_steps={train.num_steps}"
    require(optimizer.warmup_steps < train.num_steps, "optimizer.warmup_steps", optimizer.warmup_steps, allowed)
    decay = optimizer.wsd_steps(train.num_steps) if optimizer.schedule == "wsd" else 0
    allowed = "must be at most train.num_steps - optimizer.warmup_steps; 0 is a tenth of train.num_steps"
    enough = decay <= train.num_steps - optimizer.warmup_steps
    require(enough, "optimizer.decay_steps", optimizer.decay_steps, allowed)


def _check_transfer(config: Config) -> None:
    """Check that the optimizer has rates for a model with the sizes of a base model."""
    name, allowed = config.optimizer.name, "must be adamw or muon with a base model's sizes, model.base_*"
    require(name in ("adamw", "muon") or not config.model.has_base, "optimizer.name", name, allowed)


def _check_lora(config: Config) -> None:
    start = config.start
    rank = config.lora.rank
    frozen = config.optimizer.frozen
    if not rank:
        return
    require(bool(start.checkpoint), "lora.rank", rank, "needs start.checkpoint, the base of the adapters")
    allowed = "must be empty with lora.rank; lora.parts and lora.trained say what is trained"
    require(not frozen, "optimizer.frozen", frozen, allowed)
    name = config.optimizer.name
    require(name != "muon", "optimizer.name", name, "must not be muon with lora.rank: muon does not train adapters")
    changed = [
        field.name
        for field in dataclasses.fields(start)
        if field.name != "checkpoint" and getattr(start, field.name) != field.default
    ]
    require(not changed, "lora.rank", rank, f"adapts start.checkpoint as it is; unset start.{', start.'.join(changed)}")


def _check_clipping(config: Config) -> None:
    """Check that QK-clip can scale all scores of the model's heads."""
    model = config.model
    if not config.optimizer.qk_clip:
        return
    where = "with optimizer.qk_clip"
    for name, value, allowed in (
        ("model.encoder_layers", model.encoder_layers, 0),
        ("model.prediction_layers", model.prediction_layers, 0),
        ("lora.rank", config.lora.rank, 0),
    ):
        require(value == allowed, name, value, f"must be {allowed} {where}")
    frozen = config.optimizer.frozen
    require("attention" not in frozen, "optimizer.frozen", frozen, f"must not name attention {where}")
    require_ability(model, "clipping", where)
    scored = any(kind.mixer.score_dims for kind in layer_kinds(model))
    require(scored, "optimizer.qk_clip", config.optimizer.qk_clip, "needs a layer with attention")


def _check_causality(model: ModelConfig) -> None:
    moe = model.moe
    if moe.accept_future_leak:
        return
    causal = {kind.gate for kind in layer_kinds(model) if kind.sparse and kind.role != "encoder"}
    if not causal:
        return
    accepted = f"which a causal model must not see; set {_MOE}accept_future_leak=True to accept that"
    ahead = f"chooses the experts of a token by looking at later tokens, {accepted}"
    for gate in [gate for gate in moe.gates if gate in causal]:
        require(not gate.looks_ahead, moe.field_of(gate), gate.name, ahead)
    in_order = moe.drop_policy == "position" or moe.dispatch == "dropless"
    require(in_order, f"{_MOE}drop_policy", moe.drop_policy, f"lets later tokens displace earlier ones, {accepted}")
    retries = f"retries an assignment after those of later tokens, {accepted}"
    require(not moe.overflow_to_next, f"{_MOE}overflow_to_next", moe.overflow_to_next, retries)


def _check_group_size(config: Config) -> None:
    given = config.model.moe.group_size
    for name in ("sequence_length", "input_length") if config.model.encoder_layers else ("sequence_length",):
        length = getattr(config.data, name)
        tokens = config.train.microbatch_rows * length
        size = given or length
        holds = tokens % size == 0 and (size % length == 0 or length % size == 0)
        allowed = f"must divide or be a multiple of data.{name}={length}, and divide a microbatch's {tokens} tokens"
        require(holds, f"{_MOE}group_size", given, allowed)
        chunks = config.model.moe.exchange_chunks
        require(size % chunks == 0, f"{_MOE}exchange_chunks", chunks, f"must divide the {size} tokens of a group")


def validate_mesh(config: Config, sizes: Mapping[str, int]) -> None:
    """Check that everything split over mesh axes divides by their sizes.

    Args:
        sizes: devices per axis, without -1 (``mesh.shape``).

    Raises:
        ConfigError: a dimension does not divide.
    """

    def divides(axes: tuple[str, ...], field: str, value: int) -> None:
        shards = math.prod(sizes.get(axis, 1) for axis in axes)
        names = " x ".join(f"mesh.{axis}" for axis in axes)
        require(value % shards == 0, field, value, f"must be divisible by {names} = {shards}")

    batch_axes = ("data", "fsdp", "expert")
    rows = config.train.microbatch_rows
    divides(batch_axes, "train.batch_size / train.accumulation_steps", rows)
    if sizes.get("context", 1) > 1:
        _check_context(config, sizes)
    moe = config.model.moe
    unused = unread_settings(config.model)
    for field, axis in facts_of(Config, "split").items():
        if field not in unused and not (moe.gate is None and field.startswith(_MOE)):
            divides((axis,), field, operator.attrgetter(field)(config))
    for mixer in {kind.mixer for kind in layer_kinds(config.model)}:
        for field, axis in facts_of(type(mixer), "split").items():
            divides((axis,), f"{mixers.FIELD}.{field}", getattr(mixer, field))
    for ngrams in config.model.memory.hashes(config.model.vocab_size).values():
        divides(("fsdp",), "model.memory.rows: rows of a layer's table", ngrams.rows)
    if config.model.prediction_layers:  # their projection from 2 D to D is split over its outputs
        divides(("tensor",), "model.d_model", config.model.d_model)
    if moe.gate is None:
        return
    hosts, experts = moe.exchange_hosts, sizes["expert"]
    same = experts == 1 or experts % hosts == 0
    require(same, f"{_MOE}exchange_hosts", hosts, f"must divide mesh.expert = {experts}")
    for length in {config.data.sequence_length, config.data.input_length or config.data.sequence_length}:
        groups = rows * length // (moe.group_size or length)
        divides(batch_axes, f"{_MOE}group_size={moe.group_size}: number of groups", groups)


def _check_context(config: Config, sizes: Mapping[str, int]) -> None:
    """Check a mesh that splits rows: whole groups on each device, and nothing that needs a whole row on one device."""
    context = sizes["context"]
    train = config.train
    length = config.data.sequence_length
    field = f"with mesh.context={context}"
    rows = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    given = train.microbatch_rows
    require(
        given == rows, "train.batch_size / train.accumulation_steps", given, f"must be {rows}, one row each, {field}"
    )
    require(length % context == 0, "data.sequence_length", length, f"must be divisible by mesh.context={context}")
    size = config.model.moe.group_size or length
    require(
        config.model.moe.gate is None or length // context % size == 0,
        "model.moe.group_size",
        config.model.moe.group_size,
        f"must divide data.sequence_length / mesh.context = {length // context}",
    )
    require_ability(config.model, "context", field)
    for name, value, allowed in (
        ("model.encoder_layers", config.model.encoder_layers, 0),
        ("model.dropout", config.model.dropout, 0.0),
        ("train.sample_tokens", train.sample_tokens, 0),
    ):
        require(value == allowed, name, value, f"must be {allowed} {field}")
    allowed = f"must be causal {field}"
    require("context" in config.objective.abilities, FIELD, config.data.objective, allowed)
