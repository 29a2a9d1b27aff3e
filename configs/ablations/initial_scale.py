"""Dense, Switch's and Mixtral's layers from matrices of scale 0.1, which Switch's paper prescribes, and of scale 1.0.

    moe ablate --suite=configs/ablations/initial_scale.py --workdir=/tmp/lab --jobs=2

The arms at 1.0 are those of switch_vs_mixtral. Switch at 0.1 is an arm of router_init_and_precision, whose seeds 5 to 9
had been seen when claims 42 and 43 were registered; of dense and Mixtral at 0.1 no run had been made.
"""

import dataclasses

from moe.configs.ablations import common, switch_vs_mixtral
from moe.lab.suite import Comparison, Suite

_ARMS = ("dense", "switch", "mixtral")


def get_suite(size: str) -> Suite:
    """Three arms of switch_vs_mixtral, each at both scales."""
    first = switch_vs_mixtral.get_suite(size).variants
    variants = {name: dataclasses.replace(first[name], rate_from="", probes=()) for name in _ARMS}
    for name in _ARMS:
        arm = variants[name]
        variants[f"{name}_0.1"] = dataclasses.replace(
            arm, overrides={**arm.overrides, "model.init_scale": 0.1}, note=f"{name}, initial scale 0.1"
        )
    return common.suite(
        size,
        name="initial_scale",
        question="Does what is seen of Switch, Mixtral and dense at initial scale 1.0 hold at Switch's 0.1?",
        variants=variants,
        seeds=tuple(range(5, 15)),
        dropping_differs="each layer has its own paper's capacity",
        comparisons={
            "equal active and total parameters, scale 0.1": Comparison(
                "switch_0.1", ("mixtral_0.1", "mixtral"), ("steps", "active_parameters", "total_parameters")
            ),
            "equal active FLOPs, scale 0.1": Comparison("dense_0.1", ("switch_0.1", "mixtral_0.1"), ("steps", "flops")),
            **{
                f"{name}, scale 0.1 against 1.0": Comparison(name, (f"{name}_0.1",), common.FLOPS_AND_PARAMETERS)
                for name in _ARMS
            },
        },
    )
