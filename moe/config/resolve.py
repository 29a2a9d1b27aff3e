"""Resolved configs: defaults that depend on other fields are filled in, then everything is checked."""

from __future__ import annotations

import dataclasses
import typing

import ml_collections

from moe.config.checks import check_model, check_run
from moe.config.moe_checks import check_moe
from moe.config.parse import build
from moe.config.references import code_fields, refuse_modules
from moe.config.schema import EMBEDDED_DOMAINS, Config, ModelConfig
from moe.fields import ConfigError


def from_config_dict(tree: object) -> Config:
    """Build the typed config of a tree, resolved and checked as far as possible without devices and data.

    Raises:
        ConfigError: an unknown field (with the nearest name), a wrong type, or an impossible value or combination.
    """
    return validate(resolve(build(Config, dict(_sections(tree).items()), "")))


def from_workdir_dict(tree: object) -> Config:
    """:func:`from_config_dict` for the content of a workdir's file, which imports no module that the user did not name.

    The optimizer and the writers may be such modules: reading a workdir makes neither.
    """
    refuse_modules({name: value for name, value in code_fields(tree).items() if name.startswith("model.")})
    return from_config_dict(tree)


def _sections(tree: object) -> dict[str, typing.Any] | ml_collections.ConfigDict:
    if not isinstance(tree, (dict, ml_collections.ConfigDict)):
        raise ConfigError(f"a config is an object with the sections of moe.config.Config, not {type(tree).__name__}")
    return tree


def resolve_model(config: typing.Any) -> ModelConfig:
    """:func:`resolve` for the config of a model alone, checked but for rules that only a run has.

    Raises:
        ConfigError: something else than a ModelConfig, or an impossible value or combination.
    """
    if not isinstance(config, ModelConfig):
        raise ConfigError(f"config must be a moe.ModelConfig, such as Config().model, not {type(config).__name__}")
    model = resolve(Config(model=config)).model
    check_model(model)
    return model


def resolve(config: Config) -> Config:
    """Fill fields whose default depends on others: ``moe.d_ff`` of 0, the domains of the embedded corpus, objective and
    input length of an encoder-decoder."""
    moe = config.model.moe
    if moe.d_ff == 0:
        moe = dataclasses.replace(moe, d_ff=config.model.d_ff)
    data = config.data
    if data.dataset == "embedded" and not data.domains:
        data = dataclasses.replace(data, domains=EMBEDDED_DOMAINS)
    if config.model.encoder_layers:
        objective = "span_corruption" if data.objective == "causal" else data.objective
        length = data.input_length or data.sequence_length
        data = dataclasses.replace(data, objective=objective, input_length=length)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe), data=data)


def validate(config: Config) -> Config:
    """Return a resolved config unchanged if it passes every check; see :func:`from_config_dict`."""
    check_model(config.model)
    check_run(config)
    if config.model.moe.gate is not None:
        check_moe(config)
    return config
