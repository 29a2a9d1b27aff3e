"""Switch against a dense T5 at equal FLOPs, pre-trained by span corruption (Switch 2021, figures 4 and 5 in small).

    moe ablate --suite=configs/ablations/switch_t5.py --workdir=/tmp/lab --jobs=2

The loss is in nats per target, sentinels included; its exponential is the perplexity on the targets.
"""

from typing import Any

from moe.configs import switch_t5
from moe.configs.ablations import common
from moe.lab.suite import Comparison, Suite, Variant


def get_suite(size: str) -> Suite:
    """Dense T5, and Switch with 8 experts of the same width in every second layer of both stacks."""
    base = switch_t5.get_config()
    base.model.moe.group_size = 0  # the suite makes one group of the decoder's tokens in a batch
    base.data.domains = ("literature", "definitions", "python", "technical")
    base.train.update(batch_size=16, sample_tokens=0)
    if size == "pod":
        pod: Any = common.base(size)
        base.model.update(
            {name: getattr(pod.model, name) for name in ("vocab_size", "d_model", "num_heads", "head_dim", "d_ff")}
        )
        base.model.update(num_kv_heads=16, num_layers=12, encoder_layers=12, dtype="bfloat16", remat="full")
        base.data.update(dataset="c4/en", domains=(), input_length=512, sequence_length=128)
        base.train.batch_size, base.mesh = 1024, pod.mesh
        base.optimizer.learning_rate = 1e-3
    if size == "laptop":
        base.train.num_steps = 8000
        base.model.update(d_model=64, num_heads=4, num_kv_heads=4, head_dim=16, d_ff=256)
    return common.suite(
        size,
        name="switch_t5",
        question="At equal FLOPs, does a Switch encoder-decoder predict removed spans better than a dense T5?",
        base=base,
        variants={
            "dense": Variant({"model.moe.gate": "none"}, note="T5"),
            "switch": Variant({}, note="top-1 of 8, capacity factor 1.25"),
        },
        seeds=(5, 6, 7, 8, 9),
        sweep=common.sweep(size, float(base.optimizer.learning_rate)),
        unseen=(),
        domain_tokens={},  # of causal text
        comparisons={"equal active FLOPs": Comparison("dense", ("switch",), ("steps", "flops"))},
    )
