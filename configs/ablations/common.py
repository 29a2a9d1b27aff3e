"""The model, text and horizons that the suites share, in each of the two sizes.

laptop: 4 layers of 64, four domains, 8,000 steps of 2,048 tokens: 16.4M tokens, 32 for each active parameter of the
dense model, 0.99 epochs of the smallest domain; about ten minutes on one idle CPU core.
pod: 16 layers of 1024 on the mesh's expert axis, C4 through TFDS, 0.5M tokens a step; never run so far.

The dense FFN has F hidden units, and E experts of top-1 have F each, so that all have the same active parameters and
FLOPs a token; top-k has k times as many experts of F/k, so that the total is the same too.
"""

from typing import Any

from moe.config import Changes
from moe.config.registry import find_gate
from moe.configs import base as defaults
from moe.lab.suite import Suite, Sweep

#: What a comparison holds equal if its arms differ in the routing rule alone.
FLOPS_AND_PARAMETERS = ("steps", "flops", "active_parameters", "total_parameters")

#: Tokens of each domain's training text, text version 1.2.0 and the tokenizer of 2,048 that it trains.
TRAINING_TOKENS = {"literature": 4_152_602, "definitions": 4_489_272, "python": 10_544_259, "technical": 10_744_716}
#: Bytes of a token of each domain's 256 held-out rows, of the same text in the same tokenizer.
HELDOUT_TOKEN_BYTES = {
    "literature": 87_325 / 32_716,
    "definitions": 84_604 / 32_654,
    "python": 77_464 / 32_760,
    "technical": 98_203 / 32_756,
    "unseen_book": 83_979 / 32_671,
    "unseen_package": 76_901 / 32_760,
}
#: Seeds on which learning rates are chosen.
SWEPT_SEEDS = (100, 101)
#: Seeds of `replication`, which no other suite counts: its runs would not replicate results that they are part of.
REPLICATION_SEEDS = tuple(range(15, 25))
#: Seeds of `paper_scale`, and of `paper_scale_interaction`, which begins with them; no other suite counts either.
PAPER_SCALE_SEEDS = tuple(range(25, 35))
INTERACTION_SEEDS = tuple(range(25, 45))
#: Scale of the initial matrices that Switch's paper prescribes (section 2.4). The earlier suites train at 1.0.
PAPERS_INIT_SCALE = 0.1
#: Fields of model.moe of arms that drop, and of those that do not.
DROPPING: dict[str, Any] = {"capacity.train": 1.25, "capacity.eval": 2.0}
DROPLESS: dict[str, Any] = {"dispatch": "dropless"}


def base(size: str) -> Changes:
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
    config.model.update(vocab_size=2048, d_model=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16)
    config.model.update(d_ff=256, scan_layers=False)
    config.data.domains = ("literature", "definitions", "python", "technical")
    config.data.update(sequence_length=128, heldout_rows=64)
    config.train.update(batch_size=16, num_steps=8000)
    config.optimizer.learning_rate = 4e-3
    return config


def reserved(*own: int) -> tuple[int, ...]:
    """Seeds that a suite may not count: those of sweeps, and those kept for other suites than the one with ``own``."""
    return tuple(seed for seed in (*SWEPT_SEEDS, *REPLICATION_SEEDS, *INTERACTION_SEEDS) if seed not in own)


def suite(size: str, **fields: Any) -> Suite:
    """A suite of the base model at one horizon and learning rate, with the unseen text that all share."""
    laptop = size == "laptop"
    shared: dict[str, Any] = {
        "base": base(size),
        "seeds": (0, 1, 2, 3, 4),
        "reserved": reserved(),
        "warmup_share": 0.025,
        "unseen": ("unseen_book", "unseen_package") if laptop else (),
        "domain_tokens": TRAINING_TOKENS if laptop else {},
        "token_bytes": HELDOUT_TOKEN_BYTES if laptop else {},
    }
    return Suite(**{**shared, **fields})


def sweep(size: str, rate: float = 0.0) -> Sweep:
    """From a quarter to four times a learning rate, by default the base config's."""
    rate = rate or float(base(size).optimizer.learning_rate)
    return Sweep(tuple(factor * rate for factor in (0.25, 0.5, 1.0, 2.0, 4.0)), seeds=SWEPT_SEEDS)


def hidden(of: str | Changes) -> int:
    """F of the dense FFN of a size, or of a suite's own base config."""
    config: Any = base(of) if isinstance(of, str) else of
    return config.model.d_ff


def moe(of: str | Changes, gate: str, num_experts: int, k: int, d_ff: int = 0, **fields: Any) -> dict[str, Any]:
    """Overrides of an MoE arm.

    Args:
        of: the size of the suite; its base config, if that is not :func:`base`.
        gate: a name in moe.config.registry.LAYERS.
        num_experts: E.
        k: experts a token visits.
        d_ff: hidden units of one expert; 0: F/k, which keeps the dense model's FLOPs.
        **fields: of model.moe, as ``**{"losses.balance": 0.01}``.
    """
    own = {"gate": gate, "num_experts": num_experts, "d_ff": d_ff or hidden(of) // k}
    if find_gate(gate).sets_k:
        own["gate.k"] = k
    return {f"model.moe.{name}": value for name, value in {**own, **fields}.items()}
