"""The gates by name, with their papers' constants."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jax import Array

from moe.routing import gates
from moe.routing.gates import Choice, Given


@dataclasses.dataclass(frozen=True)
class Gate:
    """A paper's rule and its constants; each constant is the default of the field of that name in ``model.moe``.

    Attributes:
        choose: (router_logits [G,S,E], Given) → Choice.
        source: paper and equation.
        experts_per_token: K; 0 means every expert.
        kept_expert_groups: 0 means all.
        renormalise: 1 or 0, whether the chosen weights are divided by their sum; -1: the rule says so itself.
        fixed_k: whether the rule exists for that K only.
        balance_first_choice: whether the load-balancing loss counts first choices alone.
        router: parameters of the router: linear (W_g), noisy (W_g and W_noise, both zero at first), biased (W_g and a
            bias that no gradient reaches), slots (a W_g per slot of every expert) or none.
        looks_ahead: whether a token's experts depend on later tokens.
    """

    choose: Callable[[Array, Given], Choice]
    source: str
    experts_per_token: int
    capacity_factor: float
    eval_capacity_factor: float
    load_balancing_weight: float = 0.0
    z_loss_weight: float = 0.0
    importance_weight: float = 0.0
    load_weight: float = 0.0
    device_balance_weight: float = 0.0
    balance_scope: str = "batch"
    bias_update_rate: float = 0.0
    jitter: float = 0.0
    drop_policy: str = "position"
    expert_groups: int = 1
    kept_expert_groups: int = 0
    renormalise: int = -1
    routing_scale: float = 1.0
    fixed_k: bool = False
    balance_first_choice: bool = False
    router: str = "linear"
    looks_ahead: bool = False


GATES: dict[str, Gate] = {
    "dense_mixture": Gate(
        gates.dense_mixture,
        "Jacobs et al. 1991, equation 1",
        experts_per_token=0,
        capacity_factor=1.0,  # K = E: C = S, nothing is ever dropped
        eval_capacity_factor=1.0,
        fixed_k=True,
    ),
    "noisy_topk": Gate(
        gates.noisy_topk,
        "Shazeer 2017, equations 3-11",
        experts_per_token=4,
        capacity_factor=2.0,  # the paper has no capacity
        eval_capacity_factor=2.0,
        importance_weight=0.1,
        load_weight=0.1,
        router="noisy",
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
        balance_first_choice=True,
    ),
    "switch": Gate(
        gates.softmax_top_k,
        "Switch 2021, equations 1-6",
        experts_per_token=1,
        capacity_factor=1.25,
        eval_capacity_factor=2.0,
        load_balancing_weight=0.01,
        jitter=0.01,
        renormalise=0,
    ),
    "switch_sampled": Gate(
        gates.softmax_sampled,
        "Switch 2021, appendix C",
        experts_per_token=1,
        capacity_factor=1.25,
        eval_capacity_factor=2.0,
        load_balancing_weight=0.01,
        renormalise=0,
    ),
    "st_moe": Gate(
        gates.st_moe,
        "ST-MoE 2022, equations 1-6 and appendix D",
        experts_per_token=2,
        capacity_factor=1.25,
        eval_capacity_factor=2.0,
        load_balancing_weight=0.01,
        z_loss_weight=1e-3,
        drop_policy="probability",
    ),
    "mixtral": Gate(
        gates.mixtral,
        "Mixtral 2024, section 2.1",
        experts_per_token=2,
        capacity_factor=1.25,
        eval_capacity_factor=2.0,
        load_balancing_weight=0.02,
    ),
    "deepseek_moe": Gate(
        gates.softmax_top_k,
        "DeepSeekMoE 2024, equations 9-17",
        experts_per_token=6,
        capacity_factor=1.25,  # the paper drops nothing; model.moe.dispatch=dropless does as it did
        eval_capacity_factor=2.0,
        load_balancing_weight=1e-3,
        device_balance_weight=0.0,  # 0.05 in the paper's 145B model, whose experts are spread over devices
        renormalise=0,
    ),
    "deepseek_v3": Gate(
        gates.deepseek_v3,
        "DeepSeek-V3 2024, equations 12-20",
        experts_per_token=8,
        capacity_factor=1.25,  # the paper drops nothing; model.moe.dispatch=dropless does as it did
        eval_capacity_factor=2.0,
        load_balancing_weight=1e-4,
        balance_scope="sequence",
        bias_update_rate=1e-3,
        expert_groups=8,
        kept_expert_groups=4,
        renormalise=1,
        routing_scale=2.5,
        router="biased",
    ),
    "expert_choice": Gate(
        gates.expert_choice,
        "Expert Choice 2022, equations 1-3",
        experts_per_token=2,  # on average: an expert takes C = capacity_factor·K·S/E tokens
        capacity_factor=1.0,
        eval_capacity_factor=1.0,
        looks_ahead=True,
    ),
    "soft_moe": Gate(
        gates.dense_mixture,  # a token's weight of an expert is the sum over that expert's slots
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
        capacity_factor=1.25,
        eval_capacity_factor=2.0,
        router="none",
    ),
    "random": Gate(
        gates.random_experts,
        "a baseline: uniform draws",
        experts_per_token=1,
        capacity_factor=1.25,
        eval_capacity_factor=2.0,
        router="none",
    ),
    "balanced": Gate(
        gates.balanced,
        "a benchmark: round-robin",
        experts_per_token=1,
        capacity_factor=1.0,
        eval_capacity_factor=1.0,
    ),
}
