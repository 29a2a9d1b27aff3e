"""Checks of single values and combinations that need neither devices nor a gate."""

from __future__ import annotations

import dataclasses
import itertools
import re

from moe.config.schema import (
    SCHEMES,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from moe.fields import LARGEST, check_all_bounds, require


def check_path(field: str, path: str) -> None:
    """Raise a ConfigError for a path with a scheme that etils.epath does not read, or without a bucket."""
    scheme, found, rest = path.partition("://")
    allowed = f"must be a path, or one of {', '.join(SCHEMES)} before :// and a bucket"
    require(not found or (scheme in SCHEMES and rest.strip("/") != ""), field, path, allowed)


#: Largest number of tokens in the shuffle buffers, and in one domain's held-out rows; both are kept in memory.
_MAX_BUFFERED_TOKENS, _MAX_HELDOUT_TOKENS = 2**28, 2**24


def require_layers(field: str, layers: tuple[int, ...], num_layers: int) -> None:
    """Raise a ConfigError unless a tuple is an increasing selection of layer numbers."""
    increasing = all(low < high for low, high in itertools.pairwise(layers))
    inside = all(0 <= layer < num_layers for layer in layers)
    require(increasing and inside, field, layers, f"must be increasing layer numbers from 0 to {num_layers - 1}")


def check_model(model: ModelConfig) -> None:
    """Check the model section except the rules of ``model.moe``."""
    check_all_bounds(model, "model.")
    require(
        not model.prediction_layers or not (model.encoder_layers or model.relative_buckets),
        "model.prediction_layers",
        model.prediction_layers,
        "must be 0 with model.encoder_layers or model.relative_buckets",
    )
    require(
        model.head_dim >= 2 - bool(model.relative_buckets) and (model.head_dim % 2 == 0 or model.relative_buckets > 0),
        "model.head_dim",
        model.head_dim,
        "must be even: rotary positions rotate pairs of dimensions",
    )
    _check_stacks(model)
    _check_rope(model)
    if model.kv_lora_rank:
        _check_latent_attention(model)
    require(
        model.num_heads % model.num_kv_heads == 0,
        "model.num_kv_heads",
        model.num_kv_heads,
        f"must divide model.num_heads={model.num_heads}",
    )
    require_layers("model.sliding_window_layers", model.sliding_window_layers, model.num_layers)
    require(
        model.sliding_window > 0 or not model.sliding_window_layers,
        "model.sliding_window_layers",
        model.sliding_window_layers,
        "needs model.sliding_window above 0",
    )


def _check_stacks(model: ModelConfig) -> None:
    buckets, distance = model.relative_buckets, model.relative_max_distance
    defaults = (("norms", "before"), ("residual_scale", 1.0), ("attention_scale", 0.0)) if model.encoder_layers else ()
    for name, default in defaults:
        value = getattr(model, name)
        require(value == default, f"model.{name}", value, f"must be {default} where model.encoder_layers is set")
    least = 4 if model.encoder_layers else 2  # half of an encoder's are for keys after the query, half of those exact
    require(
        buckets == 0 or least <= buckets <= 2**16,
        "model.relative_buckets",
        buckets,
        f"must be 0 for rotary positions, or from {least} to 65536",
    )
    require(
        buckets == 0 or buckets // 2 < distance <= 2**20,
        "model.relative_max_distance",
        distance,
        f"must be above half of relative_buckets={buckets} and at most {2**20}",
    )
    require(
        model.encoder_layers > 0 or model.encoder_vocab_size == 0,
        "model.encoder_vocab_size",
        model.encoder_vocab_size,
        "needs model.encoder_layers above 0",
    )
    for name in ("kv_lora_rank", "sliding_window"):
        value = getattr(model, name)
        only = "model.encoder_layers" if model.encoder_layers else "model.relative_buckets"
        allowed = value == 0 or not (model.encoder_layers or (buckets and name == "kv_lora_rank"))
        require(allowed, f"model.{name}", value, f"must be 0 where {only} is set")


def _check_rope(model: ModelConfig) -> None:
    require(
        0 <= model.rope_dim <= model.head_dim and model.rope_dim % 2 == 0,
        "model.rope_dim",
        model.rope_dim,
        f"must be even and at most model.head_dim={model.head_dim}, or 0 for all",
    )
    scaling = model.rope_scaling
    require(
        scaling.original_length >= 2 or scaling.kind in ("none", "linear"),
        "model.rope_scaling.original_length",
        scaling.original_length,
        "must be at least 2",
    )
    size = model.rope_dim or model.head_dim
    require(
        scaling.kind != "dynamic" or size > 2, "model.rope_scaling.kind", scaling.kind, "needs rotated heads above 2"
    )
    for name in ("short_factors", "long_factors"):
        value = getattr(scaling, name)
        require(
            all(factor > 0 for factor in value) and (scaling.kind != "longrope" or len(value) == size // 2),
            f"model.rope_scaling.{name}",
            value,
            f"must be positive, and one for each of the {size // 2} rotated pairs for longrope",
        )
    require(
        scaling.high_freq_factor > scaling.low_freq_factor,
        "model.rope_scaling.high_freq_factor",
        scaling.high_freq_factor,
        f"must be above low_freq_factor={scaling.low_freq_factor}, which must be positive",
    )


def _check_latent_attention(model: ModelConfig) -> None:
    require(model.rope_dim >= 2, "model.rope_dim", model.rope_dim, "must be at least 2")
    require(model.value_dim >= 1, "model.value_dim", model.value_dim, "must be at least 1")
    require(
        model.rope_dim < model.head_dim,
        "model.rope_dim",
        model.rope_dim,
        f"must be below model.head_dim={model.head_dim} where model.kv_lora_rank is set",
    )
    require(
        model.num_kv_heads == model.num_heads,
        "model.num_kv_heads",
        model.num_kv_heads,
        f"must be model.num_heads={model.num_heads} where model.kv_lora_rank is set",
    )
    absent = {"qk_norm": "none", "attention_bias": "none", "attention_sinks": False, "clip_qkv": 0.0}
    for name, none in (absent | {"attention_scale": 0.0}).items():
        value = getattr(model, name)
        require(value == none, f"model.{name}", value, f"must be {none} where model.kv_lora_rank is set")


def check_run(config: Config) -> None:
    """Check all sections except the model, as far as possible without devices and data."""
    check_all_bounds(config, "")
    require(0 <= config.seed < 2**31, "seed", config.seed, "must be in [0, 2^31)")
    _check_data(config.data, config.train)
    _check_objective(config.model, config.data)
    tokens = config.train.batch_size * config.data.sequence_length
    require(tokens <= LARGEST, "train.batch_size * data.sequence_length", tokens, f"must be at most {LARGEST}")
    for field, path in (
        ("data.directory", config.data.directory),
        ("data.tokenizer", config.data.tokenizer),
        ("start.checkpoint", config.start.checkpoint),
        ("distill.teacher", config.distill.teacher),
        ("train.compilation_cache", config.train.compilation_cache),
    ):
        check_path(field, path)
    _check_train(config.train)
    _check_optimizer(config.optimizer, config.train)
    teacher, needed = config.distill.teacher, config.data.objective == "preferences"
    require(bool(teacher) or not needed, "distill.teacher", teacher, "must be the reference model of the preferences")
    _check_lora(config)
    _check_mesh_sizes(config.mesh)


def _check_lora(config: Config) -> None:
    lora, start, rank = config.lora, config.start, config.lora.rank
    if not rank:
        return
    require(bool(start.checkpoint), "lora.rank", rank, "needs start.checkpoint, whose parameters the adapters are of")
    require(bool(lora.parts), "lora.parts", lora.parts, "must name at least one part")
    require(
        not config.optimizer.frozen,
        "optimizer.frozen",
        config.optimizer.frozen,
        "must be empty with lora.rank; lora.parts and lora.trained say what is trained",
    )
    changed = [
        field.name
        for field in dataclasses.fields(start)
        if field.name != "checkpoint" and getattr(start, field.name) != field.default
    ]
    require(not changed, "lora.rank", rank, f"adapts start.checkpoint as it is; unset start.{', start.'.join(changed)}")


def _check_data(data: DataConfig, train: TrainConfig) -> None:
    length = data.sequence_length
    for name, most in (("shuffle_window", _MAX_BUFFERED_TOKENS), ("heldout_rows", _MAX_HELDOUT_TOKENS)):
        rows = getattr(data, name)
        allowed = f"must be at most {most // length} with data.sequence_length={length}: the rows are kept in memory"
        require(rows * length <= most, f"data.{name}", rows, allowed)
    require(
        data.streams == 0 or train.batch_size % data.streams == 0,
        "data.streams",
        data.streams,
        f"must divide train.batch_size={train.batch_size}, or be 0 for gcd(8, batch_size)",
    )
    require(
        all(data.dataset.split(",")),
        "data.dataset",
        data.dataset,
        "must name a dataset, or several separated by commas",
    )
    for name in data.dataset.split(","):
        check_path("data.dataset", name)
    require(data.directory != "", "data.directory", data.directory, "must name a folder; '.' is the current one")
    require(
        len(set(data.domains)) == len(data.domains) and all(data.domains),
        "data.domains",
        data.domains,
        "must name each domain once",
    )
    require(
        all(re.fullmatch(r"\.\w+", suffix) for suffix in data.text_suffixes)
        and not {".jsonl", ".parquet", ".arrow"} & set(data.text_suffixes),
        "data.text_suffixes",
        data.text_suffixes,
        "must be suffixes as '.tex', of files that are text as they stand",
    )
    require(
        len(data.weights) in (0, len(data.domains) or len(data.weights)) and all(weight > 0 for weight in data.weights),
        "data.weights",
        data.weights,
        f"must be empty or one positive share for each of the {len(data.domains)} domains",
    )


def _check_objective(model: ModelConfig, data: DataConfig) -> None:
    encoder = model.encoder_layers
    without = data.conversations or data.objective in ("causal", "prefix_lm")
    if data.conversations:
        require(encoder == 0, "data.objective", data.objective, "needs a decoder-only model (model.encoder_layers=0)")
    require(
        not data.chat_template or data.conversations,
        "data.chat_template",
        data.chat_template,
        "must be empty unless data.objective is chat or preferences",
    )
    require(encoder > 0 or without, "data.objective", data.objective, "needs model.encoder_layers above 0")
    require(
        data.input_length >= 2 if encoder else data.input_length == 0,
        "data.input_length",
        data.input_length,
        f"must be {'at least 2' if encoder else '0'} where model.encoder_layers={encoder}",
    )
    if data.objective == "prefix_lm" and not encoder:
        for name in ("sliding_window", "kv_lora_rank"):
            value = getattr(model, name)
            require(value == 0, f"model.{name}", value, "must be 0 where data.objective is prefix_lm")


def _check_train(train: TrainConfig) -> None:
    require(
        train.keep_every % train.save_every == 0,
        "train.keep_every",
        train.keep_every,
        f"must be 0 or a multiple of train.save_every={train.save_every}",
    )
    require(
        train.batch_size % train.accumulation_steps == 0,
        "train.accumulation_steps",
        train.accumulation_steps,
        f"must divide train.batch_size={train.batch_size}",
    )


def _check_optimizer(optimizer: OptimizerConfig, train: TrainConfig) -> None:
    if optimizer.moment_dtype == "bfloat16":
        require(
            optimizer.name in ("adamw", "muon"),
            "optimizer.moment_dtype",
            optimizer.moment_dtype,
            f"must be float32 with optimizer.name={optimizer.name}; adamw and muon have bfloat16 moments",
        )
        # A second moment changes by up to a share 1 - b2 of itself; bfloat16 rounds changes below 1/256 away.
        require(
            optimizer.b2 <= 0.99,
            "optimizer.moment_dtype",
            optimizer.moment_dtype,
            f"must be float32 with optimizer.b2={optimizer.b2}; bfloat16 keeps second moments up to b2=0.99",
        )
    require(
        optimizer.warmup_steps < train.num_steps,
        "optimizer.warmup_steps",
        optimizer.warmup_steps,
        f"must be below train.num_steps={train.num_steps}",
    )
    require(
        optimizer.decay_steps <= train.num_steps - optimizer.warmup_steps
        and (optimizer.decay_steps == 0 or optimizer.schedule == "wsd"),
        "optimizer.decay_steps",
        optimizer.decay_steps,
        "must be 0 unless optimizer.schedule is 'wsd', and at most train.num_steps - optimizer.warmup_steps",
    )


def _check_mesh_sizes(mesh: MeshConfig) -> None:
    axes = [field.name for field in dataclasses.fields(mesh)]
    for axis in axes:
        size = getattr(mesh, axis)
        require(size == -1 or size >= 1, f"mesh.{axis}", size, "must be positive, or -1 to use all remaining devices")
    filled = [axis for axis in axes if getattr(mesh, axis) == -1]
    require(len(filled) <= 1, "mesh", filled, "only one axis can be -1")
