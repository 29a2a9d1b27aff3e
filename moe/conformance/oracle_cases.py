"""Layers that are compared with the per-token oracle: a line for every gate, and for every rule that is no gate's own.

Letters: G groups, S tokens per group, E experts, K choices per token, C expert capacity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from moe.config.registry import LAYERS, find_gate
from moe.conformance.reference_gates import PLAIN, Rule
from moe.conformance.rows import spelled
from moe.routing.balancing_rules import Quantile
from moe.routing.interface import Gate

#: Fields without which a causal model refuses routing that looks ahead.
LEAK = {"accept_future_leak": True}


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer to compare with the oracle: G groups of S tokens, E experts, K experts per token, capacity C.

    Attributes:
        gate, g, s, e, k, c: as above.
        padding: share of padding among the tokens.
        fields: overrides of MoEConfig, with those of its gate other than K under "gate".
        rule: rule of the oracle.
        draws: whether the layer is given a key, and the oracle the numbers drawn from it.
        full: also in bfloat16, and on batches of one real token per group (most experts are empty) and of only padding.
    """

    gate: str
    g: int
    s: int
    e: int
    k: int
    c: int
    padding: float = 0.0
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    rule: Rule = PLAIN
    draws: bool = False
    full: bool = True

    def __str__(self) -> str:
        set_fields = spelled({name: value for name, value in self.fields.items() if name not in LEAK})
        drawn = ", draws" if self.draws else ""
        return f"G {self.g} S {self.s} E {self.e} K {self.k} C {self.c}, padding {self.padding:.0%}{set_fields}{drawn}"

    @property
    def gate_fields(self) -> dict[str, Any]:
        """Fields of the gate, with K where the gate has it."""
        return self.fields.get("gate", {}) | ({"k": self.k} if find_gate(self.gate).sets_k else {})

    def create_gate(self) -> Gate:
        """The gate with these fields."""
        return dataclasses.replace(find_gate(self.gate), **self.gate_fields)


GROUPS = {"groups": 3, "kept_groups": 2}
GROUPED = {"gate": GROUPS}
ONE_GROUP = {"gate": {"groups": 1, "kept_groups": 1, "scores_per_group": 1}}
OVERFLOW = LEAK | {"overflow_to_next": True}
NULL = Rule(null=(1, 1, 2, 0))
BY_PROBABILITY = Rule(policy="probability")
#: Latent experts whose combined output is normalised.
NORMALISED = Case("mixtral", 2, 7, 5, 2, 2, 0.2, {"latent_dim": 4, "latent_norm": True}, full=False)
#: Every gate, E no power of two, S not divisible by E; then every rule that is not a gate's own.
CASES = (
    Case("dense_mixture", 2, 5, 3, 3, 5, 0.3),
    Case("noisy_topk", 2, 6, 5, 3, 4, 0.3),
    Case("noisy_topk", 2, 6, 5, 2, 2, 0.2, draws=True),
    Case("gshard", 2, 7, 3, 2, 3, 0.3),
    Case("gshard", 2, 7, 3, 2, 3, 0.2, draws=True),
    Case("switch", 2, 7, 3, 1, 2, 0.3),
    Case("switch_sampled", 2, 7, 6, 3, 2, 0.2, GROUPED, Rule(3, 2), draws=True),
    Case("st_moe", 2, 7, 3, 2, 2, 0.3),
    Case("st_moe", 2, 7, 5, 3, 3, 0.2, LEAK | {"drop_policy": "probability"}, BY_PROBABILITY, draws=True),
    Case("mixtral", 2, 7, 5, 2, 2, 0.2),
    Case("sparse_mixer", 2, 7, 5, 2, 2, 0.2),
    Case("deepseek_moe", 2, 7, 6, 3, 2, 0.2, {"gate": {"scale": 1.5, **GROUPS}}, Rule(3, 2, scale=1.5)),
    Case("deepseek_v3", 2, 7, 9, 3, 2, 0.2, GROUPED, Rule(3, 2, True, 2.5)),
    Case("deepseek_v4", 2, 7, 6, 3, 2, 0.2, GROUPED, Rule(3, 2, True, 1.5)),
    Case("deepseek_v4_hash", 2, 7, 5, 2, 2, 0.2, rule=Rule(renormalise=True, scale=1.5)),
    Case("quantile_balancing", 2, 7, 5, 2, 2, 0.2, rule=Rule(renormalise=True)),
    Case("smebu", 2, 7, 5, 2, 2, 0.2, rule=Rule(renormalise=True)),
    Case("kolibri", 2, 7, 5, 2, 2, 0.2),
    Case("sinkhorn", 2, 7, 5, 2, 2, 0.2, LEAK),
    Case("coupled", 2, 7, 5, 2, 2, 0.2),
    Case("power_iteration", 2, 7, 5, 2, 2, 0.2, full=False),
    Case("k_means", 2, 7, 5, 2, 2, 0.2, full=False),
    Case("matryoshka", 2, 7, 5, 3, 2, 0.2, draws=True),
    Case("cosine", 2, 7, 5, 2, 2, 0.2, full=False),
    Case("zaya", 2, 7, 5, 2, 2, 0.2, rule=Rule(null=(1, 0, 0, 0)), full=False),
    Case("mixtral", 2, 7, 5, 2, 2, 0.2, {"router_softcap": 0.5}, Rule(softcap=0.5), full=False),
    Case("running_thresholds", 2, 7, 3, 2, 3, 0.3),
    Case("emo", 2, 7, 5, 2, 2, 0.2, LEAK | {"gate": {"pool": 0.5}}, Rule(pool=3), full=False),
    Case("moe_plus_plus", 2, 7, 3, 3, 2, 0.2, rule=NULL, full=False),
    Case("moe_plus_plus", 2, 7, 3, 2, 2, 0.2, {"constant_experts": 0}, Rule(null=(1, 1, 0, 0)), full=False),
    Case("remoe", 2, 7, 5, 2, 3, 0.2),
    Case("expert_choice", 2, 7, 3, 2, 5, 0.3, LEAK),
    Case("expert_threshold", 2, 7, 3, 2, 3, 0.3, LEAK),
    Case("mixtral", 2, 7, 5, 2, 2, 0.2, {"latent_dim": 4}, full=False),
    NORMALISED,
    Case("deepseek_v3", 2, 7, 6, 3, 2, 0.2, GROUPED | {"latent_dim": 4}, Rule(3, 2, True, 2.5), full=False),
    Case("soft_moe", 2, 5, 3, 3, 5, 0.3, LEAK | {"gate": {"slots": 2}}),
    Case("hash", 2, 7, 5, 2, 2, 0.2),
    Case("random", 2, 7, 5, 2, 2, 0.2, draws=True),
    Case("balanced", 2, 7, 3, 2, 3, 0.3),
    Case("switch", 2, 6, 5, 2, 1, 0.0, {"gate": {"renormalise": True}}, Rule(renormalise=True)),
    Case("switch", 2, 7, 5, 1, 1, 0.2, OVERFLOW, Rule(overflow=True)),
    Case("mixtral", 2, 6, 5, 2, 2, 0.2, OVERFLOW, Rule(overflow=True)),
    Case("mixtral", 2, 7, 5, 2, 2, 0.2, LEAK | {"drop_policy": "probability"}, BY_PROBABILITY),
    Case("mixtral", 2, 7, 5, 2, 2, 0.2, LEAK | {"drop_policy": "random"}, Rule(policy="random"), draws=True),
)


#: Novices beside all other kinds of experts without an FFN.
NOVICES = Case("moe_plus_plus", 2, 7, 3, 3, 2, 0.2, {"novice_experts": 2}, Rule(null=(1, 1, 2, 2)), full=False)


def edges() -> Iterator[Case]:
    """For every gate, in float32: K = E with capacity 1, and a shape drawn at random."""
    rng = np.random.default_rng(42)
    for gate in LAYERS:
        own = find_gate(gate)
        fields: dict[str, Any] = dict(LEAK) if own.looks_ahead else {}
        fields |= ONE_GROUP if own.expert_groups > 1 else {}
        renormalise, scale = getattr(own, "renormalise", False), getattr(own, "scale", 1.0)
        rule = Rule(renormalise=renormalise, scale=scale, null=null_of(gate, {}))
        every = own.sends_to_all  # K = E is the rule
        quantile = isinstance(own.balancing, Quantile)
        draws = gate == "random"
        pairs = gate in ("gshard", "sparse_mixer")  # K is 2
        e = 2 if pairs else 3
        # Quantile balancing needs an expert that is not chosen.
        yield Case(gate, 1, 5, e, e - quantile, 1, 0.2, fields, rule, draws, full=False)
        e, s = int(rng.integers(3, 10)), int(rng.integers(2, 9))
        # From 2 on: a softmax over one choice has no gradient to compare.
        k = e if every else 2 if pairs else int(rng.integers(2, min(e, 5) + 1))
        k = min(k, e - quantile)
        g, c = int(rng.integers(1, 4)), int(rng.integers(1, s + 1))
        if gate == "emo":
            rule = dataclasses.replace(rule, pool=max(k, -(-e // 4)))
        yield Case(gate, g, s, e, k, c, round(float(rng.uniform(0, 0.5)), 1), fields, rule, draws, full=False)


#: Pairs (gate, mode) that the config must refuse.
REFUSED_MODES = (("soft_moe", "gather"), ("soft_moe", "dropless"))


def refused(case: Case, mode: str) -> bool:
    """Whether the config must refuse this mode."""
    return (case.gate, mode) in REFUSED_MODES or (mode == "dropless" and "overflow_to_next" in case.fields)


def null_of(gate: str, fields: dict[str, Any]) -> tuple[int, int, int, int]:
    """Numbers of zero, copy, constant and novice experts of a layer."""
    names = ("zero_experts", "copy_experts", "constant_experts", "novice_experts")
    zero, copy, constant, novice = (fields.get(name, getattr(LAYERS[gate], name)) for name in names)
    return zero, copy, constant, novice
