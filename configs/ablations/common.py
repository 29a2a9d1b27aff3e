"""The model, text and budget that the suites share, in each of the two sizes.

laptop: 4 layers of 128, five domains, 120 steps of 2,048 tokens: a run takes about half a minute on two CPU cores.
pod: 16 layers of 1024 on the mesh's expert axis, C4 through TFDS, 0.5M tokens a step: not run by us.

The dense FFN has F hidden units and `E` experts of top-1 have F each, so that all of them have the same active
parameters and FLOPs a token; k experts of F/k are as many as k times E, so that the total is the same too.
"""

from typing import Any

import ml_collections

from configs import base as defaults

#: What a comparison holds equal whose arms differ in the rule alone.
FLOPS_AND_PARAMETERS = ("steps", "flops", "active_parameters", "total_parameters")


def base(size: str) -> ml_collections.ConfigDict:
    """The dense model; variants override the gate."""
    config = defaults.get_config()
    config.model.moe.gate = "none"
    config.train.sample_tokens = 0
    config.train.keep_checkpoints = 1
    if size == "pod":
        config.model.update(vocab_size=32768, d_model=1024, num_layers=16, num_heads=16, num_kv_heads=8, head_dim=64)
        config.model.update(d_ff=4096, dtype="bfloat16", remat="full", attention="blocked")
        config.data.update(dataset="c4/en", sequence_length=2048, heldout_rows=256)
        config.train.update(batch_size=256, num_steps=20_000, log_every=100, eval_every=1000, save_every=1000)
        config.mesh.update(data=-1, expert=8)
        config.optimizer.update(learning_rate=1e-3, warmup_steps=1000)
        return config
    config.model.update(vocab_size=2048, d_model=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32)
    config.model.update(d_ff=512, scan_layers=False)
    config.data.domains = ("literature", "definitions", "python", "technical", "translations")
    config.data.update(sequence_length=128, heldout_rows=32)
    config.train.update(batch_size=16, num_steps=120, log_every=20, eval_every=30, save_every=60)
    config.optimizer.update(learning_rate=4e-3, warmup_steps=16)
    return config


def primary(size: str) -> tuple[str, ...]:
    """The domains that comparisons are about.

    laptop: not translations. It is in some sixty languages; in so short a run most bytes of other scripts are never
    seen, and Adam drives their logits down: in a first trial its held-out loss was above the uniform model's 7.6 nats
    and differed by 0.2 between seeds, ten times what the other four did. It is trained on and reported.
    """
    domains = base(size).data.domains
    return ("c4/en",) if size == "pod" else tuple(name for name in domains if name != "translations")


def hidden(size: str) -> int:
    """F of the dense FFN."""
    return base(size).model.d_ff


def moe(size: str, gate: str, num_experts: int, k: int, d_ff: int = 0, **fields: Any) -> dict[str, Any]:
    """Overrides of an MoE variant.

    Args:
        size: of the suite.
        gate: a name in moe.routing.registry.GATES.
        num_experts: E.
        k: experts a token visits.
        d_ff: hidden units of one expert; 0: F/k, which keeps the dense model's FLOPs.
        **fields: of model.moe.

    Evaluated with room for four times the even load: held-out batches are of one domain, so that their loads are
    uneven, and what would be dropped there says nothing of training.
    """
    config = base(size)
    # One capacity for all tokens of a device's rows: what chance drops is then small.
    group = config.data.sequence_length if size == "pod" else config.data.sequence_length * config.train.batch_size
    own = {"gate": gate, "num_experts": num_experts, "experts_per_token": k, "d_ff": d_ff or hidden(size) // k}
    own |= {"group_size": group, "eval_capacity_factor": 4.0}
    return {f"model.moe.{name}": value for name, value in {**own, **fields}.items()}
