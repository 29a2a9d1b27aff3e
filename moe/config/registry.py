"""Layers of the papers by name: a gate and the paper's constants; and gates from a user's module."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping
from typing import Any

from moe.config.references import import_object
from moe.config.schema import ModelConfig, MoEConfig
from moe.fields import ConfigError
from moe.routing import gates
from moe.routing.interface import BalanceCounts, BalanceScope, Gate


@dataclasses.dataclass(frozen=True)
class Layer:
    """A paper's layer: its constants are the defaults of the ``model.moe`` fields of the same name.

    Attributes:
        gate: the routing rule.
        source: paper and equation.
        balance_counts: what f of the load-balancing loss counts: all assignments, first choices only, or the top-K of
            the router probabilities, without selection bias and group limits.
    """

    gate: Gate
    source: str
    capacity_factor: float = 1.25  # with eval_capacity_factor 2.0 as in Switch 2021
    eval_capacity_factor: float = 2.0
    load_balancing_weight: float = 0.0
    z_loss_weight: float = 0.0
    importance_weight: float = 0.0
    load_weight: float = 0.0
    device_balance_weight: float = 0.0
    balance_scope: BalanceScope = "batch"
    balance_counts: BalanceCounts = "assignments"
    drop_policy: str = "position"
    jitter: float = 0.0
    zero_experts: int = 0
    copy_experts: int = 0
    constant_experts: int = 0
    null_balance: float = 1.0


#: Fields of ``model.moe`` and the gate's fields, by either of these names, that they set.
GATE_FIELDS: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
    {
        "experts_per_token": ("k",),
        "score_function": ("score",),
        "renormalise": ("renormalise",),
        "routing_scale": ("scale",),
        "bias_update": ("bias",),
        "bias_update_rate": ("bias_rate", "penalty_rate", "threshold_rate"),
        "expert_groups": ("groups",),
        "kept_expert_groups": ("kept_groups",),
        "scores_per_group": ("scores_per_group",),
        "slots_per_expert": ("slots",),
    }
)


def flat_fields(layer: Layer, num_experts: int) -> dict[str, Any]:
    """The layer's constants as fields of ``model.moe``."""
    values = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)[2:]}
    plain: dict[str, Any] = {"score_function": "softmax", "routing_scale": 1.0, "slots_per_expert": 1}
    plain |= dict.fromkeys(("expert_groups", "kept_expert_groups", "scores_per_group"), 1)
    plain |= {"bias_update": layer.gate.state.update, "bias_update_rate": layer.gate.state.rate, "renormalise": 0}
    for name, own in GATE_FIELDS.items():
        for field in own:
            plain[name] = getattr(layer.gate, field, plain.get(name))
    plain |= {"experts_per_token": layer.gate.experts_per_token(num_experts), "renormalise": int(plain["renormalise"])}
    return values | plain


def gate_of(moe: MoEConfig) -> Gate:
    """The gate of a resolved section."""
    gate = find_layer(moe.gate).gate
    own = {field.name for field in dataclasses.fields(gate)}
    values = {field: getattr(moe, flat) for flat, names in GATE_FIELDS.items() for field in names if field in own}
    if "renormalise" in values:
        values["renormalise"] = values["renormalise"] == 1
    if values.get("groups") == 1:
        values["scores_per_group"] = 1
    return dataclasses.replace(gate, **values)


def with_layer_gate(model: ModelConfig, gate: str) -> ModelConfig:
    """The config of one layer with a gate of its own (``moe.layer_gates``): the gate's scores, selection, jitter and
    noise; sizes, K, capacity, dispatch and weights of losses stay the model's."""
    if gate == model.moe.gate:
        return model
    layer = find_layer(gate)
    own = {name: value for name, value in flat_fields(layer, model.moe.num_experts).items() if name in GATE_FIELDS}
    own["experts_per_token"] = model.moe.experts_per_token
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, gate=gate, jitter=layer.jitter, **own))


def find_layer(name: str) -> Layer:
    """The layer that ``model.moe.gate`` names.

    Args:
        name: a key of :data:`LAYERS`, or ``module:object``, an importable :class:`Layer`, a subclass of
            :class:`moe.routing.interface.Gate` or an instance of one. A gate gets Switch's balance weight.

    Raises:
        ConfigError: no such layer, or its module cannot be imported.
    """
    if ":" in name:
        return _import_layer(name)
    if name not in LAYERS:
        near = difflib.get_close_matches(name, LAYERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        allowed = f"must be one of {', '.join(('none', *LAYERS))}, or module:object"
        raise ConfigError(f"model.moe.gate={name!r}: {allowed}{hint}")
    return LAYERS[name]


def _import_layer(name: str) -> Layer:
    value = import_object("model.moe.gate", name)
    if isinstance(value, Layer):
        return value
    if isinstance(value, type) and issubclass(value, Gate):
        try:
            value = value()
        except TypeError as error:  # a field without a default
            raise ConfigError(f"model.moe.gate={name!r}: {value.__name__}() failed: {error}") from error
    if not isinstance(value, Gate):
        raise ConfigError(f"model.moe.gate={name!r}: must be a Gate, not {type(value).__name__}")
    return Layer(value, name, load_balancing_weight=0.01)


_V3 = {"renormalise": True, "bias": "sign", "bias_rate": 1e-3}  # DeepSeek-V3's gate, except K and the groups
_V3_BALANCE: Any = {"load_balancing_weight": 1e-4, "balance_scope": "sequence", "balance_counts": "top_scores"}

LAYERS: Mapping[str, Layer] = types.MappingProxyType(
    {
        "dense_mixture": Layer(
            gates.DenseMixture(),
            "Jacobs et al. 1991, equation 1",
            capacity_factor=1.0,  # K = E gives C = S: no assignment can be dropped
            eval_capacity_factor=1.0,
        ),
        "noisy_topk": Layer(
            gates.NoisyTopK(),
            "Shazeer 2017, equations 3-11",
            capacity_factor=2.0,  # not in the paper, which has no capacity limit
            importance_weight=0.1,
            load_weight=0.1,
        ),
        "gshard": Layer(
            gates.GShard(),
            "GShard 2020, algorithm 1",
            capacity_factor=1.0,  # the paper's C = 2T/(G·E) is 1.0 with the K inside
            eval_capacity_factor=1.0,
            load_balancing_weight=0.01,
            balance_scope="group",
            balance_counts="first_choice",
        ),
        "switch": Layer(gates.TopK(k=1), "Switch 2021, equations 1-6", jitter=0.01, load_balancing_weight=0.01),
        "switch_sampled": Layer(gates.SampledTopK(), "Switch 2021, appendix C", load_balancing_weight=0.01),
        "st_moe": Layer(
            gates.STMoE(),
            "ST-MoE 2022, equations 1-6 and appendix D",
            load_balancing_weight=0.01,
            z_loss_weight=1e-3,
        ),
        "mixtral": Layer(gates.TopK(k=2, renormalise=True), "Mixtral 2024, section 2.1", load_balancing_weight=0.02),
        "deepseek_moe": Layer(
            gates.TopK(k=6),
            "DeepSeekMoE 2024, equations 9-17",
            load_balancing_weight=1e-3,
            device_balance_weight=0.0,  # 0.05 in the paper's 145B model, with experts on several devices
        ),
        "deepseek_v3": Layer(
            gates.TopK(k=8, score="sigmoid", scale=2.5, groups=8, kept_groups=4, scores_per_group=2, **_V3),
            "DeepSeek-V3 2024, equations 12-20",
            **_V3_BALANCE,
        ),
        # Scores, K and scale of the released V4-Flash; how V4 is balanced is not published, so that is V3's.
        "deepseek_v4": Layer(
            gates.TopK(k=6, score="sqrt_softplus", scale=1.5, **_V3),
            "DeepSeek-V4-Flash 2026, released inference code",
            **_V3_BALANCE,
        ),
        "deepseek_v4_hash": Layer(
            gates.ScoredHash(k=6, score="sqrt_softplus", renormalise=True, scale=1.5),
            "DeepSeek-V4-Flash 2026, released inference code: its first three layers",
        ),
        "quantile_balancing": Layer(
            gates.TopK(k=8, score="sigmoid", renormalise=True, bias="quantile", bias_rate=1.0),  # rate 1: no memory
            "Quantile balancing: Kimi K3 2026, section 2.3.3; Megatron-Core #5349",
        ),
        "moe_plus_plus": Layer(
            gates.TopK(k=2),
            "MoE++ 2024, section 3",
            capacity_factor=1.1,
            load_balancing_weight=0.01,
            zero_experts=1,
            copy_experts=1,
            constant_experts=2,
            null_balance=0.75,
        ),
        "remoe": Layer(gates.ReLU(), "ReMoE 2024, sections 3.1-3.4"),
        "expert_choice": Layer(
            gates.ExpertChoice(),
            "Expert Choice 2022, equations 1-3",
            capacity_factor=1.0,
            eval_capacity_factor=1.0,
        ),
        "expert_threshold": Layer(
            gates.ExpertThreshold(),
            "Expert Choice 2022, equations 1-3; thresholds: Expert Threshold Routing 2026",
            capacity_factor=1.0,
        ),
        "soft_moe": Layer(
            gates.SoftMoE(), "Soft MoE 2023, equations 1-3", capacity_factor=1.0, eval_capacity_factor=1.0
        ),
        "hash": Layer(gates.Hash(), "Hash Layers 2021, section 3"),
        "random": Layer(gates.Random(), "baseline: uniform draws"),
        "balanced": Layer(gates.Balanced(), "benchmark: round-robin", capacity_factor=1.0, eval_capacity_factor=1.0),
    }
)
