"""Whether the optimizer changes which gate wins: four gates under AdamW and under Muon.

python scripts/ablate.py --suite=configs/ablations/optimizer.py --workdir=/tmp/lab --jobs=2

Never run so far: 24 runs and the sweep of each arm, about eight core-hours. Muon moves the matrices of attention, FFNs
and experts; routers stay with AdamW (moe/training/optimizer.py).
"""

from moe.configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant

#: gate → K of 8 experts and further fields; all have the same active parameters.
GATES = {
    "switch": (1, {}),
    "mixtral": (2, {}),
    "deepseek_v3": (2, {"gate.groups": 1, "gate.kept_groups": 1, "gate.scores_per_group": 1, "gate.scale": 1.0}),
    "quantile_balancing": (2, {}),
}


def get_suite(size: str) -> Suite:
    """Top-1, top-2 with a loss, and two gates balanced by a bias, each under both optimizers."""
    variants = {
        f"{gate}_{name}": Variant(
            common.moe(size, gate, 8 * k, k, **common.DROPLESS, **fields) | {"optimizer.name": name}
        )
        for gate, (k, fields) in GATES.items()
        for name in ("adamw", "muon")
    }
    others = [gate for gate in GATES if gate != "switch"]
    return common.suite(
        size,
        name="optimizer",
        question="Does the optimizer change which gate wins?",
        variants=variants,
        seeds=(5, 6, 7),
        sweep=common.sweep(size),
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
