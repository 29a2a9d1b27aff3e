"""The same parameters and FLOPs as few wide experts or many narrow ones, without and with one of them shared.

moe ablate --suite=configs/ablations/granularity.py --workdir=/tmp/lab --jobs=2
"""

from moe.configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant

#: Arms of DeepSeekMoE's figure 4 and OLMoE's sections 5.1 and 5.2.
MEASURED = ("routed_16x2", "routed_64x8")


def get_suite(size: str) -> Suite:
    """DeepSeekMoE's gate with 2 of 16, 4 of 32 and 8 of 64 experts, dropless; each also with one of them shared."""
    f, variants = common.hidden(size), {}
    for k in (2, 4, 8):
        for shared in (0, 1):
            # The shared expert replaces a routed one, except on a mesh, whose expert axis must divide their number.
            routed = 8 * k - (shared if size == "laptop" else 0)
            fields = {"losses.balance": 0.01, "shared_d_ff": shared * f // k, **common.DROPLESS}
            name = f"shared_{8 * k - 1}x{k - 1}" if shared else f"routed_{8 * k}x{k}"
            variants[name] = Variant(
                common.moe(size, "deepseek_moe", routed, k - shared, f // k, **fields),
                rate_from="" if name == "routed_16x2" else "routed_16x2",
                probes=("mask_top", "coactivation", "saturation") if name in MEASURED else (),
            )
    return common.suite(
        size,
        name="granularity",
        question="Do finer experts, and a shared one, make better use of the same parameters?",
        variants=variants,
        seeds=(5, 6, 7, 8, 9),
        comparisons={
            "equal FLOPs and parameters": Comparison(
                "routed_16x2", tuple(variants)[1:], common.FLOPS_AND_PARAMETERS, tolerance=0.06
            ),
            **{
                f"sharing at {8 * k} experts": Comparison(
                    f"routed_{8 * k}x{k}", (f"shared_{8 * k - 1}x{k - 1}",), common.FLOPS_AND_PARAMETERS
                )
                for k in (4, 8)
            },
        },
    )
