"""Layers of the papers by name, as values of :class:`MoEConfig`; and gates and mixers from a user's module."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
from collections.abc import Mapping
from typing import Any, get_args

from moe.config.mixers import FIELD, MIXERS, Mixer
from moe.config.moe_section import Capacity, Losses, MoEConfig
from moe.config.references import import_instance, import_named
from moe.routing import gates, newer_gates
from moe.routing.balancing_rules import BalancingRule
from moe.routing.interface import Gate, RouterKind
from moe.system.fields import ConfigError, raised_as_errors, require


def find_layer(name: str) -> MoEConfig:
    """The layer that ``model.moe.gate`` names.

    Args:
        name: "none", a key of :data:`LAYERS`, or ``module:object``, an importable :class:`MoEConfig`, a subclass of
            :class:`moe.routing.interface.Gate` or an instance of one. A gate gets Switch's balance weight.

    Raises:
        ConfigError: no such layer, or its module cannot be imported.
    """
    if name == "none":
        return MoEConfig(gate=None)
    if ":" in name:
        return _import_layer(name)
    if name not in LAYERS:
        near = difflib.get_close_matches(name, LAYERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        allowed = f"must be one of {', '.join(('none', *LAYERS))}, or module:object"
        raise ConfigError(f"model.moe.gate={name!r}: {allowed}{hint}")
    return LAYERS[name]


def find_gate(name: str) -> Gate:
    """The gate of :func:`find_layer`.

    Raises:
        ConfigError: there is none.
    """
    gate = find_layer(name).gate
    if gate is None:
        raise ConfigError(f"model.moe.gate={name!r}: must name a gate")
    return gate


def find_mixer(name: str) -> Mixer | None:
    """The token mixer that ``model.mixer`` names.

    Args:
        name: "none", a key of :data:`moe.config.mixers.MIXERS`, or ``module:object``, an importable subclass of
            :class:`moe.config.mixers.Mixer` or an instance.

    Raises:
        ConfigError: no such mixer, it cannot be imported, or is something else.
    """
    if name == "none":
        return None
    if name in MIXERS:
        return MIXERS[name]()
    require(":" in name, FIELD, name, f"must be one of {', '.join(('none', *MIXERS))}, or module:object")
    return import_named(FIELD, name, Mixer)


def layer_fields(gate: str | Gate | None) -> dict[str, Any]:
    """Values of all fields of ``model.moe`` that a gate brings: those of the layer that its name stands for.

    A gate that is a value brings the defaults, but no losses that it has no use for.

    Raises:
        ConfigError: there is no such name.
    """
    if isinstance(gate, Gate):
        return _fields(MoEConfig()) | _fields_with(gate, MoEConfig().losses.balance)
    return _fields(find_layer("none" if gate is None else gate))


def _fields(layer: MoEConfig) -> dict[str, Any]:
    return {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}


def _fields_with(gate: Gate, balance: float) -> dict[str, Any]:
    slots: Any = {"capacity": _WHOLE, "dispatch": "einsum"} if gate.slots_per_expert else {}
    return {"gate": gate, "losses": Losses(balance=balance if is_balanced(gate) else 0.0), **slots}


def is_balanced(gate: Gate) -> bool:
    """Return True if a balance loss can move what the gate chooses."""
    return not gate.sends_to_all and gate.chooses and gate.router != "none"


def _import_layer(name: str) -> MoEConfig:
    value = import_instance("model.moe.gate", name, Gate)
    where = f"model.moe.gate={name!r}"
    gate = value.gate if isinstance(value, MoEConfig) else value
    if not isinstance(gate, Gate):
        raise ConfigError(f"{where}: must be a Gate, not {type(value).__name__}")
    with raised_as_errors(f"{where}: it"):
        _check_facts(where, gate)
        if isinstance(value, MoEConfig):
            return _named(name, value)
        return _named(name, MoEConfig(**_fields_with(gate, 0.01)))


_FLAGS = ("looks_ahead", "chooses", "experts_choose", "lists_all", "reweighs", "generates")
_ROUTERS = get_args(RouterKind)


def _check_facts(where: str, gate: Gate) -> None:
    """Refuse a user's gate without a rule, or with properties that no layer supports. Raises ConfigError."""
    if type(gate).route is Gate.route:
        raise ConfigError(f"{where}: has no method route(router_logits, inputs)")
    for field in dataclasses.fields(gate):
        try:
            hash(value := getattr(gate, field.name))
            json.dumps(value, default=dataclasses.asdict)
        except TypeError as error:
            allowed = "must be a number, a text or a tuple of them, which config.json can hold"
            raise ConfigError(f"{where}: its {field.name}: {allowed} ({error})") from error
    k, rule = gate.experts_per_token(1 << 20), gate.balancing
    require(gate.router in _ROUTERS, f"{where}: its router", gate.router, f"must be one of {', '.join(_ROUTERS)}")
    require(type(k) is int, f"{where}: its K", k, "must be an integer")
    allowed = "must be a BalancingRule (moe.routing.balancing_rules), or None"
    require(rule is None or isinstance(rule, BalancingRule), f"{where}: its balancing", rule, allowed)
    if hasattr(gate, "state"):
        raise ConfigError(f"{where}: its state is not read; return a BalancingRule from the property balancing")
    for name in _FLAGS:
        require(isinstance(getattr(gate, name), bool), f"{where}: its {name}", getattr(gate, name), "must be a bool")


def _named(name: str, layer: MoEConfig) -> MoEConfig:
    assert layer.gate is not None
    return dataclasses.replace(layer, gate=dataclasses.replace(layer.gate, name=name))


_V3 = {"renormalise": True, "bias": "sign", "bias_rate": 1e-3}  # DeepSeek-V3's gate, except K and the groups
_V3_LOSSES = Losses(balance=1e-4, scope="sequence", counts="top_scores")
#: For gates without drops, or whose papers have C = K·S/E.
_WHOLE = Capacity(train=1.0, eval=1.0)

_LAYERS = {
    # Jacobs et al. 1991, equation 1. K = E gives C = S: no assignment can be dropped.
    "dense_mixture": MoEConfig(gate=gates.DenseMixture(), capacity=_WHOLE, losses=Losses()),
    # Shazeer 2017, equations 3-11. The paper has no capacity limit.
    "noisy_topk": MoEConfig(
        gate=gates.NoisyTopK(), capacity=Capacity(train=2.0), losses=Losses(importance=0.1, load=0.1)
    ),
    # GShard 2020, algorithm 1. Its C = 2T/(G·E) is a factor of 1.0 here, where C includes K.
    "gshard": MoEConfig(
        gate=gates.GShard(), capacity=_WHOLE, losses=Losses(balance=0.01, scope="group", counts="first_choice")
    ),
    # Switch 2021, equations 1-6, and appendix C
    "switch": MoEConfig(gate=gates.TopK(k=1), losses=Losses(balance=0.01), jitter=0.01),
    "switch_sampled": MoEConfig(gate=gates.SampledTopK(), losses=Losses(balance=0.01)),
    # ST-MoE 2022, equations 1-6 and appendix D
    "st_moe": MoEConfig(gate=gates.STMoE(), losses=Losses(balance=0.01, z=1e-3)),
    # Mixtral 2024, section 2.1
    "mixtral": MoEConfig(gate=gates.TopK(k=2, renormalise=True), losses=Losses(balance=0.02)),
    # DeepSeekMoE 2024, equations 9-17. The 145B model, with experts on several devices, has a device weight of 0.05.
    "deepseek_moe": MoEConfig(gate=gates.TopK(k=6), losses=Losses(balance=1e-3)),
    # DeepSeek-V3 2024, equations 12-20. V3 has 256 experts; 16 is the fewest that its groups allow.
    "deepseek_v3": MoEConfig(
        gate=gates.TopK(k=8, score="sigmoid", scale=2.5, groups=8, kept_groups=4, scores_per_group=2, **_V3),
        num_experts=16,
        losses=_V3_LOSSES,
    ),
    # DeepSeek-V4-Flash 2026, released inference code: scores, K and scale, and the gate of its first three layers. How
    # V4 is balanced is not published; V3's method is used.
    "deepseek_v4": MoEConfig(gate=gates.TopK(k=6, score="sqrt_softplus", scale=1.5, **_V3), losses=_V3_LOSSES),
    "deepseek_v4_hash": MoEConfig(
        gate=gates.ScoredHash(k=6, score="sqrt_softplus", renormalise=True, scale=1.5), losses=Losses()
    ),
    # Kimi K3 2026, section 2.3.3; Megatron-Core #5349. Rate 1: no memory.
    "quantile_balancing": MoEConfig(
        gate=gates.TopK(k=8, score="sigmoid", renormalise=True, bias="quantile", bias_rate=1.0),
        num_experts=16,
        losses=Losses(),
    ),
    # SMEBU: Trinity Large 2026 (arXiv 2602.17004), whose sigmoid gate has K = 4 of 256; its scale of the weights and
    # its sequence-wise loss are left out
    "smebu": MoEConfig(
        gate=gates.TopK(k=4, score="sigmoid", renormalise=True, bias="momentum", bias_rate=5e-4),
        num_experts=16,
        losses=Losses(),
    ),
    # Kolibri-1 2026, released code: top-6 of 384 experts. How it is balanced is not published; V3's rule is used.
    "kolibri": MoEConfig(
        gate=newer_gates.BiasedLogits(bias="sign", bias_rate=1e-3),
        num_experts=16,
        losses=Losses(),
    ),
    # MoE++ 2024, section 3
    "moe_plus_plus": MoEConfig(
        gate=gates.TopK(k=2),
        capacity=Capacity(train=1.1),
        losses=Losses(balance=0.01, null=0.75),
        zero_experts=1,
        copy_experts=1,
        constant_experts=2,
    ),
    # ReMoE 2024, sections 3.1-3.4
    "remoe": MoEConfig(gate=gates.ReLU(), losses=Losses()),
    # Expert Choice 2022, equations 1-3
    "expert_choice": MoEConfig(gate=gates.ExpertChoice(), capacity=_WHOLE, losses=Losses()),
    # thresholds: Expert Threshold Routing 2026
    "expert_threshold": MoEConfig(gate=gates.ExpertThreshold(), capacity=Capacity(train=1.0), losses=Losses()),
    "running_thresholds": MoEConfig(gate=newer_gates.RunningThresholds(), losses=Losses(), dispatch="dropless"),
    # S-BASE: Clark et al. 2022, section 3.3 and appendix B
    "sinkhorn": MoEConfig(gate=newer_gates.Sinkhorn(), losses=Losses()),
    # X-MoE 2022 (arXiv 2204.09179): top-1, τ = 0.07, Switch's balance loss
    "cosine": MoEConfig(gate=newer_gates.Cosine(), losses=Losses(balance=0.01)),
    # ZAYA1 2026, released code: top-1 of 16 experts and one that returns 0. How it is balanced is not published.
    "zaya": MoEConfig(gate=newer_gates.Zaya(), num_experts=16, zero_experts=1, losses=Losses(), dispatch="dropless"),
    # M-MoE 2025 (arXiv 2509.26520); the balance loss is Switch's
    "matryoshka": MoEConfig(gate=newer_gates.Matryoshka(), losses=Losses(balance=0.01), dispatch="dropless"),
    # ERC 2025 (arXiv 2512.23447): α = 1 of 64 experts; OLMoE's other losses
    "coupled": MoEConfig(gate=newer_gates.Coupled(), num_experts=64, losses=Losses(balance=0.01, z=1e-3)),
    # MPI 2026 (arXiv 2606.12397), tables 7 and 8; columns of length 4/√E
    "power_iteration": MoEConfig(
        gate=newer_gates.PowerIteration(), num_experts=64, losses=Losses(balance=0.01), dispatch="dropless"
    ),
    # Ahrac et al. 2026 (arXiv 2605.12476), released code: 6 of 64 experts beside a shared one, here shared_d_ff
    "k_means": MoEConfig(gate=newer_gates.KMeans(), num_experts=64, losses=Losses(), dispatch="dropless"),
    # EMO 2026 (arXiv 2605.06663), released code: 7 of 128 experts beside a shared one, which is shared_d_ff here. Its
    # weight of the balance loss, 0.1, is that of its code, whose loss is 1 at balance as here.
    "emo": MoEConfig(
        gate=newer_gates.DocumentPools(),
        num_experts=128,
        losses=Losses(balance=0.1, z=1e-3),
        dispatch="dropless",
    ),
    # Soft MoE 2023, equations 1-3
    "soft_moe": MoEConfig(gate=gates.SoftMoE(), capacity=_WHOLE, losses=Losses(), dispatch="einsum"),
    # Hash Layers 2021, section 3
    "hash": MoEConfig(gate=gates.Hash(), losses=Losses()),
    # baselines: uniform draws, round-robin
    "random": MoEConfig(gate=gates.Random(), losses=Losses()),
    "balanced": MoEConfig(gate=gates.Balanced(), capacity=_WHOLE, losses=Losses()),
    # GRIN 2024 (SparseMixer-v2) and Phi-3.5-MoE's released code, without drops; its balance loss is Mixtral's
    "sparse_mixer": MoEConfig(gate=gates.SparseMixer(), num_experts=16, losses=Losses(balance=1e-3)),
}

#: Layers of the papers, by the name that ``model.moe.gate`` takes.
LAYERS: Mapping[str, MoEConfig] = types.MappingProxyType({name: _named(name, layer) for name, layer in _LAYERS.items()})
