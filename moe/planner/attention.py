"""Times of attention kernels from published timings, with intervals that hold 80 %.

``attention.csv`` has 125 of them: self-attention of 1024 to 32,768 tokens with heads of 64 to 256; causal on v5p, v6e
and tpu7x (flash and splash attention of tokamax, relatives of JAX's splash), over all keys on A100 and H100 (cuDNN
forward; backward JAX's Mosaic kernel, up to 128). The share of the peak that the scores which count reach, half of all
where it is causal, is fitted as its logit, so that no price is shorter than those scores at peak FLOP/s; the logit is
quadratic in the logarithms of the tokens and of the heads' dimension, for each device and pass. Splash attention, which
runs here, is faster than flash attention: the difference of their logits is fitted on tpu7x, where both were timed, and
holds for v5p and v6e, where flash attention alone was. Short rows and small
heads reach small shares on TPUs, whose vector units compute the softmax.

Priced by analogy, with a wider interval, are the backward pass on v5p, v6e and A100 (the forward pass's, times backward
over forward on tpu7x and H100); v5e and older TPUs (as v5p); H200, B200 and GB200 (as H100); all GPUs, because cuDNN is
given a mask here and was not there; and a window: the blocks of keys that it touches, at the share of rows whose
queries see as many keys in the mean.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from moe.config import ModelConfig, layer_kinds
from moe.layers.attention.tpu import block_sizes
from moe.planner.chips import CHIPS
from moe.planner.kinds import KINDS
from moe.planner.measured import DEVICES
from moe.planner.records import Item, Price

PATH = Path(__file__).with_name("attention.csv")

#: Measured device that stands for another one, at the same share of the peak.
_LIKE = {"v2": "v5p", "v3": "v5p", "v4": "v5p", "v5e": "v5p", "h200": "h100", "b200": "h100", "gb200": "h100"}

#: Further width of an interval, in the logit of the share, for a device, pass or window that was not measured.
_ANALOGY = 0.5

#: Device on which flash and splash attention were timed.
_BOTH = "tpu7x"

_MATMULS = {"forward": 2, "backward": 5}

#: Ridge of the fit, for devices on which only two dimensions were measured.
_RIDGE = 1e-3

#: Time over that of all T² scores at peak, the same at the ends of its interval, the scores that are computed over all,
#: and what the times rest on.
Factor = tuple[float, float, float, float, str]


def prices(kernels: Sequence[Item], flops: float, peak: float, factor: Callable[[str], Factor]) -> dict[str, Price]:
    """Times of one run of each kernel, by name.

    Args:
        kernels: of a program.
        flops: of all T² scores of all kernels on one device, in a step; those of kernels whose FLOPs the program's text
            does not state are split by the bytes that each moves.
        peak: FLOP/s.
        factor: of a pass (:func:`factor`).
    """
    stated = sum(kernel.flops * kernel.count for kernel in kernels)
    moved = sum(kernel.bytes * kernel.count for kernel in kernels if not kernel.flops)
    made = {}
    for kernel in kernels:
        times, low, high, computed, basis = factor(kernel.where)
        share = kernel.flops or max(flops - stated, 0.0) * kernel.bytes / max(moved, 1)
        at_peak = share / peak
        made[kernel.name] = Price(
            times * at_peak, low * at_peak, high * at_peak, basis, computed * share, computed * at_peak
        )
    return made


def factor(name: str, model: ModelConfig, tokens: int, where: str) -> Factor:
    """Times of a model's kernels, in the mean of its layers.

    Args:
        name: key of :data:`moe.planner.kinds.KINDS`.
        model: with its heads and windows.
        tokens: of a row.
        where: pass; all but "backward" run the forward kernel.
    """
    return mean(name, where, layers(model, tokens))


#: (tokens of a row, dimensions of a key and a value together, window or 0) of a layer.
Layer = tuple[int, int, int]


def layers(model: ModelConfig, tokens: int) -> list[Layer]:
    """The layers of a model that score keys.

    Args:
        model: with its heads and windows.
        tokens: of a row.
    """
    scored = [each for each in layer_kinds(model) if each.mixer.score_dims]
    return [(tokens, scored[0].mixer.score_dims, each.window if each.window < tokens else 0) for each in scored]


def mean(name: str, where: str, layers: Sequence[Layer]) -> Factor:
    """Times of the kernels of these layers, in their mean; arguments as in :func:`factor`."""
    kind = "backward" if where == "backward" else "forward"
    found = [_layer(name, kind, *layer) for layer in layers]
    mean = [sum(numbers) / len(found) for numbers in zip(*(numbers for numbers, _ in found), strict=True)]
    basis = "measured" if all(basis == "measured" for _, basis in found) else "by analogy"
    return mean[0], mean[1], mean[2], mean[3], basis


def times(name: str, kind: str, tokens: int, keys: float, dims: int) -> tuple[float, float, float]:
    """Time over that at peak, and the ends of its interval, of scores with that many keys of a query in the mean.

    Args:
        name: as in :func:`factor`.
        kind: "forward" or "backward".
        tokens: of a row.
        keys: that a query sees in the mean.
        dims: of a key and a value together.
    """
    slowness, width, _ = _slowness(name, kind, max(min(int(2 * keys), tokens), _SHORTEST), dims)
    middle, low, high = (1 + math.exp(slowness + by) for by in (0.0, -width, width))
    return middle, low, high


#: Rows shorter than this were not measured.
_SHORTEST = 1024


@functools.cache
def _layer(name: str, kind: str, tokens: int, dims: int, window: int) -> tuple[tuple[float, float, float, float], str]:
    """(numbers of a :data:`Factor`, basis) of a layer."""
    computed, length = _scores(name in CHIPS, tokens), tokens
    if window and name in CHIPS:
        side = block_sizes(tokens, window).block_q
        keys = min(side * (1 + math.ceil((window - 1) / side)), tokens)
        computed = min(computed, keys / tokens)
        length = min(max(2 * keys, _SHORTEST), tokens)
    slowness, width, basis = _slowness(name, kind, length, dims)
    if window and basis == "measured":
        width, basis = width + _ANALOGY, "by analogy"
    middle, low, high = (computed * (1 + math.exp(slowness + by)) for by in (0.0, -width, width))
    return (middle, low, high, computed), basis


def _scores(causal: bool, tokens: int) -> float:
    """Scores that count over all T²."""
    return (tokens + 1) / (2 * tokens) if causal else 1.0


def _slowness(name: str, kind: str, tokens: int, width: int) -> tuple[float, float, str]:
    """(logarithm of (1 - share) / share, width of its interval, basis)."""
    device = _LIKE.get(name, name)
    features = _features(tokens, width, splash=name in CHIPS)
    weights, spread = _fit(device, kind)
    if weights is not None:
        slowness = float(features @ weights)
        exact = device == name and name in CHIPS
        return (slowness, spread, "measured") if exact else (slowness, spread + _ANALOGY, "by analogy")
    reference = "tpu7x" if device in CHIPS else "h100"
    parts = [(1, *_fit(device, "forward")), (1, *_fit(reference, kind)), (-1, *_fit(reference, "forward"))]
    slowness = sum(sign * float(features @ weights) for sign, weights, _ in parts if weights is not None)
    return slowness, math.hypot(*(spread for *_, spread in parts)) + _ANALOGY, "by analogy"


@functools.cache
def timings() -> tuple[dict[str, str], ...]:
    """All published timings."""
    with PATH.open() as file:
        return tuple(csv.DictReader(line for line in file if not line.startswith("#")))


def share(timing: dict[str, str]) -> float:
    """Share of the peak that the scores which count reach."""
    batch, tokens, heads, head_dim, value_dim = (
        int(timing[name]) for name in ("batch", "tokens", "heads", "head_dim", "value_dim")
    )
    flops = _MATMULS[timing["kind"]] * batch * heads * tokens**2 * (head_dim + value_dim)
    name = next(name for name, device in DEVICES.items() if device == timing["device"])
    at_peak = _scores(name in CHIPS, tokens) * flops / KINDS[name].device_peak
    return at_peak / (float(timing["milliseconds"]) / 1e3)


@functools.cache
def _fit(device: str, kind: str) -> tuple[np.ndarray | None, float]:
    """(weights of the features, width that holds 80 % of timings that are left out); None without timings."""
    rows = [row for row in timings() if (row["device"], row["kind"]) == (DEVICES.get(device), kind)]
    if not rows:
        return None, 0.0
    features = np.array([_features_of(row) for row in rows])
    logs = np.array([math.log(1 / share(row) - 1) for row in rows])
    inverse = np.linalg.inv(features.T @ features + _RIDGE * np.eye(features.shape[1]))
    weights = inverse @ features.T @ logs
    leverage = np.einsum("rf,fg,rg->r", features, inverse, features)
    residuals = np.abs(logs - features @ weights) / (1 - leverage)
    if device in CHIPS and not features[:, -1].any() and (reference := _fit(_BOTH, kind)[0]) is not None:
        weights[-1] = reference[-1]
    return weights, float(np.quantile(residuals, min(0.8 * (len(rows) + 1) / len(rows), 1.0)))


def _features_of(row: dict[str, str]) -> np.ndarray:
    """Features of a timing."""
    width = int(row["head_dim"]) + int(row["value_dim"])
    return _features(int(row["tokens"]), width, splash="splash" in row["kernel"])


def _features(tokens: int, width: int, *, splash: bool) -> np.ndarray:
    """Features of rows of that many tokens, of the sum of the dimensions of keys and values, and of the kernel."""
    length, dim = math.log2(tokens / 4096), math.log2(width / 256)
    return np.array([1.0, length, length**2, dim, dim**2, float(splash)])
