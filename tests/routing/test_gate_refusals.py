"""Refused settings of gates, and the constants of each gate's paper."""

import numpy as np
import pytest

from moe.config import Changes, ConfigError
from moe.config.parse import from_config_dict
from moe.config.registry import LAYERS
from moe.interop.layers import single_layer

REFUSED = [
    ({"gate": "expert_choice"}, "accept_future_leak"),
    ({"gate": "soft_moe", "dispatch": "einsum"}, "accept_future_leak"),
    ({"gate": "soft_moe", "dispatch": "gather", "accept_future_leak": True}, "must be einsum"),
    ({"gate": "deepseek_v3", "num_experts": 12}, "model.moe.gate.groups=8: must divide num_experts=12"),
    ({"gate": {"name": "deepseek_v3", "kept_groups": 9}, "num_experts": 16}, "kept_groups=9: must be at most groups=8"),
    ({"gate": "deepseek_v3", "num_experts": 8}, "must be at most the 4 experts"),
    ({"gate": {"name": "mixtral", "k": 5}, "num_experts": 4}, "must be at most num_experts=4"),
    ({"gate": {"name": "gshard", "k": 3}}, "gate.k: no such field"),
    ({"gate": {"name": "switch", "groups": 3}, "num_experts": 4}, "divide num_experts=4"),
    ({"gate": {"name": "hash", "renormalise": True}}, "gate.renormalise: no such field"),
    ({"gate": {"name": "remoe", "scale": 2.0}}, "gate.scale: no such field"),
    ({"gate": {"name": "balanced", "bias": "sign"}}, "gate.bias: no such field"),
    ({"gate": {"name": "mixtral", "bias": "penalty"}}, "gate.bias='penalty': must be one of none, sign, quantile"),
    ({"gate": {"name": "mixtral", "bias": "quantile", "k": 8}}, "needs k below the number of experts"),
    ({"gate": {"name": "switch", "score": "tanh"}}, "must be one of softmax, sigmoid, sqrt_softplus"),
    ({"gate": {"name": "noisy_topk", "bias": "sign"}}, "only the noise may decide who is chosen"),
    ({"gate": "switch", "losses": {"null": 0.5}}, "needs zero, copy, constant or novice experts"),
    ({"gate": "remoe", "zero_experts": 1}, "unless each token chooses K experts"),
    (
        {"gate": {"name": "mixtral", "groups": 2}, "copy_experts": 1},
        "groups=2: must be 1 with zero, copy or constant experts",
    ),
    ({"gate": "remoe", "overflow_to_next": True}, "tokens choose their experts"),
    (
        {"gate": "mixtral", "overflow_to_next": True},
        "overflow_to_next=True: retries an assignment after those of later",
    ),
    ({"gate": "moe_plus_plus", "overflow_to_next": True, "accept_future_leak": True}, "needs experts of one kind"),
    (
        {
            "gate": {"name": "mixtral", "groups": 4, "kept_groups": 1},
            "overflow_to_next": True,
            "accept_future_leak": True,
        },
        "overflow_to_next=True: needs kept_groups equal to groups",
    ),
    ({"gate": "hash", "overflow_to_next": True, "accept_future_leak": True}, "must be False: the gate 'hash' has no"),
    (
        {"gate": "random", "drop_policy": "probability", "accept_future_leak": True},
        "drop_policy='probability': must not be probability: the gate 'random' has no router",
    ),
    (
        {"gate": {"name": "deepseek_v4", "k": 6}, "layer_gates": ["deepseek_v3"]},
        "layer_gates='deepseek_v3': k=6: must be at most the 4 experts of kept_groups=4 of groups=8",
    ),
    (
        {"gate": {"name": "moe_plus_plus", "bias": "sign"}, "layer_gates": ["deepseek_v3"], "num_experts": 16},
        "layer_gates='deepseek_v3': groups=8: must be 1 with zero, copy or constant experts",
    ),
    ({"gate": "mixtral", "layer_gates": ["hash"] * 5}, "must be at most the 4 MoE layers"),
    ({"gate": "mixtral", "layer_gates": ["remoe"]}, "layer_gates='remoe': must choose 2 experts"),
    ({"gate": "expert_choice", "accept_future_leak": True, "layer_gates": ["hash"]}, "must choose 2 experts"),
    ({"gate": "mixtral", "layer_gates": ["deepseek_v4"]}, "must have no balancing rule, as the model's gate"),
    (
        {"gate": {"name": "deepseek_v4", "k": 2}, "layer_gates": [{"name": "quantile_balancing", "bias": "sign"}]},
        "layer_gates='quantile_balancing': must have the model's balancing rule, Sign\\(rate=0.001\\), or none",
    ),
    ({"gate": "switch", "layer_gates": ["mixtral"]}, "the only weight is then always 1"),
    (
        {"gate": "switch", "layer_gates": ["deepseek_v4_hash"]},
        "layer_gates='deepseek_v4_hash': k=1, renormalise=True: the only weight is then always 1",
    ),
    ({"gate": {"name": "deepseek_v4_hash", "k": 1}}, "gate.k=1, renormalise=True: the only weight"),
    ({"gate": "mixtral", "losses": {"load": 0.1}}, "needs the gate noisy_topk"),
    (
        {"gate": {"name": "noisy_topk", "k": 2}, "layer_gates": ["mixtral"]},
        "layer_gates='mixtral': model.moe.losses.load=0.1: needs the gate noisy_topk",
    ),
    ({"gate": {"name": "mixtral", "bias_rate": 0.1}}, "needs a bias of sign, quantile or momentum"),
    ({"gate": "switch", "capacity": {"train": 0.0}}, "must be positive"),
    ({"gate": "switch", "losses": {"scope": "world"}}, "must be one of batch, group, sequence, step"),
    ({"gate": "switch", "drop_policy": "luck"}, "must be one of position, probability, random"),
    ({"gate": "switch", "expert_dropout": 1.0}, r"must be in \[0, 1\)"),
    ({"gate": {"name": "switch", "slots": 2}}, "gate.slots: no such field"),
    ({"gate": "mixtral", "num_experts": 3, "overflow_to_next": True}, "needs num_experts at least twice"),
    ({"gate": "mixtral", "dispatch": "dropless", "overflow_to_next": True}, "a capacity"),
    ({"gate": {"name": "mixtral", "k": 1}}, "gate.k=1, renormalise=True: the only weight"),
    ({"gate": {"name": "st_moe", "k": 1}}, "the only weight is then always 1"),
    ({"gate": {"name": "noisy_topk", "k": 1}}, "the only weight is then always 1"),
    ({"gate": {"name": "switch", "renormalise": True}}, "renormalise=True: the only weight is then always 1"),
    (
        {"gate": {"name": "deepseek_v3", "k": 1, "groups": 1, "kept_groups": 1, "scores_per_group": 1}},
        "renormalise=True: the only weight is then always 1",
    ),
    ({"gate": "st_moe", "drop_policy": "probability"}, "accept_future_leak=True"),
    ({"gate": "switch", "drop_policy": "random"}, "accept_future_leak=True"),
    ({"gate": "expert_choice", "accept_future_leak": True, "drop_policy": "random"}, "drops no assignment"),
    ({"gate": "hash", "jitter": 0.1}, "jitter=0.1: must be 0: the gate 'hash' has no router"),
    ({"gate": "random", "losses": {"balance": 0.1}}, "losses.balance=0.1: must be 0"),
    ({"gate": "hash", "losses": {"z": 0.1}}, "losses.z=0.1: must be 0"),
    ({"gate": "hash", "router_dtype": "bfloat16"}, "has no router"),
    ({"gate": "hash", "bias": "router"}, "bias='router': the gate 'hash' has no router"),
    ({"gate": {"name": "mixtral", "scores_per_group": 2}}, "scores_per_group=2: needs groups above 1"),
    ({"gate": "dense_mixture", "losses": {"balance": 0.1}}, "the loss is constant"),
    *(
        (
            {"gate": gate, "losses": {"counts": counts}, "accept_future_leak": True},
            f"'{counts}': must be assignments: the gate",
        )
        for gate in ("remoe", "expert_choice", "expert_threshold")
        for counts in ("first_choice", "top_scores")
    ),
    ({"gate": "deepseek_moe", "losses": {"device": 0.05}}, "needs a gate with groups above 1"),
    (
        {"gate": "soft_moe", "dispatch": "einsum", "accept_future_leak": True, "capacity": {"train": 2.0}},
        "must be 1: soft_moe has slots instead",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        from_config_dict({"model": {"moe": fields}})


@pytest.mark.parametrize("gate", sorted(LAYERS))
def test_every_gate_has_a_valid_config_with_its_papers_constants(gate):
    tree = Changes()
    tree.model.moe.gate = gate
    tree.model.moe.num_experts = 64
    tree.model.moe.accept_future_leak = True
    tree.model.moe.dispatch = "einsum" if gate == "soft_moe" else "gather"
    moe = from_config_dict(tree).model.moe
    for name in ("gate", "capacity", "losses", "jitter", "zero_experts", "copy_experts", "constant_experts"):
        assert getattr(moe, name) == getattr(LAYERS[gate], name)


def test_single_layer_refuses_missing_and_misshapen_arrays():
    arrays = {"router": np.zeros((4, 2)), "up": np.zeros((2, 4, 3)), "down": np.zeros((2, 3, 4))}
    with pytest.raises(ConfigError, match="gate_matrix=None"):
        single_layer("switch", **arrays)
    with pytest.raises(ConfigError, match="router of shape"):
        single_layer("switch", **(arrays | {"router": np.zeros((2, 4))}), activation="relu")
    with pytest.raises(ConfigError, match="accept_future_leak=True"):
        single_layer("switch", **(arrays | {"router": np.zeros((4, 2))}), activation="relu", drop_policy="random")
