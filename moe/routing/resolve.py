"""Gate-dependent defaults of a config, and the checks that need the gate's record."""

from __future__ import annotations

import dataclasses
import typing

import ml_collections

from moe.config.checks import (
    check_model,
    check_run,
    require,
    require_at_least,
    require_layers,
)
from moe.config.layer_kinds import sparse_layers
from moe.config.parse import build
from moe.config.schema import EMBEDDED_DOMAINS, GATES_OWN, Config, ConfigError, MoEConfig
from moe.routing.registry import GATES


def from_config_dict(tree: ml_collections.ConfigDict | dict[str, typing.Any]) -> Config:
    """The typed config of a tree, resolved and checked for everything that needs no devices and no data.

    Raises:
        ConfigError: an unknown field (with the nearest name), a wrong type, an impossible value or combination.
    """
    if not isinstance(tree, (dict, ml_collections.ConfigDict)):
        raise ConfigError(f"a config is an object with the sections of moe.config.Config, not {type(tree).__name__}")
    return validate(resolve(build(Config, dict(tree.items()), "")))


def resolve(config: Config) -> Config:
    """Fills what was left to the gate and to other fields: every -1 of ``model.moe``, ``moe.d_ff`` of 0, and the
    domains of the embedded corpus.

    Raises:
        ConfigError: an unknown gate.
    """

    moe = config.model.moe
    known = ("none", *GATES)
    if moe.gate not in known:
        raise ConfigError(f"model.moe.gate={moe.gate!r}: must be one of {', '.join(known)}")
    # A dense model has no gate; any gate's constants do, since nothing reads them.
    gate = GATES["mixtral" if moe.gate == "none" else moe.gate]
    filled: dict[str, typing.Any] = {
        field.name: getattr(gate, field.name)
        for field in dataclasses.fields(moe)
        if hasattr(gate, field.name) and getattr(moe, field.name) in (GATES_OWN, "gate")
    }
    if filled.get("experts_per_token") == 0:
        filled["experts_per_token"] = moe.num_experts
    if filled.get("kept_expert_groups") == 0:
        filled["kept_expert_groups"] = filled.get("expert_groups", moe.expert_groups)
    if moe.d_ff == 0:
        filled["d_ff"] = config.model.d_ff
    moe = dataclasses.replace(moe, **filled)
    data = config.data
    if data.dataset == "embedded" and not data.domains:
        data = dataclasses.replace(data, domains=EMBEDDED_DOMAINS)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe), data=data)


def validate(config: Config) -> Config:
    """Checks a resolved config; see :func:`from_config_dict`."""
    check_model(config.model)
    if config.model.moe.gate != "none":
        _check_moe(config)
    check_run(config)
    return config


def _check_moe(config: Config) -> None:

    moe, where = config.model.moe, "model.moe."
    gate = GATES[moe.gate]
    require_at_least(where, moe, 1, "num_experts", "experts_per_token", "d_ff", "every")
    require_at_least(where, moe, 0, "shared_d_ff", "first_dense", "group_size")
    require_at_least(where, moe, 0, "load_balancing_weight", "z_loss_weight")
    require(
        moe.shared_d_ff > 0 or not moe.shared_gate, f"{where}shared_gate", moe.shared_gate, "needs shared_d_ff above 0"
    )
    k = moe.experts_per_token
    require(k <= moe.num_experts, f"{where}experts_per_token", k, f"must be at most num_experts={moe.num_experts}")
    if gate.fixed_k:
        fixed = gate.experts_per_token or moe.num_experts
        require(k == fixed, f"{where}experts_per_token", k, f"the gate {moe.gate!r} exists for {fixed} only")
    for name in ("capacity_factor", "eval_capacity_factor"):
        require(getattr(moe, name) > 0, f"{where}{name}", getattr(moe, name), "must be positive")
    require(0 <= moe.jitter < 1, f"{where}jitter", moe.jitter, "must be in [0, 1)")
    _check_gate(moe, where)
    require_layers(f"{where}layers", moe.layers, config.model.num_layers)
    require(
        not moe.layers or (moe.every == 1 and moe.first_dense == 0),
        f"{where}layers",
        moe.layers,
        f"says which layers are MoE: leave {where}every at 1 and {where}first_dense at 0",
    )
    require(
        any(sparse_layers(config.model)),
        f"{where}every={moe.every}, {where}first_dense",
        moe.first_dense,
        f"leave no MoE layer among {config.model.num_layers}; use {where}gate=none for a dense model",
    )
    batch = config.train.batch_size // max(config.train.accumulation_steps, 1)
    tokens, length = batch * config.data.sequence_length, config.data.sequence_length
    size = moe.group_size or length
    require(
        tokens % size == 0 and (size % length == 0 or length % size == 0),
        f"{where}group_size",
        moe.group_size,
        f"must divide or be a multiple of data.sequence_length={length}, and divide a microbatch's {tokens} tokens",
    )


def _check_gate(moe: MoEConfig, where: str) -> None:
    """What the gate asks for must be possible, and what is set must be read by it."""

    gate = GATES[moe.gate]
    require_at_least(where, moe, 0, "importance_weight", "load_weight", "device_balance_weight", "bias_update_rate")
    require_at_least(where, moe, 1, "slots_per_expert")
    require(0 <= moe.expert_dropout < 1, f"{where}expert_dropout", moe.expert_dropout, "must be in [0, 1)")
    require(
        moe.accept_future_leak or not gate.looks_ahead,
        f"{where}gate",
        moe.gate,
        "chooses for a token by looking at later ones, which this causal model must not see; "
        f"set {where}accept_future_leak=True to accept that",
    )
    groups, kept, k = moe.expert_groups, moe.kept_expert_groups, moe.experts_per_token
    require(
        groups >= 1 and moe.num_experts % groups == 0,
        f"{where}expert_groups",
        groups,
        f"must be at least 1 and divide num_experts={moe.num_experts}",
    )
    require(1 <= kept <= groups, f"{where}kept_expert_groups", kept, f"must be from 1 to expert_groups={groups}")
    # A field that another gate reads would be ignored here, silently.
    limited = gate.router == "biased" or gate.renormalise >= 0
    require(
        limited or kept == groups,
        f"{where}kept_expert_groups",
        kept,
        f"the gate {moe.gate!r} chooses from all groups: leave it at -1",
    )
    require(
        not limited or k <= kept * moe.num_experts // groups,
        f"{where}experts_per_token",
        k,
        f"must be at most the {kept * moe.num_experts // groups} experts of kept_expert_groups={kept} "
        f"of expert_groups={groups}",
    )
    require(limited or moe.routing_scale == 1, f"{where}routing_scale", moe.routing_scale, "needs a DeepSeek gate")
    if gate.renormalise >= 0:
        require(moe.renormalise in (0, 1), f"{where}renormalise", moe.renormalise, "must be 0, 1 or -1 (the gate's)")
    else:
        require(moe.renormalise == -1, f"{where}renormalise", moe.renormalise, f"is fixed by the gate {moe.gate!r}")
    require(
        moe.load_weight == 0 or gate.router == "noisy",
        f"{where}load_weight",
        moe.load_weight,
        "needs the gate noisy_topk: the load has no gradient without its noise",
    )
    require(
        moe.bias_update_rate == 0 or gate.router == "biased",
        f"{where}bias_update_rate",
        moe.bias_update_rate,
        "needs the gate deepseek_v3",
    )
    require(
        moe.slots_per_expert == 1 or gate.router == "slots",
        f"{where}slots_per_expert",
        moe.slots_per_expert,
        "needs the gate soft_moe",
    )
    require(
        gate.router != "slots" or moe.dispatch == "einsum",
        f"{where}dispatch",
        moe.dispatch,
        "must be einsum: soft_moe mixes all tokens into every slot, so that there are no rows to move",
    )
    require(
        not moe.overflow_to_next or (2 * k <= moe.num_experts and not gate.looks_ahead and moe.dispatch != "dropless"),
        f"{where}overflow_to_next",
        moe.overflow_to_next,
        "needs as many further experts as choices (num_experts >= 2 * experts_per_token), a capacity (a dispatch other "
        "than dropless), and a gate in which tokens choose",
    )
