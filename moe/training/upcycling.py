"""Experts made of a dense FFN: copies of it or of its shards, changed or not (sparse upcycling)."""

from __future__ import annotations

import numpy as np

from moe.config import ConfigError, StartConfig


def granularity(dense_d_ff: int, num_experts: int, d_ff: int) -> int:
    """Number of shards of a dense FFN, each expert being a copy of one: its hidden dim over the experts'.

    Raises:
        ConfigError: it is not a whole number, or does not divide the number of experts.
    """
    shards = dense_d_ff // d_ff
    if shards * d_ff != dense_d_ff or shards == 0 or num_experts % shards:
        raise ConfigError(
            f"model.moe.d_ff={d_ff}: must be the dense {dense_d_ff} or that over a divisor of num_experts={num_experts}"
        )
    return shards


def copy_shards(name: str, dense: np.ndarray, num_experts: int, shards: int) -> np.ndarray:
    """Experts [E,...] of a dense matrix, expert i with shard i mod g of the hidden dim: up and gate [D,F], down [F,D].

    With g = 1 every expert is a copy of the FFN; with more, granular upcycling (He et al. 2024).
    """
    parts = np.split(dense, shards, axis=0 if name == "down" else 1)
    return np.stack([parts[expert % shards] for expert in range(num_experts)])


def diversify(name: str, experts: np.ndarray, start: StartConfig, seed: int, layer: int) -> np.ndarray:
    """Change copies of a matrix [E,...] as ``start`` says: redraw some hidden units, add noise, scale the down matrix.

    Drop-upcycling (Nakamura et al. 2025, section 3.2): for each expert the same units of all its matrices are drawn
    from a normal distribution with the mean and deviation of the values that they replace.
    """
    rng = np.random.default_rng((seed, layer, *name.encode()))
    units_rng, hidden = np.random.default_rng((seed, layer)), 1 if name == "down" else 2
    count, size = round(start.drop_share * experts.shape[hidden]), experts.shape[hidden]
    deviation = experts.std()
    experts = np.array(experts)
    for expert in experts if count else ():
        units = units_rng.choice(size, count, replace=False)
        index = (units,) if name == "down" else (slice(None), units)
        expert[index] = rng.normal(expert[index].mean(), expert[index].std(), expert[index].shape)
    if start.expert_noise:
        experts += start.expert_noise * deviation * rng.standard_normal(experts.shape, np.float32)
    return experts * np.float32(start.expert_scale) if name == "down" else experts


def group_columns(router: np.ndarray, shards: int) -> np.ndarray:
    """A router [D,E] with equal columns for the g experts of a virtual group, which together hold the whole FFN, so
    that a token's K experts are K/g whole groups ("virtual group initialization", He et al. 2024)."""
    return np.repeat(router[:, ::shards], shards, axis=1)
