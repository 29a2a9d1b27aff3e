"""Scaling laws of the papers, each with the range of the runs that it was fitted to.

Constants are the papers' tables. Loss is in nats per token of the paper's own text and tokenizer, so that only
differences between settings of one law mean anything elsewhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class FittedTo:
    """Ranges of a law's runs: quantity → (smallest, largest)."""

    ranges: Mapping[str, tuple[float, float]]

    def beyond(self, **values: float) -> str:
        """Values that lie outside the ranges, and by which factor; empty where the law interpolates."""
        found = []
        for name, value in values.items():
            low, high = self.ranges.get(name, (0.0, math.inf))
            if value > high or value < low:
                bound = high if value > high else low
                factor, side = (value / high, "above") if value > high else (low / value, "below")
                times = f"{factor:.2g}" if factor < 99 else f"{factor:,.0f}"
                found.append(f"{name} {value:.2g} is {times} times {side} {bound:.2g}")
        return "; ".join(found)


# --- Krajewski et al. 2024, "Scaling Laws for Fine-Grained Mixture of Experts" (arXiv 2402.07871) ---------------------
KRAJEWSKI_RANGE = FittedTo({"parameters": (129e6, 3.7e9), "tokens": (16e9, 130e9), "granularity": (1, 16)})
#: Total over active FFN size in all of the paper's runs; FLOPs of a routing decision, and of a parameter (section 5.3).
EXPANSION = 64
_ROUTING_FLOPS = 14
_FLOPS = 6


def krajewski_loss(parameters: float, tokens: float, granularity: float) -> float:
    """L(N, D, G) = c + (g/G^γ + a)/N^α + b/D^β, with all parameters N but the embeddings (equation 9, table 1)."""
    return 0.47 + (2.1 / granularity**0.58 + 18.1) / parameters**0.115 + 30.8 / tokens**0.147


def krajewski_model(width: float, granularity: float) -> tuple[float, float, float]:
    """(total parameters, active ones, FLOPs a token) of a model of width/64 layers, without embeddings."""
    layers = width / 64
    total = layers * width**2 * (8 * EXPANSION + 4)
    routing = width * EXPANSION * granularity * _ROUTING_FLOPS
    return total, 12 * layers * width**2, layers * (12 * width**2 * _FLOPS + routing)


# --- Tian et al. 2025, "Towards Greater Leverage" (Ling; arXiv 2507.17702) --------------------------------------------
#: The largest compute is that of the paper's validation run, 0.85B active parameters on 1T tokens.
LING_RANGE = FittedTo({"compute": (1e18, 5e21), "parameters": (1e8, 28e9), "activation": (0.008, 1.0)})
_ACTIVATION_START = 1.63e-2


def ling_allocation(compute: float) -> tuple[float, float]:
    """(FLOPs a token, tokens) of the compute-optimal MoE: 0.1915·C^0.5095 and 5.2232·C^0.4905 (table 1)."""
    return 0.1915 * compute**0.5095, 5.2232 * compute**0.4905


def ling_compute(tokens: float) -> float:
    """Compute for which this number of tokens is optimal."""
    return (tokens / 5.2232) ** (1 / 0.4905)


def ling_rate(compute: float) -> float:
    """Learning rate of AdamW: 1.1576·C^-0.1529 (table 1)."""
    return 1.1576 * compute**-0.1529


def ling_batch(compute: float) -> float:
    """Tokens a step: 0.0694·C^0.3644 (table 1)."""
    return 0.0694 * compute**0.3644


def ling_leverage(activation: float, granularity: float, compute: float) -> tuple[float, float]:
    """Compute of the dense model of the same loss over the MoE's (equation 13), with and without the saturation of the
    activation ratio at 1.6 %; the two values are the ends of an interval.

    Args:
        activation: experts of a token over all experts.
        granularity: 2·D over the hidden dim of an expert.
        compute: FLOPs of the training.
    """
    grain = math.log10(granularity)
    exponent = 1.23 - 7.61e-2 * math.log10(compute) + 1.67e-2 * grain**2 - 1.17e-1 * grain
    ends = (activation + _ACTIVATION_START) ** exponent, activation**exponent
    return min(ends), max(ends)


# --- Clark et al. 2022, "Unified Scaling Laws for Routed Language Models" (arXiv 2202.01169) --------------------------
CLARK_RANGE = FittedTo({"parameters": (15e6, 1.3e9), "experts": (1, 512), "tokens": (130e9, 130e9)})
_CLARK_START, _CLARK_MAX = 1.847, 314.478


def clark_gain(parameters: float, experts: float) -> float:
    """Loss with this many experts over that with one, S-BASE routing: log L = a·log N + b·log Ê + c·log N·log Ê + d
    (equations 2 and 6, table 3), with N the parameters of the model with one expert."""

    def saturated(count: float) -> float:
        first = 1 / (1 / _CLARK_START - 1 / _CLARK_MAX)
        return 1 / (1 / (count - 1 + first) + 1 / _CLARK_MAX)

    slope = -0.108 + 0.009 * math.log10(parameters)
    return 10 ** (slope * (math.log10(saturated(experts)) - math.log10(saturated(1))))


#: Widths that are tried.
WIDTHS = range(128, 16_384 + 1, 64)
