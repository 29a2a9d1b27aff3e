"""Gates by name, with the constants of their papers, and gates from a user's module."""

from __future__ import annotations

import difflib
import functools
import types
from collections.abc import Mapping
from typing import cast

from moe.config import ConfigError
from moe.config.references import import_object
from moe.routing import gates
from moe.routing.interface import Gate, GateRule


def find_gate(name: str) -> Gate:
    """Return the record of the gate that ``model.moe.gate`` names.

    Args:
        name: a key of :data:`GATES`, or ``module:object``, an importable :class:`Gate` or a function with the signature
            of :attr:`Gate.choose`. A function gets the constants of :func:`default_gate`.

    Raises:
        ConfigError: no such gate, or its module cannot be imported.
    """
    if ":" in name:
        return _import_gate(name)
    if name not in GATES:
        near = difflib.get_close_matches(name, GATES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        allowed = f"must be one of {', '.join(('none', *GATES))}, or module:object"
        raise ConfigError(f"model.moe.gate={name!r}: {allowed}{hint}")
    return GATES[name]


def default_gate(choose: GateRule, source: str) -> Gate:
    """Record of a rule without constants of its own: K = 2 and Switch's balance weight."""
    return Gate(choose, source, experts_per_token=2, load_balancing_weight=0.01)


def _import_gate(name: str) -> Gate:
    gate = import_object("model.moe.gate", name)
    if isinstance(gate, Gate):
        return gate
    if not callable(gate):
        raise ConfigError(f"model.moe.gate={name!r}: must be a Gate or a function, not {type(gate).__name__}")
    return default_gate(cast(GateRule, gate), name)


#: A gate of :func:`moe.routing.gates.top_k_scores`: everything that the field takes is data.
_top_k = functools.partial(
    Gate, choose=gates.top_k_scores, scored_weights=True, scored_choice=True, reweighs=True, load_balancing_weight=0.01
)

#: DeepSeek-V3's constants, except K and the groups.
_deepseek = functools.partial(
    _top_k,
    load_balancing_weight=1e-4,
    balance_scope="sequence",
    balance_counts="top_scores",
    bias_update="sign",
    bias_update_rate=1e-3,
    renormalise=1,
)

GATES: Mapping[str, Gate] = types.MappingProxyType(
    {
        "dense_mixture": Gate(
            gates.dense_mixture,
            "Jacobs et al. 1991, equation 1",
            experts_per_token=0,
            capacity_factor=1.0,  # K = E gives C = S: no assignment can be dropped
            eval_capacity_factor=1.0,
            fixed_k=True,
            lists_all=True,
            reweighs=True,
        ),
        "noisy_topk": _top_k(
            choose=gates.noisy_topk,
            source="Shazeer 2017, equations 3-11",
            experts_per_token=4,
            capacity_factor=2.0,  # not in the paper, which has no capacity limit
            load_balancing_weight=0.0,
            importance_weight=0.1,
            load_weight=0.1,
            renormalise=1,
            router="noisy",
        ),
        "gshard": _top_k(
            choose=gates.gshard,
            source="GShard 2020, algorithm 1",
            experts_per_token=2,
            capacity_factor=1.0,  # the paper's C = 2T/(G·E) is 1.0 with the K inside
            eval_capacity_factor=1.0,
            balance_scope="group",
            fixed_k=True,
            balance_counts="first_choice",
            renormalise=1,
        ),
        "switch": _top_k(source="Switch 2021, equations 1-6", experts_per_token=1, jitter=0.01),
        "switch_sampled": _top_k(choose=gates.sampled, source="Switch 2021, appendix C", experts_per_token=1),
        "st_moe": _top_k(
            choose=gates.st_moe,
            source="ST-MoE 2022, equations 1-6 and appendix D",
            experts_per_token=2,
            z_loss_weight=1e-3,
            renormalise=1,
        ),
        "mixtral": _top_k(
            source="Mixtral 2024, section 2.1", experts_per_token=2, load_balancing_weight=0.02, renormalise=1
        ),
        "deepseek_moe": _top_k(
            source="DeepSeekMoE 2024, equations 9-17",
            experts_per_token=6,
            load_balancing_weight=1e-3,
            device_balance_weight=0.0,  # 0.05 in the paper's 145B model, with experts on several devices
        ),
        "deepseek_v3": _deepseek(
            source="DeepSeek-V3 2024, equations 12-20",
            experts_per_token=8,
            score_function="sigmoid",
            expert_groups=8,
            kept_expert_groups=4,
            scores_per_group=2,
            routing_scale=2.5,
        ),
        # Scores, K and scale of the released V4-Flash; how V4 is balanced is not published, so that is V3's.
        "deepseek_v4": _deepseek(
            source="DeepSeek-V4-Flash 2026, released inference code",
            experts_per_token=6,
            score_function="sqrt_softplus",
            routing_scale=1.5,
        ),
        "deepseek_v4_hash": Gate(
            gates.hash_scored,
            "DeepSeek-V4-Flash 2026, released inference code: its first three layers",
            experts_per_token=6,
            score_function="sqrt_softplus",
            renormalise=1,
            routing_scale=1.5,
            scored_weights=True,
            reweighs=True,
        ),
        "quantile_balancing": _top_k(
            source="Quantile balancing: Kimi K3 2026, section 2.3.3; Megatron-Core #5349",
            experts_per_token=8,
            load_balancing_weight=0.0,
            score_function="sigmoid",
            bias_update="quantile",
            bias_update_rate=1.0,  # no memory
            renormalise=1,
        ),
        "moe_plus_plus": _top_k(
            source="MoE++ 2024, section 3",
            experts_per_token=2,
            capacity_factor=1.1,
            zero_experts=1,
            copy_experts=1,
            constant_experts=2,
            null_balance=0.75,
        ),
        "remoe": Gate(
            gates.relu,
            "ReMoE 2024, sections 3.1-3.4",
            experts_per_token=1,  # on average
            bias_update="penalty",
            bias_update_rate=0.2,
            lists_all=True,
            reweighs=True,
        ),
        "expert_choice": Gate(
            gates.expert_choice,
            "Expert Choice 2022, equations 1-3",
            experts_per_token=2,  # on average: each expert takes C = capacity_factor·K·S/E tokens
            capacity_factor=1.0,
            eval_capacity_factor=1.0,
            looks_ahead=True,
            experts_choose=True,
            lists_all=True,
            reweighs=True,
        ),
        "expert_threshold": Gate(
            gates.expert_threshold,
            "Expert Choice 2022, equations 1-3; thresholds: Expert Threshold Routing 2026",
            experts_per_token=2,
            capacity_factor=1.0,
            bias_update="threshold",
            bias_update_rate=0.05,  # of the moving average; not from a paper
            looks_ahead=True,
            experts_choose=True,
            lists_all=True,
            reweighs=True,
        ),
        "soft_moe": Gate(
            gates.dense_mixture,  # weights as reported; the layer itself mixes slots
            "Soft MoE 2023, equations 1-3",
            experts_per_token=0,
            capacity_factor=1.0,
            eval_capacity_factor=1.0,
            fixed_k=True,
            router="slots",
            looks_ahead=True,
            lists_all=True,
        ),
        "hash": Gate(
            gates.hash_tokens, "Hash Layers 2021, section 3", experts_per_token=1, router="none", reweighs=True
        ),
        "random": Gate(
            gates.random_experts, "baseline: uniform draws", experts_per_token=1, router="none", reweighs=True
        ),
        "balanced": Gate(
            gates.balanced,
            "benchmark: round-robin",
            experts_per_token=1,
            capacity_factor=1.0,
            eval_capacity_factor=1.0,
            renormalise=1,
            scored_weights=True,
            reweighs=True,
        ),
    }
)
