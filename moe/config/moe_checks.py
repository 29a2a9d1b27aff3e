"""Checks of ``model.moe`` against its gate."""

from __future__ import annotations

import dataclasses

from moe.config.checks import require, require_at_least, require_at_most, require_fractions, require_layers
from moe.config.layer_pattern import sparse_layers
from moe.config.registry import GATE_FIELDS, find_layer, flat_fields, gate_of, with_layer_gate
from moe.config.schema import Config, MoEConfig
from moe.fields import ConfigError
from moe.routing.gates import Balanced, Scored, Selecting
from moe.routing.interface import Gate

_MOE = "model.moe."


def check_moe(config: Config) -> None:
    """Check the MoE section of a resolved config.

    Raises:
        ConfigError: an impossible value, or a setting that the gate does not read.
    """
    moe = config.model.moe
    gate = find_layer(moe.gate).gate
    require_at_least(_MOE, moe, 1, "num_experts", "experts_per_token", "d_ff", "every", "slots_per_expert")
    require_at_least(_MOE, moe, 1, "scores_per_group")
    require_at_least(_MOE, moe, 0, "shared_d_ff", "first_dense", "group_size", "importance_weight", "load_weight")
    require_at_least(_MOE, moe, 0, "expert_capacity", "bias_update_rate", "latent_dim", "null_balance")
    require_at_least(_MOE, moe, 0, "load_balancing_weight", "device_balance_weight", "z_loss_weight")
    require_at_least(_MOE, moe, 0, "zero_experts", "copy_experts", "constant_experts")
    require_at_most(_MOE, moe)
    for name in ("capacity_factor", "eval_capacity_factor"):
        _field(moe, name, getattr(moe, name) > 0, "must be positive")
    require_fractions(_MOE, moe, "jitter", "expert_dropout")
    _field(moe, "shared_gate", moe.shared_d_ff > 0 or not moe.shared_gate, "needs shared_d_ff above 0")
    _field(moe, "bias", moe.bias == "none" or gate.router != "slots", "must be none with the gate soft_moe")
    _check_experts_per_token(moe, gate)
    _check_expert_groups(moe, gate)
    _check_gate_fields(moe, gate)
    _check_scores(moe, gate)
    _check_null_experts(moe, gate)
    _check_dispatch(moe, gate)
    _check_layers(config)
    _check_layer_gates(config)
    _check_group_size(config)
    gate_of(moe).check_experts(moe.num_experts, moe.null_experts)


def _field(moe: MoEConfig, name: str, holds: bool, allowed: str) -> None:
    """Refuse the value of one field unless the condition holds."""
    require(holds, f"{_MOE}{name}", getattr(moe, name), allowed)


def _check_experts_per_token(moe: MoEConfig, gate: Gate) -> None:
    k = moe.experts_per_token
    _field(moe, "experts_per_token", k <= moe.num_experts, f"must be at most num_experts={moe.num_experts}")
    if "k" not in {field.name for field in dataclasses.fields(gate)}:
        fixed = gate.experts_per_token(moe.num_experts)
        _field(moe, "experts_per_token", k == fixed, f"the gate {moe.gate!r} exists for {fixed} only")
    always_one = k == 1 < moe.num_experts and moe.renormalise == 1 and isinstance(gate, Scored)
    require(
        not always_one or isinstance(gate, Balanced),  # a benchmark's own constants
        f"{_MOE}experts_per_token=1, {_MOE}renormalise",
        moe.renormalise,
        "the only weight is then always 1 and the router gets no gradient; use renormalise=0 or more experts per token",
    )


def _check_expert_groups(moe: MoEConfig, gate: Gate) -> None:
    groups, kept = moe.expert_groups, moe.kept_expert_groups
    divides = groups >= 1 and moe.num_experts % groups == 0
    _field(moe, "expert_groups", divides, f"must be at least 1 and divide num_experts={moe.num_experts}")
    _field(moe, "kept_expert_groups", 1 <= kept <= groups, f"must be from 1 to expert_groups={groups}")
    all_groups = f"the gate {moe.gate!r} chooses from all groups: leave it at -1"
    _field(moe, "kept_expert_groups", isinstance(gate, Selecting) or kept == groups, all_groups)
    available = kept * moe.num_experts // groups
    allowed = f"must be at most the {available} experts of kept_expert_groups={kept} of expert_groups={groups}"
    _field(moe, "experts_per_token", moe.experts_per_token <= available, allowed)


def _check_gate_fields(moe: MoEConfig, gate: Gate) -> None:
    """A field that only other gates read must keep its default."""
    slots, noisy = gate.router == "slots", gate.router == "noisy"
    if gate.router == "none":
        no_router = f"the gate {moe.gate!r} has no router"
        for name in ("jitter", "load_balancing_weight", "z_loss_weight", "importance_weight", "device_balance_weight"):
            _field(moe, name, getattr(moe, name) == 0, f"must be 0: {no_router}")
        _field(moe, "router_dtype", moe.router_dtype == "float32", no_router)
        _field(moe, "bias", moe.bias != "router", no_router)
    constant = f"must be 0: with the gate {moe.gate!r} every token goes to every expert and the loss is constant"
    _field(moe, "load_balancing_weight", hasattr(gate, "k") or moe.load_balancing_weight == 0, constant)
    grouped, layer = moe.expert_groups > 1, find_layer(moe.gate)
    defaults = flat_fields(layer, moe.num_experts)
    _field(moe, "device_balance_weight", grouped or moe.device_balance_weight == 0, "needs expert_groups above 1")
    ranks = grouped or moe.scores_per_group in (1, defaults["scores_per_group"])
    _field(moe, "scores_per_group", ranks, "needs expert_groups above 1")
    for name in ("capacity_factor", "eval_capacity_factor") if slots else ():
        own = getattr(moe, name) == defaults[name]
        _field(moe, name, own, "soft_moe has slots_per_expert instead: leave it at -1")
    no_noise = "needs the gate noisy_topk: the load has no gradient without its noise"
    _field(moe, "load_weight", moe.load_weight == 0 or noisy, no_noise)
    no_bias = moe.bias_update == "none" and moe.bias_update_rate > 0
    _field(moe, "bias_update_rate", not no_bias, f"needs {_MOE}bias_update of sign or quantile")
    _field(moe, "slots_per_expert", moe.slots_per_expert == 1 or slots, "needs the gate soft_moe")
    _field(
        moe,
        "gate",
        moe.accept_future_leak or not gate.looks_ahead,
        "chooses the experts of a token by looking at later tokens, which a causal model must not see; "
        f"set {_MOE}accept_future_leak=True to accept that",
    )


def _check_scores(moe: MoEConfig, gate: Gate) -> None:
    """Fields of top-k gates."""
    _field(moe, "renormalise", moe.renormalise in (0, 1), "must be 0, 1 or -1 (the gate's)")
    defaults, fields = flat_fields(find_layer(moe.gate), moe.num_experts), {f.name for f in dataclasses.fields(gate)}
    for name in sorted(set(GATE_FIELDS) - {"experts_per_token", "slots_per_expert"}):
        # The number of groups is read by the device-level balance loss too.
        free = bool(fields.intersection(GATE_FIELDS[name])) or name.endswith("expert_groups")
        own = defaults[name]
        fits = free or getattr(moe, name) == own
        _field(moe, name, fits, f"must be {own}: the gate {moe.gate!r} does not read it")
    every_group, update = moe.kept_expert_groups == moe.expert_groups, moe.bias_update
    allowed = f"must be none, sign or quantile with the gate {moe.gate!r}"
    _field(moe, "bias_update", not isinstance(gate, Selecting) or update in ("none", "sign", "quantile"), allowed)
    some_left = moe.experts_per_token < moe.num_experts + moe.null_experts
    allowed = "needs kept_expert_groups=expert_groups, and experts_per_token below the number of experts"
    _field(moe, "bias_update", update != "quantile" or (every_group and some_left), allowed)
    only_noise = moe.load_weight == 0 or (every_group and update == "none")
    allowed = "needs bias_update=none and kept_expert_groups=expert_groups: only the noise may decide who is chosen"
    _field(moe, "load_weight", only_noise, allowed)


def _check_null_experts(moe: MoEConfig, gate: Gate) -> None:
    require(
        moe.null_experts == 0 or (not gate.lists_all and moe.expert_groups == 1),
        f"{_MOE}zero_experts + copy_experts + constant_experts",
        moe.null_experts,
        "must be 0 unless each token chooses K experts, with expert_groups=1",
    )
    own = moe.null_experts > 0 or moe.null_balance in (1, find_layer(moe.gate).null_balance)
    _field(moe, "null_balance", own, "needs zero_experts, copy_experts or constant_experts")


def _check_layer_gates(config: Config) -> None:
    moe, k = config.model.moe, config.model.moe.experts_per_token
    count = sum(sparse_layers(config.model))
    _field(moe, "layer_gates", len(moe.layer_gates) <= count, f"must be at most the {count} MoE layers")
    for name in {*moe.layer_gates, *((moe.gate,) if moe.layer_gates else ())}:
        gate, own = find_layer(name).gate, name == moe.gate
        fixed = "k" not in {field.name for field in dataclasses.fields(gate)}
        update, renormalises = gate.state.update, getattr(gate, "renormalise", False)
        for allowed, why in (
            (
                not gate.lists_all and (not fixed or gate.experts_per_token(moe.num_experts) == k),
                f"must choose {k} experts",
            ),
            (own or update in ("none", moe.bias_update), f"needs bias_update={update} in all layers"),
            (own or k > 1 or not renormalises, "renormalises its weights, which needs experts_per_token above 1"),
        ):
            require(allowed, f"{_MOE}layer_gates", name, why)
        layer = gate_of(with_layer_gate(config.model, name).moe)
        try:
            layer.check_experts(moe.num_experts, moe.null_experts)
        except ConfigError as error:
            raise ConfigError(f"{_MOE}layer_gates={name!r}: {str(error).replace('model.moe.gate.', '')}") from error


def _check_dispatch(moe: MoEConfig, gate: Gate) -> None:
    by_position, dropless = moe.drop_policy == "position", moe.dispatch == "dropless"
    allowed = f"must be position: the gate {moe.gate!r} drops no assignment"
    _field(moe, "drop_policy", by_position or not gate.looks_ahead, allowed)
    _field(
        moe,
        "drop_policy",
        by_position or dropless or moe.accept_future_leak,
        "lets later tokens displace earlier ones, which a causal model must not see; "
        f"set {_MOE}accept_future_leak=True to accept that",
    )
    allowed = "must be einsum: soft_moe mixes all tokens into every slot and moves no single token"
    _field(moe, "dispatch", gate.router != "slots" or moe.dispatch == "einsum", allowed)
    allowed = "needs a dispatch with a capacity (gather or einsum) and a gate other than soft_moe"
    _field(moe, "expert_capacity", moe.expert_capacity == 0 or not (gate.router == "slots" or dropless), allowed)
    enough_experts = 2 * moe.experts_per_token <= moe.num_experts
    _field(
        moe,
        "overflow_to_next",
        not moe.overflow_to_next or (enough_experts and not gate.lists_all and not dropless),
        "needs num_experts >= 2 * experts_per_token, a dispatch with a capacity (gather or einsum), and a gate in "
        "which tokens choose their experts",
    )
    _field(
        moe,
        "overflow_to_next",
        not moe.overflow_to_next or moe.null_experts == 0,
        "needs experts of one kind: set zero_experts, copy_experts and constant_experts to 0",
    )
    _field(
        moe,
        "overflow_to_next",
        not moe.overflow_to_next or moe.accept_future_leak,
        "retries an assignment after those of later tokens, which a causal model must not see; "
        f"set {_MOE}accept_future_leak=True to accept that",
    )


def _check_layers(config: Config) -> None:
    moe, num_layers = config.model.moe, config.model.encoder_layers + config.model.num_layers
    require_layers(f"{_MOE}layers", moe.layers, num_layers)
    require(
        not moe.layers or (moe.every == 1 and moe.first_dense == 0),
        f"{_MOE}layers",
        moe.layers,
        f"lists the MoE layers itself: leave {_MOE}every at 1 and {_MOE}first_dense at 0",
    )
    require(
        any(sparse_layers(config.model)),
        f"{_MOE}every={moe.every}, {_MOE}first_dense",
        moe.first_dense,
        f"leave no MoE layer among {num_layers}; use {_MOE}gate=none for a dense model",
    )


def _check_group_size(config: Config) -> None:
    moe = config.model.moe
    for name in ("sequence_length", "input_length") if config.model.encoder_layers else ("sequence_length",):
        length = getattr(config.data, name)
        tokens = config.train.batch_size // max(config.train.accumulation_steps, 1) * length
        size = moe.group_size or length
        require(
            tokens % size == 0 and (size % length == 0 or length % size == 0),
            f"{_MOE}group_size",
            moe.group_size,
            f"must divide or be a multiple of data.{name}={length}, and divide a microbatch's {tokens} tokens",
        )
