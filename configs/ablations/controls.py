"""Worth of a learnt router and of more parameters: hash and random routing, and a dense model eight times as wide.

moe ablate --suite=configs/ablations/controls.py --workdir=/tmp/lab --jobs=2

Shares the runs of dense, top1_free and top2_free with switch_vs_mixtral.py in the same workdir. About ten minutes a run
on one idle CPU core, dense_x8 about 30.
"""

from moe.configs.ablations import common
from moe.configs.ablations.switch_vs_mixtral import two_by_two
from moe.lab.suite import Comparison, Suite, Variant


def get_suite(size: str) -> Suite:
    """Dense; top-1 with a learnt router, by a hash of the token and at random; top-2; dense with d_ff × 8."""
    learnt = {name: arm for name, arm in two_by_two(size).items() if name.endswith("_free")}
    fixed = {
        gate: Variant(common.moe(size, gate, 8, 1, **common.DROPLESS), rate_from="top1_free", note=note)
        for gate, note in (
            ("hash", "routing by a hash of the token"),
            ("random", "routing drawn for each token and step"),
        )
    }
    wide = {"dense_x8": Variant({"model.d_ff": 8 * common.hidden(size)}, note="eight times the FFN and its FLOPs")}
    return common.suite(
        size,
        name="controls",
        question="Does a learnt router earn anything, and how much of a dense model of all its parameters does a "
        "sparse one reach?",
        variants={"dense": Variant({}, note="one FFN"), **learnt, **fixed, **wide},
        seeds=(5, 6, 7, 8, 9),
        comparisons={
            "equal FLOPs and parameters": Comparison("top1_free", tuple(fixed), common.FLOPS_AND_PARAMETERS),
            "from dense to dense × 8": Comparison("dense", ("dense_x8", *learnt, *fixed), ("steps",), whole="dense_x8"),
        },
    )
