"""Switch, Mixtral and other gates against the dense model at equal active FLOPs, by horizon.

    python scripts/ablate.py --suite=configs/ablations/switch_vs_mixtral.py --workdir=/tmp/switch_vs_mixtral

Every sparse arm has about 8 times the dense model's FFN parameters and uses one eighth of them for a token. Two cores
of an AMD EPYC: about nine minutes for a run of 2,000 steps on one core. Expected: at 200 steps most sparse arms are
behind the dense one, at 2,000 steps ahead of it by 0.04 to 0.09 nats.
"""

from configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant


def get_suite(size: str) -> Suite:
    """Dense; Switch at two capacity factors; GShard; Mixtral and DeepSeekMoE dropless; noisy top-k."""
    fine = common.hidden(size) // 4  # DeepSeekMoE: quarter-size experts, one of four shared
    routed = 31 if size == "laptop" else 32  # a mesh's expert axis must divide it
    free = {"dispatch": "dropless", "eval_capacity_factor": -1}
    sparse = {
        "switch_1.25": Variant(
            common.moe(size, "switch", 8, 1, capacity_factor=1.25, eval_capacity_factor=-1),
            note="top-1 of 8, capacity factor 1.25",
        ),
        "mixtral": Variant(
            common.moe(size, "mixtral", 16, 2, **free),
            probes=("specialisation", "saturation"),
            note="top-2 of 16, softmax over the two, dropless",
        ),
        "switch_1.0": Variant(
            common.moe(size, "switch", 8, 1, capacity_factor=1.0, eval_capacity_factor=-1),
            probes=("eval_capacity",),
            note="top-1 of 8, capacity factor 1.0",
        ),
        "deepseek_moe": Variant(
            common.moe(size, "deepseek_moe", routed, 3, fine, shared_d_ff=fine, load_balancing_weight=0.01, **free),
            probes=("shared_expert",),
            note=f"3 of {routed} fine-grained experts and one shared, dropless",
        ),
        "gshard": Variant(
            common.moe(size, "gshard", 16, 2, eval_capacity_factor=-1), note="top-2 of 16, the second at random"
        ),
        "noisy_topk": Variant(
            common.moe(size, "noisy_topk", 16, 2, eval_capacity_factor=-1), note="top-2 of 16, learnt noise"
        ),
    }
    names = tuple(sparse)
    return Suite(
        name="switch_vs_mixtral",
        question="At equal FLOPs, does a sparse layer beat the dense one, which gate does best, and from when on?",
        base=common.base(size),
        variants={"dense": Variant({}, note="one FFN"), **sparse},
        seeds=(0, 1, 2, 3, 4),
        horizons=common.horizons(size),
        sweep=common.sweep(size),
        headline=("dense", "switch_1.25", "mixtral"),
        comparisons={
            "equal active FLOPs": Comparison("dense", names, ("steps", "flops")),
            "equal active and total parameters": Comparison(
                "switch_1.25",
                tuple(name for name in names if name != "switch_1.25"),
                ("steps", "active_parameters", "total_parameters"),
            ),
        },
    )
