"""The same parameters and FLOPs as few wide experts, as many narrow ones, and with one of them shared.

python scripts/ablate.py --suite=configs/ablations/granularity.py --workdir=/tmp/granularity
"""

from configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant


def get_suite(size: str) -> Suite:
    """GShard with 2 of 16 experts; DeepSeekMoE's gate with 4 of 32 and 8 of 64, each also with one of them shared."""
    f = common.hidden(size)
    weights = {"load_balancing_weight": 0.01}

    def fine(k: int, shared: int = 0) -> dict[str, object]:
        # The shared expert replaces a routed one, except on a mesh, whose expert axis must divide their number.
        routed = 8 * k - (shared if size == "laptop" else 0)
        own = common.moe(size, "deepseek_moe", routed, k - shared, f // k, **weights)
        return {**own, "model.moe.shared_d_ff": shared * f // k}

    variants = {
        "gshard_16x2": Variant(common.moe(size, "gshard", 16, 2), probes=("mask_top",)),
        "fine_32x4": Variant(fine(4)),
        "fine_64x8": Variant(fine(8), probes=("mask_top",)),
        "shared_31x3": Variant(fine(4, 1), probes=("mask_top",)),
        "shared_63x7": Variant(fine(8, 1), probes=("mask_top",)),
    }
    return Suite(
        name="granularity",
        question="Do finer experts, and a shared one, make better use of the same parameters?",
        base=common.base(size),
        variants=variants,
        seeds=(0, 1, 2, 3, 4),
        horizons=common.horizons(size),
        sweep=common.sweep(size),
        comparisons={
            "equal FLOPs and parameters": Comparison("gshard_16x2", tuple(variants)[1:], common.FLOPS_AND_PARAMETERS)
        },
    )
