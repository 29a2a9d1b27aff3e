"""Checks of ``model.moe`` against its gate."""

from __future__ import annotations

from moe.config.checks import require, require_at_least, require_at_most, require_fractions, require_layers
from moe.config.layer_kinds import sparse_layers
from moe.config.schema import Config, MoEConfig
from moe.routing.interface import Gate
from moe.routing.registry import find_gate

_MOE = "model.moe."


def check_moe(config: Config) -> None:
    """Check the MoE section of a resolved config.

    Raises:
        ConfigError: an impossible value, or a setting that the gate does not read.
    """
    moe = config.model.moe
    gate = find_gate(moe.gate)
    require_at_least(_MOE, moe, 1, "num_experts", "experts_per_token", "d_ff", "every", "slots_per_expert")
    require_at_least(_MOE, moe, 0, "shared_d_ff", "first_dense", "group_size", "importance_weight", "load_weight")
    require_at_least(_MOE, moe, 0, "expert_capacity")
    require_at_least(_MOE, moe, 0, "load_balancing_weight", "device_balance_weight", "z_loss_weight")
    require_at_least(_MOE, moe, 0, "bias_update_rate")
    require_at_most(_MOE, moe)
    for name in ("capacity_factor", "eval_capacity_factor"):
        require(getattr(moe, name) > 0, f"{_MOE}{name}", getattr(moe, name), "must be positive")
    require_fractions(_MOE, moe, "jitter", "expert_dropout")
    require(
        moe.shared_d_ff > 0 or not moe.shared_gate, f"{_MOE}shared_gate", moe.shared_gate, "needs shared_d_ff above 0"
    )
    _check_experts_per_token(moe, gate)
    _check_expert_groups(moe, gate)
    _check_gate_fields(moe, gate)
    _check_dispatch(moe, gate)
    _check_layers(config)
    _check_group_size(config)


def _check_experts_per_token(moe: MoEConfig, gate: Gate) -> None:
    k = moe.experts_per_token
    require(k <= moe.num_experts, f"{_MOE}experts_per_token", k, f"must be at most num_experts={moe.num_experts}")
    if gate.fixed_k:
        fixed = gate.experts_per_token or moe.num_experts
        require(k == fixed, f"{_MOE}experts_per_token", k, f"the gate {moe.gate!r} exists for {fixed} only")
    if k == 1 and moe.num_experts > 1:
        no_gradient = "the only weight is then always 1 and the router gets no gradient"
        require(
            not gate.weights_sum_to_one,
            f"{_MOE}experts_per_token",
            k,
            f"must be at least 2 with the gate {moe.gate!r}, which renormalises its weights: {no_gradient}",
        )
        require(
            moe.renormalise != 1,
            f"{_MOE}renormalise",
            moe.renormalise,
            f"must be 0 with experts_per_token=1: {no_gradient}",
        )


def _check_expert_groups(moe: MoEConfig, gate: Gate) -> None:
    groups, kept, k = moe.expert_groups, moe.kept_expert_groups, moe.experts_per_token
    require(
        groups >= 1 and moe.num_experts % groups == 0,
        f"{_MOE}expert_groups",
        groups,
        f"must be at least 1 and divide num_experts={moe.num_experts}",
    )
    require(1 <= kept <= groups, f"{_MOE}kept_expert_groups", kept, f"must be from 1 to expert_groups={groups}")
    require(
        _limits_groups(gate) or kept == groups,
        f"{_MOE}kept_expert_groups",
        kept,
        f"the gate {moe.gate!r} chooses from all groups: leave it at -1",
    )
    available = kept * moe.num_experts // groups
    require(
        not _limits_groups(gate) or k <= available,
        f"{_MOE}experts_per_token",
        k,
        f"must be at most the {available} experts of kept_expert_groups={kept} of expert_groups={groups}",
    )


def _check_gate_fields(moe: MoEConfig, gate: Gate) -> None:
    """A field that only other gates read must keep its default."""
    require(
        _limits_groups(gate) or moe.routing_scale == 1,
        f"{_MOE}routing_scale",
        moe.routing_scale,
        "needs a DeepSeek gate",
    )
    if gate.renormalise >= 0:
        require(moe.renormalise in (0, 1), f"{_MOE}renormalise", moe.renormalise, "must be 0, 1 or -1 (the gate's)")
    else:
        require(moe.renormalise == -1, f"{_MOE}renormalise", moe.renormalise, f"is fixed by the gate {moe.gate!r}")
    if gate.router == "none":
        for name in ("jitter", "load_balancing_weight", "z_loss_weight", "importance_weight", "device_balance_weight"):
            value = getattr(moe, name)
            require(value == 0, f"{_MOE}{name}", value, f"must be 0: the gate {moe.gate!r} has no router")
        require(
            moe.router_dtype == "float32",
            f"{_MOE}router_dtype",
            moe.router_dtype,
            f"the gate {moe.gate!r} has no router",
        )
    require(
        gate.experts_per_token > 0 or moe.load_balancing_weight == 0,
        f"{_MOE}load_balancing_weight",
        moe.load_balancing_weight,
        f"must be 0: with the gate {moe.gate!r} every token goes to every expert and the loss is constant",
    )
    require(
        moe.expert_groups > 1 or moe.device_balance_weight == 0,
        f"{_MOE}device_balance_weight",
        moe.device_balance_weight,
        "needs expert_groups above 1",
    )
    if gate.router == "slots":
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(moe, name)
            require(
                value == getattr(gate, name),
                f"{_MOE}{name}",
                value,
                "soft_moe has slots_per_expert instead: leave it at -1",
            )
    require(
        moe.load_weight == 0 or gate.router == "noisy",
        f"{_MOE}load_weight",
        moe.load_weight,
        "needs the gate noisy_topk: the load has no gradient without its noise",
    )
    require(
        moe.bias_update_rate == 0 or gate.router == "biased",
        f"{_MOE}bias_update_rate",
        moe.bias_update_rate,
        "needs the gate deepseek_v3",
    )
    require(
        moe.slots_per_expert == 1 or gate.router == "slots",
        f"{_MOE}slots_per_expert",
        moe.slots_per_expert,
        "needs the gate soft_moe",
    )
    require(
        moe.accept_future_leak or not gate.looks_ahead,
        f"{_MOE}gate",
        moe.gate,
        "chooses the experts of a token by looking at later tokens, which a causal model must not see; "
        f"set {_MOE}accept_future_leak=True to accept that",
    )


def _check_dispatch(moe: MoEConfig, gate: Gate) -> None:
    require(
        moe.drop_policy == "position" or not gate.looks_ahead,
        f"{_MOE}drop_policy",
        moe.drop_policy,
        f"must be position: the gate {moe.gate!r} drops no assignment",
    )
    require(
        moe.drop_policy == "position" or moe.dispatch == "dropless" or moe.accept_future_leak,
        f"{_MOE}drop_policy",
        moe.drop_policy,
        "lets later tokens displace earlier ones, which a causal model must not see; "
        f"set {_MOE}accept_future_leak=True to accept that",
    )
    require(
        gate.router != "slots" or moe.dispatch == "einsum",
        f"{_MOE}dispatch",
        moe.dispatch,
        "must be einsum: soft_moe mixes all tokens into every slot and moves no single token",
    )
    require(
        moe.expert_capacity == 0 or (gate.router != "slots" and moe.dispatch != "dropless"),
        f"{_MOE}expert_capacity",
        moe.expert_capacity,
        "needs a dispatch with a capacity (gather or einsum) and a gate other than soft_moe",
    )
    enough_experts = 2 * moe.experts_per_token <= moe.num_experts
    require(
        not moe.overflow_to_next or (enough_experts and not gate.looks_ahead and moe.dispatch != "dropless"),
        f"{_MOE}overflow_to_next",
        moe.overflow_to_next,
        "needs num_experts >= 2 * experts_per_token, a dispatch with a capacity (gather or einsum), and a gate in "
        "which tokens choose their experts",
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


def _limits_groups(gate: Gate) -> bool:
    """Whether the rule reads expert_groups, kept_expert_groups and routing_scale."""
    return gate.router == "biased" or gate.renormalise >= 0
