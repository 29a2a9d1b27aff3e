"""Whether the optimizer changes which gate wins: four gates under AdamW and under Muon.

python scripts/ablate.py --suite=configs/ablations/optimizer.py --workdir=/tmp/optimizer

Never run so far. Two short horizons, three seeds and eight arms: 48 runs of 200 and 600 steps, about an hour on two
idle cores, and 24 runs of the sweep. Muon moves the matrices of attention, FFNs and experts; routers stay with AdamW
(moe/training/optimizer.py).
"""

from configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant

#: gate → K of 8 experts and further fields; all have the same active parameters.
GATES = {
    "switch": (1, {}),
    "mixtral": (2, {}),
    "deepseek_v3": (2, {"expert_groups": 1, "kept_expert_groups": 1, "routing_scale": 1.0}),
    "quantile_balancing": (2, {}),
}


def get_suite(size: str) -> Suite:
    """Top-1, top-2 with a loss, and two gates balanced by a bias, each under both optimizers."""
    variants = {
        f"{gate}_{name}": Variant(
            common.moe(size, gate, 8 * k, k, dispatch="dropless", **fields) | {"optimizer.name": name}
        )
        for gate, (k, fields) in GATES.items()
        for name in ("adamw", "muon")
    }
    horizons = common.horizons(size)[:2]
    others = [gate for gate in GATES if gate != "switch"]
    return Suite(
        name="optimizer",
        question="Does the optimizer change which gate wins?",
        base=common.base(size),
        variants=variants,
        seeds=(0, 1, 2),
        horizons=horizons,
        sweep=common.sweep(size, horizons[0]),
        comparisons={
            **{
                f"gates under {name}": Comparison(
                    f"switch_{name}", tuple(f"{gate}_{name}" for gate in others), common.FLOPS_AND_PARAMETERS
                )
                for name in ("adamw", "muon")
            },
            **{
                f"optimizers under {gate}": Comparison(f"{gate}_adamw", (f"{gate}_muon",), common.FLOPS_AND_PARAMETERS)
                for gate in GATES
            },
        },
    )
