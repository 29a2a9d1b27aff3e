"""Cost of arithmetic in fewer bits: bfloat16, products in 8 bits, and moments of the optimizer in bfloat16.

moe ablate --suite=configs/ablations/precision.py --workdir=/tmp/lab --jobs=2

Runs of one seed start from the same parameters and see the same batches, so that their losses differ by the arithmetic
alone, and 2,000 steps show it.
"""

from moe.configs.ablations import common
from moe.configs.ablations.switch_vs_mixtral import two_by_two
from moe.lab.suite import Comparison, Suite, Variant


def get_suite(size: str) -> Suite:
    """Top-2 of 16, dropless: in float32 and bfloat16, with factors in int8 and float8, without attention's and with
    them, and with moments in bfloat16."""
    layer = two_by_two(size)["top2_free"].overrides
    narrow = {**layer, "model.dtype": "bfloat16"}
    fields = {
        "float32": ({"model.dtype": "float32"}, "compute in float32"),
        "int8": ({"model.low_precision": "int8"}, "operands of the experts' matmuls in int8"),
        "float8": ({"model.low_precision": "float8"}, "operands of the experts' matmuls in float8"),
        "float8_all": (
            {"model.low_precision": "float8", "model.low_precision_in": "all"},
            "operands of attention's projections in float8 too",
        ),
        "moments": ({"optimizer.moment_dtype": "bfloat16"}, "both moments of AdamW in bfloat16"),
    }
    others = {name: Variant({**narrow, **own}, note=note, rate_from="bfloat16") for name, (own, note) in fields.items()}
    return common.suite(
        size,
        name="precision",
        question="What does arithmetic in fewer bits cost?",
        variants={"bfloat16": Variant(narrow, note="compute in bfloat16, as on pods"), **others},
        horizons=(2000,),
        seeds=(5, 6, 7, 8, 9),
        comparisons={"equal except for precision": Comparison("bfloat16", tuple(others), common.FLOPS_AND_PARAMETERS)},
    )
