"""Checks of single values and combinations that need neither devices nor a gate."""

from __future__ import annotations

import dataclasses
import itertools
import typing

from moe.config.schema import SCHEMES, Config, ConfigError, MeshConfig, ModelConfig


def require(holds: bool, field: str, value: typing.Any, allowed: str) -> None:
    """Raises ConfigError, naming the field, its value and what is allowed, unless the condition holds."""
    if not holds:
        raise ConfigError(f"{field}={value!r}: {allowed}")


def check_path(field: str, path: str) -> None:
    """Refuses a path of a kind that etils.epath does not read. Raises ConfigError."""
    scheme, found, _ = path.partition("://")
    require(
        not found or scheme in SCHEMES,
        field,
        path,
        f"must be a path, or one of {', '.join(SCHEMES)} before ://",
    )


def require_at_least(section: str, node: typing.Any, least: float, *names: str) -> None:
    """Refuses fields of a section that are below a bound."""
    for name in names:
        value = getattr(node, name)
        require(value >= least, f"{section}{name}", value, f"must be at least {least}")


def require_layers(field: str, layers: tuple[int, ...], num_layers: int) -> None:
    """Refuses a tuple that is not an increasing selection of layer numbers."""
    increasing = all(low < high for low, high in itertools.pairwise(layers))
    inside = all(0 <= layer < num_layers for layer in layers)
    require(increasing and inside, field, layers, f"must be increasing layer numbers from 0 to {num_layers - 1}")


def check_model(model: ModelConfig) -> None:
    """Checks the model section, MoE fields apart."""

    require_at_least("model.", model, 1, "vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff")
    require(model.num_layers <= 10_000, "model.num_layers", model.num_layers, "must be at most 10000")
    require_at_least("model.", model, 0, "sliding_window", "clip_qkv")
    require(
        model.head_dim >= 2 and model.head_dim % 2 == 0,
        "model.head_dim",
        model.head_dim,
        "must be even: rotary positions turn pairs",
    )
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
    for name in ("norm_eps", "rope_theta", "init_scale"):
        require(getattr(model, name) > 0, f"model.{name}", getattr(model, name), "must be positive")


def check_run(config: Config) -> None:
    """Checks data, training, optimizer, start and mesh sections."""
    data, train, optimizer = config.data, config.train, config.optimizer
    require(config.seed >= 0, "seed", config.seed, "must be at least 0")
    require(0 <= config.seed < 2**31, "seed", config.seed, "must be in [0, 2^31)")
    require_at_least("data.", data, 2, "sequence_length")
    require_at_least("data.", data, 1, "shuffle_window", "heldout_rows")
    require(
        data.streams >= 0 and (data.streams == 0 or train.batch_size % data.streams == 0),
        "data.streams",
        data.streams,
        f"must divide train.batch_size={train.batch_size}, or be 0 for gcd(8, batch_size)",
    )
    require(all(data.dataset.split(",")), "data.dataset", data.dataset, "must name a dataset, or several, a,b")
    require(data.directory != "", "data.directory", data.directory, "must name a folder; '.' is the current one")
    for name in data.dataset.split(","):
        check_path("data.dataset", name)
    check_path("data.directory", data.directory)
    check_path("data.tokenizer", data.tokenizer)
    check_path("start.checkpoint", config.start.checkpoint)
    check_path("distill.teacher", config.distill.teacher)
    require(
        len(set(data.domains)) == len(data.domains) and all(data.domains),
        "data.domains",
        data.domains,
        "must name each domain once",
    )
    require(
        len(data.weights) in (0, len(data.domains) or len(data.weights)) and all(weight > 0 for weight in data.weights),
        "data.weights",
        data.weights,
        f"must be empty or one positive share for each of the {len(data.domains)} domains",
    )
    require_at_least("train.", train, 1, "num_steps", "batch_size", "accumulation_steps", "log_every", "eval_every")
    require_at_least("train.", train, 1, "save_every", "keep_checkpoints")
    require_at_least("train.", train, 1, "max_skipped_steps")
    require_at_least("train.", train, 0, "sample_tokens", "keep_every", "spike_sigmas")
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
    require_at_least("optimizer.", optimizer, 0, "warmup_steps", "weight_decay", "gradient_clip")
    require(optimizer.learning_rate > 0, "optimizer.learning_rate", optimizer.learning_rate, "must be positive")
    require(optimizer.eps > 0, "optimizer.eps", optimizer.eps, "must be positive")
    for name in ("b1", "b2"):
        require(0 <= getattr(optimizer, name) < 1, f"optimizer.{name}", getattr(optimizer, name), "must be in [0, 1)")
    require(config.start.expert_noise >= 0, "start.expert_noise", config.start.expert_noise, "must be at least 0")
    soft = config.distill.soft_share
    require(0 <= soft <= 1, "distill.soft_share", soft, "must be in [0, 1]")
    fraction = optimizer.final_learning_rate_fraction
    require(0 <= fraction <= 1, "optimizer.final_learning_rate_fraction", fraction, "must be in [0, 1]")
    require(
        optimizer.warmup_steps < train.num_steps,
        "optimizer.warmup_steps",
        optimizer.warmup_steps,
        f"must be below train.num_steps={train.num_steps}",
    )
    for axis in dataclasses.fields(MeshConfig):
        size = getattr(config.mesh, axis.name)
        require(size == -1 or size >= 1, f"mesh.{axis.name}", size, "must be positive, or -1 to fill")
    filled = [axis.name for axis in dataclasses.fields(MeshConfig) if getattr(config.mesh, axis.name) == -1]
    require(len(filled) <= 1, "mesh", filled, "only one axis can be -1")


def validate_mesh(config: Config, sizes: typing.Mapping[str, int]) -> None:
    """Checks a validated config against a mesh.

    Args:
        config: resolved.
        sizes: devices per axis, all filled in (``mesh.shape``).

    Raises:
        ConfigError: something that would be split does not divide.
    """
    model, moe, train = config.model, config.model.moe, config.train

    def divides(axes: tuple[str, ...], field: str, value: int) -> None:
        shards = 1
        for axis in axes:
            shards *= sizes[axis]
        names = " x ".join(f"mesh.{axis}" for axis in axes)
        require(value % shards == 0, field, value, f"must be divisible by {names} = {shards}")

    tokens = ("data", "fsdp", "expert")
    rows = train.batch_size // train.accumulation_steps
    divides(tokens, "train.batch_size / train.accumulation_steps", rows)
    divides(("fsdp",), "model.d_model", model.d_model)
    divides(("tensor",), "model.num_heads", model.num_heads)
    divides(("tensor",), "model.num_kv_heads", model.num_kv_heads)
    divides(("tensor",), "model.d_ff", model.d_ff)
    divides(("tensor",), "model.vocab_size", model.vocab_size)
    if moe.gate == "none":
        return
    divides(("expert",), "model.moe.num_experts", moe.num_experts)
    divides(("tensor",), "model.moe.d_ff", moe.d_ff)
    divides(("tensor",), "model.moe.shared_d_ff", moe.shared_d_ff)
    groups = rows * config.data.sequence_length // (moe.group_size or config.data.sequence_length)
    divides(tokens, f"model.moe.group_size={moe.group_size} makes a number of groups which", groups)
