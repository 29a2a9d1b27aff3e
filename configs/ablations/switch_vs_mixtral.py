"""Switch against Mixtral against dense, and the other gates, at equal active FLOPs and at equal parameters.

    python scripts/ablate.py --suite=configs/ablations/switch_vs_mixtral.py --workdir=/tmp/switch_vs_mixtral

Every sparse variant has 8 times the dense model's FFN parameters and uses one eighth of them for a token.
"""

from configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant


def get_suite(size: str) -> Suite:
    """dense, Switch, GShard, Mixtral, DeepSeekMoE, noisy top-k."""
    fine = common.hidden(size) // 4  # DeepSeekMoE: quarter-size experts, one of four shared
    base = common.base(size)
    if size == "laptop":  # the suite with the most seeds is also the longest
        base.train.update(num_steps=200, eval_every=40, save_every=100)
        base.optimizer.warmup_steps = 24
    # Evaluated at the papers' own factors; the probe shows what they cost where every batch is of one domain.
    own = {"eval_capacity_factor": -1}
    checkpoints = {"train.save_every": base.train.num_steps // 8, "train.keep_checkpoints": 8}  # for saturation
    sparse = {
        "switch": Variant(
            common.moe(size, "switch", 8, 1, capacity_factor=1.0, **own),
            probes=("eval_capacity",),
            note="top-1, capacity factor 1.0",
        ),
        "gshard": Variant(
            common.moe(size, "gshard", 16, 2, **own), probes=("eval_capacity",), note="top-2, the second at random"
        ),
        "mixtral": Variant(
            {**common.moe(size, "mixtral", 16, 2, **own), **checkpoints},
            probes=("specialisation", "saturation", "eval_capacity"),
            note="top-2, softmax over the two",
        ),
        "deepseek_moe": Variant(
            common.moe(
                size,
                "deepseek_moe",
                31 if size == "laptop" else 32,
                3,
                fine,
                shared_d_ff=fine,
                load_balancing_weight=0.01,
                **own,
            ),
            probes=("eval_capacity",),
            note="3 fine-grained experts, and one shared",
        ),
        "noisy_topk": Variant(
            common.moe(size, "noisy_topk", 16, 2, **own), probes=("eval_capacity",), note="top-2, learnt noise"
        ),
    }
    names = tuple(sparse)
    return Suite(
        name="switch_vs_mixtral",
        question="At equal FLOPs, does a sparse layer beat the dense one, and which gate does best?",
        base=base,
        variants={"dense": Variant({}, note="one FFN"), **sparse},
        seeds=(0, 1, 2, 3, 4),
        primary=common.primary(size),
        comparisons={
            "equal active FLOPs": Comparison("dense", names, ("steps", "flops")),
            "equal active and total parameters": Comparison(
                "switch", names[1:], ("steps", "active_parameters", "total_parameters")
            ),
            "equal wall time": Comparison("dense", names, ("wall_time",)),
        },
    )
