"""Times of attention kernels from published timings, with intervals that hold 80 %.

``attention.csv`` has 125 of them: self-attention of 1024 to 32,768 tokens with heads of 64 to 256; causal on v5p, v6e
and tpu7x (flash and splash attention of tokamax, relatives of JAX's splash), over all keys on A100 and H100 (cuDNN
forward; backward JAX's Mosaic kernel, up to 128). The logarithm of time over that of all keys at peak FLOP/s is
quadratic in the logarithms of the tokens and of the heads' dimension, for each device and pass. Short rows and small
heads take many times the time at peak on TPUs, whose vector units compute the softmax.

Priced by analogy, with a wider interval, are the backward pass on v5p, v6e and A100 (the forward pass's, times backward
over forward on tpu7x and H100); v5e and older TPUs (as v5p); H200, B200 and GB200 (as H100); all GPUs, because cuDNN is
given a mask here and was not there; and a window (rows of twice its length, at least 1024).
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from moe.config import ModelConfig, layer_kinds
from moe.planner.chips import CHIPS
from moe.planner.gpus import GPUS
from moe.planner.measured import DEVICES
from moe.planner.records import Item, Price

PATH = Path(__file__).with_name("attention.csv")

#: Measured device that stands for another one, at the same share of the peak.
_LIKE = {"v2": "v5p", "v3": "v5p", "v4": "v5p", "v5e": "v5p", "h200": "h100", "b200": "h100", "gb200": "h100"}

#: Further width of an interval, in the logarithm, for a device, pass or window that was not measured.
_ANALOGY = 0.25

_MATMULS = {"forward": 2, "backward": 5}

#: Ridge of the fit, for devices on which only two dimensions were measured.
_RIDGE = 1e-3


def prices(
    kernels: Sequence[Item], flops: float, peak: float, factor: Callable[[str], tuple[float, float, str]]
) -> dict[str, Price]:
    """Times of one run of each kernel, by name.

    Args:
        kernels: of a program.
        flops: of all kernels on one device, in a step, whose FLOPs the program's text does not state; split by the
            bytes that each moves.
        peak: FLOP/s.
        factor: pass → time over that at peak, width of its interval, basis (:func:`factor`).
    """
    moved = sum(kernel.bytes * kernel.count for kernel in kernels if not kernel.flops)
    made = {}
    for kernel in kernels:
        share = kernel.flops or flops * kernel.bytes / max(moved, 1)
        times, width, basis = factor(kernel.where)
        seconds = times * share / peak
        made[kernel.name] = Price(seconds, seconds * math.exp(-width), seconds * math.exp(width), basis, share)
    return made


def factor(name: str, model: ModelConfig, tokens: int, where: str) -> tuple[float, float, str]:
    """Time of a model's kernels over that of all blocks of their grids at peak.

    Args:
        name: key of :data:`moe.planner.chips.CHIPS` or of GPUS.
        model: with its heads and windows.
        tokens: of a row.
        where: pass; all but "backward" run the forward kernel.

    Returns:
        (factor, width of the interval in the logarithm, basis).
    """
    kind = "backward" if where == "backward" else "forward"
    scored = [kind for kind in layer_kinds(model) if kind.mixer.score_dims]
    windows = [kind.window for kind in scored]
    lengths = [min(tokens, max(2 * window, 1024)) if window else tokens for window in windows]
    dims = scored[0].mixer.score_dims
    found = {length: _factor(name, kind, length, dims) for length in lengths}
    # Blocks of a layer go with its length.
    mean = sum(length * found[length][0] for length in lengths) / sum(lengths)
    _, width, basis = max(found.values(), key=lambda each: each[1])
    return (mean, width + _ANALOGY, "by analogy") if basis == "measured" and any(windows) else (mean, width, basis)


def _factor(name: str, kind: str, tokens: int, width: int) -> tuple[float, float, str]:
    device = _LIKE.get(name, name)
    features = _features(tokens, width)
    weights, spread = _fit(device, kind)
    if weights is not None:
        factor = math.exp(features @ weights)
        exact = device == name and name in CHIPS
        return (factor, spread, "measured") if exact else (factor, spread + _ANALOGY, "by analogy")
    reference = "tpu7x" if device in CHIPS else "h100"
    parts = [(1, *_fit(device, "forward")), (1, *_fit(reference, kind)), (-1, *_fit(reference, "forward"))]
    logarithm = sum(sign * (features @ weights) for sign, weights, _ in parts if weights is not None)
    return math.exp(logarithm), math.hypot(*(spread for *_, spread in parts)) + _ANALOGY, "by analogy"


@functools.cache
def timings() -> tuple[dict[str, str], ...]:
    """All published timings."""
    with PATH.open() as file:
        return tuple(csv.DictReader(line for line in file if not line.startswith("#")))


def ratio(timing: dict[str, str]) -> float:
    """Measured time over that of all keys at peak."""
    batch, tokens, heads, head_dim, value_dim = (
        int(timing[name]) for name in ("batch", "tokens", "heads", "head_dim", "value_dim")
    )
    flops = _MATMULS[timing["kind"]] * batch * heads * tokens**2 * (head_dim + value_dim)
    name = next(name for name, device in DEVICES.items() if device == timing["device"])
    chip = (GPUS | CHIPS)[name]
    return float(timing["milliseconds"]) / 1e3 * chip.peak / chip.devices / flops


@functools.cache
def _fit(device: str, kind: str) -> tuple[np.ndarray | None, float]:
    """(weights of the features, width that holds 80 % of timings that are left out); None without timings."""
    rows = [row for row in timings() if (row["device"], row["kind"]) == (DEVICES.get(device), kind)]
    if not rows:
        return None, 0.0
    features = np.array([_features(int(row["tokens"]), int(row["head_dim"]) + int(row["value_dim"])) for row in rows])
    logs = np.log([ratio(row) for row in rows])
    inverse = np.linalg.inv(features.T @ features + _RIDGE * np.eye(features.shape[1]))
    weights = inverse @ features.T @ logs
    leverage = np.einsum("rf,fg,rg->r", features, inverse, features)
    residuals = np.abs(logs - features @ weights) / (1 - leverage)
    return weights, float(np.quantile(residuals, min(0.8 * (len(rows) + 1) / len(rows), 1.0)))


def _features(tokens: int, width: int) -> np.ndarray:
    """Features of rows of that many tokens and of the sum of the dimensions of keys and values."""
    length, dim = math.log2(tokens / 4096), math.log2(width / 256)
    return np.array([1.0, length, length**2, dim, dim**2])
