"""The second model of a run: the teacher of distillation, the reference of preferences and of a policy."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh

from moe.checkpoints import parameters as stored
from moe.checkpoints.workdir import read_config
from moe.config import Config, ConfigError, ModelConfig, TrainConfig, validate_mesh
from moe.data.tokenizer import Tokenizer
from moe.data.tokenizer_files import find_tokenizer
from moe.models.sampling import without_drops


def read_teacher(
    config: Config, mesh: Mesh, tokenizer: Tokenizer | None = None, step: int | None = None
) -> tuple[ModelConfig, dict[str, Any]] | None:
    """Model config of ``config.distill.teacher`` and its variables on the mesh; None without a teacher.

    Args:
        step: of the teacher's checkpoint (:func:`moe.checkpoints.pinned.pinned_steps`); None: its newest.

    Raises:
        ConfigError: no such checkpoint, another vocabulary, another kind of model, or one that does not fit the mesh.
    """
    workdir = config.distill.teacher
    if not workdir:
        return None
    model = read_config(workdir).model
    if model.vocab_size != config.model.vocab_size:
        raise ConfigError(f"model.vocab_size={config.model.vocab_size}: must be the teacher's {model.vocab_size}")
    kinds = ["an encoder-decoder" if of.encoder_layers else "decoder-only" for of in (model, config.model)]
    if kinds[0] != kinds[1]:
        raise ConfigError(f"distill.teacher={workdir!r}: is {kinds[0]}, and this model is {kinds[1]}")
    if model.encoder_vocab_size != config.model.encoder_vocab_size:
        raise ConfigError(f"model.encoder_vocab_size: must be the teacher's {model.encoder_vocab_size}")
    if tokenizer is not None:
        theirs = find_tokenizer(workdir, chat=config.objective.conversations)
        if theirs.model_bytes != tokenizer.model_bytes:
            raise ConfigError(f"distill.teacher={workdir!r}: has another tokenizer, so its ids mean other texts")
    if config.objective.has_reference and config.model.moe.dispatch == "dropless":
        model = without_drops(model)  # else the reference would differ from the same model here
    config.objective.check_reference(config, model)
    _check_fit(config, model, mesh)
    return model, stored.read_variables(workdir, model, mesh=mesh, step=step)


def _check_fit(config: Config, model: ModelConfig, mesh: Mesh) -> None:
    """Check that a teacher fits the mesh and the rows of the run. Raises ConfigError."""
    data = config.data
    if config.objective.has_reference:
        data = dataclasses.replace(data, objective="causal", chat_template="")
    model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, accept_future_leak=True))
    rows, parts = config.train.batch_size, config.train.accumulation_steps
    train = TrainConfig(batch_size=rows, accumulation_steps=parts, sample_tokens=0)
    try:
        validate_mesh(Config(model=model, data=data, train=train), mesh.shape)
    except ConfigError as error:
        raise ConfigError(f"distill.teacher={config.distill.teacher!r}: {error}") from error
