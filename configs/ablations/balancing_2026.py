"""Four more ways of balancing and coupling of 2022 to 2026, and a cosine router, beside Mixtral's layer, ten seeds.

    moe ablate --suite=configs/ablations/balancing_2026.py --workdir=/tmp/lab --jobs=2

Momentum biases, thresholds in training and Sinkhorn's plan without a balance loss, against sign biases and a balance
loss; the coupling loss and cosines against Mixtral's layer, from which they differ in nothing else. Each with its own
sweep of three rates on two reserved seeds. Eighty compared runs and about 48 of the sweep, of ten to 17 minutes: 21 to
36 core-hours. All arms start at scale 0.1.
"""

import dataclasses
from typing import Any

from moe.configs.ablations import common, paper_scale, routers_2026
from moe.lab.suite import Comparison, Suite, Variant

#: Mixtral's weights and losses.
_MIXTRAL: dict[str, Any] = {"gate.renormalise": True, "losses.balance": 0.02, "losses.z": 0.0}


def get_suite(size: str) -> Suite:
    """Mixtral's layer, sign biases and a balance loss of `routers_2026`, and five more arms: top-2 of 16, dropless."""
    earlier = routers_2026.get_suite(size)

    def top2(gate: str, note: str, **fields: Any) -> Variant:
        return Variant(common.moe(size, gate, 16, 2, **fields, **common.DROPLESS), note=note)

    # The paper moves the bias by 5e-4 a step; here by as much as sign biases.
    bias_rate = 1e-3 if size == "pod" else 1e-2
    added = {
        "momentum": top2(
            "smebu",
            f"sigmoid gate, top-2 of 16, biases with a momentum of clamped errors, rate {bias_rate:g}, no balance loss",
            **{"gate.bias_rate": bias_rate},
        ),
        "thresholds": top2(
            "running_thresholds",
            "every expert of 16 whose threshold the softmax exceeds, two on average, no balance loss",
        ),
        "sinkhorn": top2(
            "sinkhorn",
            "top-2 of 16 by Sinkhorn's plan over the batch in training, by logits otherwise, no balance loss",
            **{"gate.renormalise": True, "accept_future_leak": True},
        ),
        "coupled": top2("coupled", "Mixtral's layer, top-2 of 16, with the coupling loss of weight 1", **_MIXTRAL),
        "cosine": top2("cosine", "Mixtral's layer, top-2 of 16, with a cosine router of 64 dimensions", **_MIXTRAL),
    }
    kept = ("mixtral", "sign_bias", "sigmoid_aux")
    arms = {name: earlier.variants[name] for name in kept} | paper_scale.at_papers_scale(added)
    others = ("sign_bias", "sigmoid_aux", "momentum", "thresholds", "sinkhorn", "coupled")
    return dataclasses.replace(
        earlier,
        name="balancing_2026",
        question="Do momentum biases, thresholds, Sinkhorn's plan, the coupling loss or cosines improve Mixtral's "
        "layer at this size?",
        variants=arms,
        seeds=tuple(range(70, 80)),
        headline=("mixtral", *added),
        dropping_differs="",
        comparisons={
            "equal active and total parameters": Comparison(
                "mixtral", others, ("steps", "active_parameters", "total_parameters")
            ),
            "without a balance loss against with one": Comparison(
                "sigmoid_aux", ("sign_bias", "momentum", "sinkhorn"), common.FLOPS_AND_PARAMETERS
            ),
        },
    )
