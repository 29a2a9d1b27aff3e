"""No balancing, auxiliary losses of three weights, the z-loss, and loss-free biases, all dropless.

moe ablate --suite=configs/ablations/balancing.py --workdir=/tmp/lab --jobs=2
"""

import dataclasses
from typing import Any

from moe.configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant

_GATES = {"mixtral": "Mixtral's softmax gate", "deepseek_v3": "DeepSeek-V3's sigmoid gate without groups"}


def get_suite(size: str) -> Suite:
    """Top-2 of 8, dropless, so that an uneven load drops no assignment."""
    wide = common.hidden(size) // 2

    def top2(balance: float, gate: str = "mixtral", z: float = 0.0, **fields: Any) -> Variant:
        losses = {"losses.balance": balance, "losses.z": z}
        moe = common.moe(size, gate, 8, 2, wide, **losses, **common.DROPLESS, **fields)
        note = f"{_GATES[gate]}, balance weight {balance:g}"
        note += f", z-loss weight {z:g}" if z else ""
        note += ", selection biases" if fields.get("gate.bias_rate") else ""
        return Variant(moe, rate_from="aux_0.01", note=note)

    variants = {
        "none": top2(0.0),
        "aux_0.001": top2(0.001),
        "aux_0.01": top2(0.01),
        "aux_0.1": top2(0.1),
        "aux_0.01_z": top2(0.01, z=1e-3),
    }
    sigmoid = {"gate.groups": 1, "gate.kept_groups": 1, "gate.scores_per_group": 1, "gate.scale": 1.0}
    # As many experts and choices as Mixtral has, so that its table of repeated experts has the same chance.
    variants["aux_0.01"] = dataclasses.replace(variants["aux_0.01"], rate_from="", probes=("repetition",))
    # The paper moves the bias by 0.001 a step over about 10^5 steps; a short run needs larger steps.
    rate = 1e-3 if size == "pod" else 1e-2
    variants["sigmoid_aux"] = top2(0.01, "deepseek_v3", **sigmoid, **{"gate.bias_rate": 0.0})
    variants["loss_free"] = top2(0.0, "deepseek_v3", **sigmoid, **{"gate.bias_rate": rate})
    return common.suite(
        size,
        name="balancing",
        question="What keeps experts busy, and what does it cost?",
        variants=variants,
        seeds=(5, 6, 7, 8, 9),
        comparisons={
            "equal FLOPs and parameters": Comparison("none", tuple(variants)[1:], common.FLOPS_AND_PARAMETERS),
            "loss-free against its auxiliary loss": Comparison(
                "sigmoid_aux", ("loss_free",), common.FLOPS_AND_PARAMETERS
            ),
        },
    )
