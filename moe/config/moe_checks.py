"""Rules of ``model.moe`` that depend on the rest of the model, on rows and batches, or on other gates by name."""

from __future__ import annotations

from moe.config.checks import require, require_layers
from moe.config.layer_pattern import sparse_layers
from moe.config.moe_section import MoEConfig
from moe.config.registry import with_layer_gate
from moe.config.schema import Config, ModelConfig
from moe.fields import ConfigError
from moe.routing.interface import Gate

_MOE = "model.moe."


def check_moe(config: Config) -> None:
    """Check the MoE section of a resolved config; see also :class:`moe.config.MoEConfig`.

    Raises:
        ConfigError: an impossible combination.
    """
    moe = config.model.moe
    assert moe.gate is not None
    _check_causality(moe, moe.gate)
    allowed = "must be einsum: soft_moe mixes all tokens into every slot and moves no single token"
    _field(moe, "dispatch", moe.gate.router != "slots" or moe.dispatch == "einsum", allowed)
    _check_layers(config.model)
    _check_layer_gates(config.model)
    _check_group_size(config)


def _field(moe: MoEConfig, name: str, holds: bool, allowed: str) -> None:
    """Refuse the value of one field unless the condition holds."""
    require(holds, f"{_MOE}{name}", getattr(moe, name), allowed)


def _check_causality(moe: MoEConfig, gate: Gate) -> None:
    accepted = f"which a causal model must not see; set {_MOE}accept_future_leak=True to accept that"
    ahead = f"chooses the experts of a token by looking at later tokens, {accepted}"
    require(moe.accept_future_leak or not gate.looks_ahead, f"{_MOE}gate", gate.name, ahead)
    _field(
        moe,
        "drop_policy",
        moe.accept_future_leak or moe.drop_policy == "position" or moe.dispatch == "dropless",
        f"lets later tokens displace earlier ones, {accepted}",
    )
    retries = f"retries an assignment after those of later tokens, {accepted}"
    _field(moe, "overflow_to_next", moe.accept_future_leak or not moe.overflow_to_next, retries)


def _check_layers(model: ModelConfig) -> None:
    moe, num_layers = model.moe, model.encoder_layers + model.num_layers
    require_layers(f"{_MOE}layers", moe.layers, num_layers)
    require(
        not moe.layers or (moe.every == 1 and moe.first_dense == 0),
        f"{_MOE}layers",
        moe.layers,
        f"lists the MoE layers itself: leave {_MOE}every at 1 and {_MOE}first_dense at 0",
    )
    require(
        any(sparse_layers(model)),
        f"{_MOE}every={moe.every}, {_MOE}first_dense",
        moe.first_dense,
        f"leave no MoE layer among {num_layers}; use {_MOE}gate=none for a dense model",
    )


def _check_layer_gates(model: ModelConfig) -> None:
    moe, k = model.moe, model.moe.experts_per_token
    if not moe.layer_gates:
        return
    count = sum(sparse_layers(model))
    _field(moe, "layer_gates", len(moe.layer_gates) <= count, f"must be at most the {count} MoE layers")
    for name in {*moe.layer_gates, moe.gate_name}:
        try:
            gate = with_layer_gate(model, name).moe.gate
        except ConfigError as error:
            raise ConfigError(f"{_MOE}layer_gates={name!r}: {str(error).replace('model.moe.gate.', '')}") from error
        found = gate is not None and not gate.lists_all and gate.experts_per_token(moe.num_experts) == k
        require(found, f"{_MOE}layer_gates", name, f"must choose {k} experts")
        assert gate is not None
        assert moe.gate is not None
        update, updates = gate.state.update, ("none", moe.gate.state.update)
        require(update in updates, f"{_MOE}layer_gates", name, f"needs a bias of {update} in all layers")


def _check_group_size(config: Config) -> None:
    moe = config.model.moe
    for name in ("sequence_length", "input_length") if config.model.encoder_layers else ("sequence_length",):
        length = getattr(config.data, name)
        tokens = config.train.batch_size // config.train.accumulation_steps * length
        size = moe.group_size or length
        require(
            tokens % size == 0 and (size % length == 0 or length % size == 0),
            f"{_MOE}group_size",
            moe.group_size,
            f"must divide or be a multiple of data.{name}={length}, and divide a microbatch's {tokens} tokens",
        )
