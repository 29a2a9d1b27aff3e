"""Gates by name, with the constants of their papers, and gates from a user's module."""

from __future__ import annotations

import difflib
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


GATES: Mapping[str, Gate] = types.MappingProxyType(
    {
        "dense_mixture": Gate(
            gates.dense_mixture,
            "Jacobs et al. 1991, equation 1",
            experts_per_token=0,
            capacity_factor=1.0,  # K = E gives C = S: no assignment can be dropped
            eval_capacity_factor=1.0,
            fixed_k=True,
        ),
        "noisy_topk": Gate(
            gates.noisy_topk,
            "Shazeer 2017, equations 3-11",
            experts_per_token=4,
            capacity_factor=2.0,  # not in the paper, which has no capacity limit
            importance_weight=0.1,
            load_weight=0.1,
            router="noisy",
            weights_sum_to_one=True,
        ),
        "gshard": Gate(
            gates.gshard,
            "GShard 2020, algorithm 1",
            experts_per_token=2,
            capacity_factor=1.0,  # the paper's C = 2T/(G·E) is 1.0 with the K inside
            eval_capacity_factor=1.0,
            load_balancing_weight=0.01,
            balance_scope="group",
            fixed_k=True,
            balance_counts="first_choice",
            weights_sum_to_one=True,
        ),
        "switch": Gate(
            gates.softmax_top_k,
            "Switch 2021, equations 1-6",
            experts_per_token=1,
            load_balancing_weight=0.01,
            jitter=0.01,
            renormalise=0,
        ),
        "switch_sampled": Gate(
            gates.softmax_sampled,
            "Switch 2021, appendix C",
            experts_per_token=1,
            load_balancing_weight=0.01,
            renormalise=0,
        ),
        "st_moe": Gate(
            gates.st_moe,
            "ST-MoE 2022, equations 1-6 and appendix D",
            experts_per_token=2,
            load_balancing_weight=0.01,
            z_loss_weight=1e-3,
            weights_sum_to_one=True,
        ),
        "mixtral": Gate(
            gates.mixtral,
            "Mixtral 2024, section 2.1",
            experts_per_token=2,
            load_balancing_weight=0.02,
            weights_sum_to_one=True,
        ),
        "deepseek_moe": Gate(
            gates.softmax_top_k,
            "DeepSeekMoE 2024, equations 9-17",
            experts_per_token=6,
            load_balancing_weight=1e-3,
            device_balance_weight=0.0,  # 0.05 in the paper's 145B model, with experts on several devices
            renormalise=0,
        ),
        "deepseek_v3": Gate(
            gates.deepseek_v3,
            "DeepSeek-V3 2024, equations 12-20",
            experts_per_token=8,
            load_balancing_weight=1e-4,
            balance_scope="sequence",
            bias_update_rate=1e-3,
            expert_groups=8,
            kept_expert_groups=4,
            balance_counts="top_scores",
            renormalise=1,
            routing_scale=2.5,
            router="biased",
        ),
        "expert_choice": Gate(
            gates.expert_choice,
            "Expert Choice 2022, equations 1-3",
            experts_per_token=2,  # on average: each expert takes C = capacity_factor·K·S/E tokens
            capacity_factor=1.0,
            eval_capacity_factor=1.0,
            looks_ahead=True,
            experts_choose=True,
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
        ),
        "hash": Gate(
            gates.hash_tokens,
            "Hash Layers 2021, section 3",
            experts_per_token=1,
            router="none",
        ),
        "random": Gate(
            gates.random_experts,
            "baseline: uniform draws",
            experts_per_token=1,
            router="none",
        ),
        "balanced": Gate(
            gates.balanced,
            "benchmark: round-robin",
            experts_per_token=1,
            capacity_factor=1.0,
            eval_capacity_factor=1.0,
        ),
    }
)
