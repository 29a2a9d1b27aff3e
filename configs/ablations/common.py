"""The model, text and horizons that the suites share, in each of the two sizes.

laptop: 4 layers of 128, four domains, 2,048 tokens a step; 2,000 steps take about nine minutes on one CPU core.
pod: 16 layers of 1024 on the mesh's expert axis, C4 through TFDS, 0.5M tokens a step; never run so far.

The dense FFN has F hidden units, and E experts of top-1 have F each, so that all have the same active parameters and
FLOPs a token; top-k has k times as many experts of F/k, so that the total is the same too.
"""

from typing import Any

import ml_collections

from configs import base as defaults
from moe.lab.suite import Sweep

#: What a comparison holds equal if its arms differ in the routing rule alone.
FLOPS_AND_PARAMETERS = ("steps", "flops", "active_parameters", "total_parameters")


def base(size: str) -> ml_collections.ConfigDict:
    """The dense model; arms override the gate."""
    config = defaults.get_config()
    config.model.moe.gate = "none"
    config.train.sample_tokens = 0
    if size == "pod":
        config.model.update(vocab_size=32768, d_model=1024, num_layers=16, num_heads=16, num_kv_heads=8, head_dim=64)
        config.model.update(d_ff=4096, dtype="bfloat16", remat="full", attention="blocked")
        config.model.moe.group_size = 2048  # a sequence
        config.data.update(dataset="c4/en", sequence_length=2048, heldout_rows=256)
        config.train.update(batch_size=256, num_steps=20_000)
        config.mesh.update(data=-1, expert=8)
        config.optimizer.learning_rate = 1e-3
        return config
    config.model.update(vocab_size=2048, d_model=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32)
    config.model.update(d_ff=512, scan_layers=False)
    config.data.domains = ("literature", "definitions", "python", "technical")
    config.data.update(sequence_length=128, heldout_rows=64)
    config.train.update(batch_size=16, num_steps=2000)
    config.optimizer.learning_rate = 4e-3
    return config


def horizons(size: str) -> tuple[int, ...]:
    """Steps of the runs: below the crossing of dense and sparse models, about at it, and beyond it."""
    return (200, 600, 2000) if size == "laptop" else (2000, 6000, 20_000)


def sweep(size: str, horizon: int = 0, rate: float = 0.0, factors: tuple[float, ...] = (0.5, 1.0, 2.0)) -> Sweep:
    """Multiples of a learning rate; by default the base config's, at the middle horizon."""
    rate = rate or float(base(size).optimizer.learning_rate)
    rates = tuple(factor * rate for factor in factors)
    return Sweep(rates, seeds=(100,), horizon=horizon or horizons(size)[1], check_seed=0)


def hidden(size: str) -> int:
    """F of the dense FFN."""
    return base(size).model.d_ff


def moe(size: str, gate: str, num_experts: int, k: int, d_ff: int = 0, **fields: Any) -> dict[str, Any]:
    """Overrides of an MoE arm.

    Args:
        size: of the suite.
        gate: a name in moe.routing.registry.GATES.
        num_experts: E.
        k: experts a token visits.
        d_ff: hidden units of one expert; 0: F/k, which keeps the dense model's FLOPs.
        **fields: of model.moe.
    """
    own = {"gate": gate, "num_experts": num_experts, "experts_per_token": k, "d_ff": d_ff or hidden(size) // k}
    return {f"model.moe.{name}": value for name, value in {**own, **fields}.items()}
