"""Checks of a config against the sizes of a mesh."""

from __future__ import annotations

import typing

from moe.config.checks import require
from moe.config.schema import Config


def validate_mesh(config: Config, sizes: typing.Mapping[str, int]) -> None:
    """Check that everything split over mesh axes divides by their sizes.

    Args:
        config: resolved and validated.
        sizes: devices per axis, without -1 (``mesh.shape``).

    Raises:
        ConfigError: a dimension does not divide.
    """
    model, moe, train = config.model, config.model.moe, config.train

    def divides(axes: tuple[str, ...], field: str, value: int) -> None:
        shards = 1
        for axis in axes:
            shards *= sizes.get(axis, 1)
        names = " x ".join(f"mesh.{axis}" for axis in axes)
        require(value % shards == 0, field, value, f"must be divisible by {names} = {shards}")

    batch_axes = ("data", "fsdp", "expert")
    rows = train.batch_size // train.accumulation_steps
    divides(batch_axes, "train.batch_size / train.accumulation_steps", rows)
    if sizes.get("context", 1) > 1:
        _check_context(config, sizes)
    divides(("fsdp",), "model.d_model", model.d_model)
    for name in ("q_lora_rank", "kv_lora_rank"):
        divides(("fsdp",), f"model.{name}", getattr(model, name))
    for name in ("num_heads", "num_kv_heads", "d_ff", "vocab_size", "encoder_vocab_size"):
        divides(("tensor",), f"model.{name}", getattr(model, name))
    if moe.gate is None:
        return
    divides(("expert",), "model.moe.num_experts", moe.num_experts)
    divides(("fsdp",), "model.moe.latent_dim", moe.latent_dim)
    divides(("tensor",), "model.moe.d_ff", moe.d_ff)
    divides(("tensor",), "model.moe.shared_d_ff", moe.shared_d_ff)
    for length in {config.data.sequence_length, config.data.input_length or config.data.sequence_length}:
        groups = rows * length // (moe.group_size or length)
        divides(batch_axes, f"model.moe.group_size={moe.group_size}: number of groups", groups)


def _check_context(config: Config, sizes: typing.Mapping[str, int]) -> None:
    """Check a mesh that splits rows: whole groups on each device, and nothing that needs a whole row in one place."""
    context, train, length = sizes["context"], config.train, config.data.sequence_length
    field = f"with mesh.context={context}"
    rows = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    given = train.batch_size // train.accumulation_steps
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
    for name, value, allowed in (
        ("model.encoder_layers", config.model.encoder_layers, 0),
        ("data.objective", config.data.objective, "causal"),
        ("model.relative_buckets", config.model.relative_buckets, 0),
        ("model.dropout", config.model.dropout, 0.0),
        ("train.sample_tokens", train.sample_tokens, 0),
    ):
        require(value == allowed, name, value, f"must be {allowed} {field}")
