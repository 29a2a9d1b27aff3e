"""Times of grouped matmuls between published measurements, with intervals that hold 80 % of shapes not measured.

``grouped_matmuls.csv`` has 388 published timings. The share of the roofline, max(FLOPs / peak, bytes / bandwidth) over
time, is fitted as its logit, log(share / (1 - share)), so that no price and no end of an interval is shorter than the
roofline. The fit is a kernel ridge regression over all timings at once: a constant for each device, kernel and kind of
product, and a smooth function of the shape that a group shares with groups like it, the more the closer they are
(:data:`_SHARED`). So a group of six rows borrows shapes from the same kernel on other devices. The constants below were
chosen from a grid by the error on shapes left out of all groups together, which hardly depends on them.

An interval is symmetric in the logit. Its width is the residual that 80 % of the group's rows stay within when
their shape, or all shapes of their matrices [K,N], are left out, relative to the fit's standard deviation there, times
that deviation at the shape asked for, so that it widens away from the measured shapes. A group counts as having
:data:`_POOLED` further rows with the residuals of all others.

All timings are of bfloat16 factors. How rows were spread over experts is not stated; weight gradients do not state the
number of experts either: it is taken from the other products of the same matrices.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe.config import ConfigError
from moe.planner.kinds import KINDS

PATH = Path(__file__).with_name("grouped_matmuls.csv")

FORWARD, WEIGHTS = "rows x mats", "wgrad"

#: Kinds of product, with the names that :class:`moe.planner.records.GroupedMatmul` has for them.
_KINDS = {FORWARD: FORWARD, WEIGHTS: WEIGHTS, "rows": FORWARD, "weights": WEIGHTS}

#: Names of the devices in the table by those of this planner.
DEVICES = {
    "a100": "nvidia_a100-sxm4-40gb",
    "h100": "nvidia_h100_80gb_hbm3",
    "b200": "nvidia_b200",
    "v5e": "tpu_v5_lite",
    "v5p": "tpu_v5",
    "v6e": "tpu_v6_lite",
    "tpu7x": "tpu7x",
}

_A100_40GB_BANDWIDTH = 1555e9  # bytes/s; the planner's A100 has 80 GB and 2039e9

#: Kernels that use one of a device's two TensorCores: they stay below .47 of v5p's peak, its later kernel reaches .93.
_ONE_CORE = {("tpu_v5", "pallas_mosaic_tpu_ragged_dot")}

#: Scales of log K, log N, log min(K, N), log rows per expert, log E, "K or N is no multiple of 256", and the logarithm
#: of the FLOPs' time over the bytes': a difference of 1/scale counts as much as one of 1/scale in any other.
_SCALES = np.array([1.0, 1.0, 1.0, 0.5, 1.0, 2.0, 1.0])
_LENGTH = 2.0
_SMOOTH = 0.3
_LINEAR = 0.02
_CONSTANT = 1.0
_NOISE = 0.045

#: Largest share taken as measured: some timings of small matrices are above the bandwidth, from caches.
_LARGEST_SHARE = 0.97

#: Largest factor between the times of FLOPs and bytes that a feature tells apart, in the logarithm.
_LARGEST_BALANCE = 2.0

#: Correlation of two groups' functions of the shape: the same kernel and kind on other devices; the same kind by
#: another kernel of the platform; another kind on the platform.
_SHARED = 0.6, 0.3, 0.2

_POOLED = 3.0
_DOUBLINGS = 6  # of the rows, that a price is compared with


@dataclasses.dataclass(frozen=True)
class Timing:
    """One measured product: R rows over all experts, matrices [K,N], E experts."""

    device: str
    kernel: str
    kind: str
    rows: int
    K: int
    N: int
    experts: int
    seconds: float

    @property
    def group(self) -> tuple[str, str, str]:
        """Timings of one group are fitted together."""
        return self.device, self.kernel, self.kind

    @property
    def shape(self) -> tuple[int, int, int]:
        """Timings of one shape are left out together."""
        return self.rows, self.K, self.N


@functools.cache
def timings() -> tuple[Timing, ...]:
    """All published timings."""
    with PATH.open() as file:
        table = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return tuple(
        Timing(
            row["device"], row["kernel"], row["kind"], int(row["rows"]), int(row["K"]), int(row["N"]),
            int(row["experts"] or _experts_of(int(row["K"]), int(row["N"]))), float(row["milliseconds"]) / 1e3,
        )
        for row in table
    )  # fmt: skip


def _experts_of(k: int, n: int) -> int:
    """Experts of a weight gradient, as the table has them for rows x mats of these matrices."""
    return 8 if k == n == 4096 else 256 if max(k, n) == 7168 else 128


def price(
    device: str, kernel: str, kind: str, rows: int, K: int, N: int, experts: int | None = None
) -> tuple[float, float, float]:
    """Time of one grouped matmul on one JAX device (of TPU v7x, a core), with an interval that holds 80 %.

    Args:
        device: a name of the table or of this planner, :data:`DEVICES`.
        kernel: a name of the table.
        kind: "rows x mats" for [R,K]·[E,K,N] → [R,N]; "wgrad" for [R,K]ᵀ·[R,N] → [E,K,N].
        rows: of all experts.
        K: rows of a matrix.
        N: columns of a matrix.
        experts: matrices; may be left out for "wgrad", whose timings do not state it.

    Returns:
        (seconds, low, high).

    Raises:
        ConfigError: there is no timing of that device, kernel and kind, or a size is not positive.
    """
    group = _group(device, kernel, kind)
    if not experts or math.isnan(experts):
        if group[2] == FORWARD:
            raise ConfigError(f"experts={experts}: must be a positive number for kind {FORWARD!r}")
        experts = _experts_of(int(K), int(N))
    sizes = {"rows": rows, "K": K, "N": N, "experts": experts}
    for name, size in sizes.items():
        if not size > 0:
            raise ConfigError(f"{name}={size}: must be a positive number")
    return _fit(frozenset()).price(group, int(rows), int(K), int(N), int(experts))


def shares(
    device: str, kernel: str, kind: str, rows: int, K: int, N: int, experts: int
) -> tuple[tuple[float, float, float], bool]:
    """Shares of the roofline: (the central one, at the fast end of the interval, at its slow end), and whether the kind
    was measured; otherwise they are those of the device's other kind. Arguments as in :func:`price`.

    Raises:
        ConfigError: there is no timing of that device and kernel.
    """
    group = DEVICES[device], kernel, _KINDS[kind]
    known = {timing.group for timing in timings()}
    is_measured = group in known
    if not is_measured:
        other = FORWARD if group[2] == WEIGHTS else WEIGHTS
        group = _group(device, kernel, other)
    seconds, low, high = _fit(frozenset()).price(group, rows, K, N, experts)
    limit = roofline(device, group[2], rows, K, N, experts, kernel)
    return (limit / seconds, limit / low, limit / high), is_measured


def leave_out(shape: tuple[int, int, int]) -> Fit:
    """The fit without any timing of a shape, for tests of its error."""
    return _fit(frozenset([shape]))


def errors(*, matrices: bool) -> list[tuple[Timing, float, bool]]:
    """Each timing with the logarithm of its time over its price by the fit without its shape, and whether it lies in
    that price's interval.

    Args:
        matrices: without all shapes of its matrices [K,N], not its own shape alone.
    """
    fit, rows = _fit(frozenset()), timings()
    residuals, deviations = fit.left_out([(each.K, each.N) if matrices else each.shape for each in rows])
    found = []
    for i, timing in enumerate(rows):
        slowness = _slowness(timing)
        error = math.log((1 + math.exp(slowness)) / (1 + math.exp(slowness + residuals[i])))
        width = fit.score(timing.group) * max(deviations[i], math.sqrt(_NOISE))
        found.append((timing, error, bool(abs(residuals[i]) <= width)))
    return found


def _group(device: str, kernel: str, kind: str) -> tuple[str, str, str]:
    groups = {timing.group for timing in timings()}
    group = DEVICES.get(device, device), kernel, _KINDS.get(kind, kind)
    if group in groups:
        return group
    devices = sorted({device for device, *_ in groups})
    if group[0] not in devices:
        raise ConfigError(f"device={device}: no timings; must be one of {', '.join([*DEVICES, *devices])}")
    if kind not in _KINDS:
        raise ConfigError(f"kind={kind}: must be {FORWARD!r} or {WEIGHTS!r}")
    kernels = sorted(f"{kernel} ({kind})" for name, kernel, kind in groups if name == group[0])
    raise ConfigError(f"kernel={kernel} ({group[2]}): no timings on {device}; must be one of {', '.join(kernels)}")


def roofline(device: str, kind: str, rows: int, K: int, N: int, experts: int, kernel: str = "") -> float:
    """Seconds at peak FLOP/s or at memory bandwidth, the longer; matrices without rows are not read."""
    return max(_times_at_limits(device, kind, rows, K, N, experts, kernel))


def _times_at_limits(
    device: str, kind: str, rows: int, K: int, N: int, experts: int, kernel: str
) -> tuple[float, float]:
    """(seconds of the FLOPs at peak, seconds of the bytes)."""
    peak, bandwidth = _limits(device, kernel)
    matrices = experts if kind == WEIGHTS else min(experts, rows)
    moved = 2.0 * (rows * (K + N) + matrices * K * N)
    return 2.0 * rows * K * N / peak, moved / bandwidth


@functools.cache
def _limits(device: str, kernel: str = "") -> tuple[float, float]:
    """(peak FLOP/s, bytes/s) of what a kernel uses of a JAX device."""
    name, table = next((name, table) for name, table in DEVICES.items() if device in (name, table))
    if name == "a100":
        return KINDS[name].peak, _A100_40GB_BANDWIDTH
    chip = KINDS[name]
    cores = 2 if (table, kernel) in _ONE_CORE else 1
    return chip.device_peak / cores, chip.device_bandwidth


class Fit:
    """Kernel ridge regression over timings."""

    def __init__(self, rows: Sequence[Timing]):
        self._groups = sorted({timing.group for timing in timings()})
        self._members = np.array([self._groups.index(timing.group) for timing in rows])
        self._features = np.array([_features(t.group, t.rows, t.K, t.N, t.experts) for t in rows])
        self._covariance = self._shared(self._groups)
        targets = np.array([_slowness(timing) for timing in rows])
        self._inverse = np.linalg.inv(self._kernel(self._features, self._members) + _NOISE * np.eye(len(rows)))
        self._weights = self._inverse @ targets
        self.residuals, deviations = self.left_out([timing.shape for timing in rows])
        residuals, further = self.left_out([(timing.K, timing.N) for timing in rows])
        self.scores = np.abs(np.concatenate([self.residuals / deviations, residuals / further]))

    @staticmethod
    def _shared(groups: Sequence[tuple[str, str, str]]) -> np.ndarray:
        same_kernel, same_kind, same_platform = _SHARED

        def correlation(a: tuple[str, str, str], b: tuple[str, str, str]) -> float:
            if a == b:
                return 1.0
            if a[1:] == b[1:]:
                return same_kernel
            if a[0].startswith("tpu") != b[0].startswith("tpu"):
                return 0.0
            return same_kind if a[2] == b[2] else same_platform

        return np.array([[correlation(a, b) for b in groups] for a in groups])

    def _kernel(self, features: np.ndarray, members: np.ndarray) -> np.ndarray:
        """Covariance of rows with the fitted rows."""
        squares = ((features[:, None] - self._features[None]) ** 2).sum(-1)
        smooth = _SMOOTH * np.exp(-squares / (2 * _LENGTH**2)) + _LINEAR * features @ self._features.T
        constant = _CONSTANT * (members[:, None] == self._members[None])
        return smooth * self._covariance[np.ix_(members, self._members)] + constant

    def left_out(self, shapes: Sequence[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
        """(residual, standard deviation) of each row by the fit without any row like it, in closed form; a residual is
        the prediction less the target."""
        residuals, deviations = np.zeros(len(shapes)), np.zeros(len(shapes))
        for shape in set(shapes):
            rows = [i for i, other in enumerate(shapes) if other == shape]
            covariance = np.linalg.inv(self._inverse[np.ix_(rows, rows)])
            residuals[rows] = -covariance @ self._weights[rows]
            deviations[rows] = np.sqrt(np.diag(covariance))
        return residuals, deviations

    def price(self, group: tuple[str, str, str], rows: int, K: int, N: int, experts: int) -> tuple[float, float, float]:
        """(seconds, low, high) of a shape; see :func:`price`.

        A product never takes longer than one with twice the rows, which decides where few rows were measured.
        """
        member = self._groups.index(group)
        device, kernel, kind = group
        counts = [rows * 2**doubling for doubling in range(_DOUBLINGS + 1)]
        features = np.array([_features(group, count, K, N, experts) for count in counts])
        to_rows = self._kernel(features, np.full(len(counts), member))
        limits = np.array([roofline(device, kind, count, K, N, experts, kernel) for count in counts])
        slowness = to_rows @ self._weights
        best = int(np.argmin(limits * (1 + np.exp(slowness))))
        own = _SMOOTH + _LINEAR * float(features[best] @ features[best]) + _CONSTANT
        variance = own + _NOISE - float(to_rows[best] @ self._inverse @ to_rows[best])
        width = self.score(group) * math.sqrt(max(variance, _NOISE))
        middle, low, high = (float(limits[best] * (1 + math.exp(slowness[best] + by))) for by in (0.0, -width, width))
        return middle, low, high

    def score(self, group: tuple[str, str, str]) -> float:
        """The score that 80 % of a group's rows stay within, pooled with the other groups' rows."""
        inside = np.tile(self._members == self._groups.index(group), 2)
        weights = np.where(inside, 1.0, _POOLED / max(int((~inside).sum()), 1))
        order = np.argsort(self.scores)
        steps = np.cumsum(weights[order]) - weights[order] / 2
        count = inside.sum() / 2 + _POOLED
        # n residuals leave n + 1 places for the next one, as in conformal prediction.
        return float(np.interp(0.8 * (count + 1) / count, steps / weights.sum(), self.scores[order]))


def _slowness(timing: Timing) -> float:
    """Logarithm of (1 - share) / share, for the share of the roofline that a timing reaches; time is proportional to
    1 + exp of it."""
    limit = roofline(timing.device, timing.kind, *timing.shape, timing.experts, timing.kernel)
    share = min(limit / timing.seconds, _LARGEST_SHARE)
    return math.log((1 - share) / share)


def _features(group: tuple[str, str, str], rows: int, K: int, N: int, experts: int) -> np.ndarray:
    device, kernel, kind = group
    logs = [math.log(size) for size in (K, N, min(K, N), rows / experts, experts)]
    of_flops, of_bytes = _times_at_limits(device, kind, rows, K, N, experts, kernel)
    balance = float(np.clip(math.log(of_flops / of_bytes), -_LARGEST_BALANCE, _LARGEST_BALANCE))
    return (np.array([*logs, float(K % 256 != 0 or N % 256 != 0), balance]) - _CENTRE) * _SCALES


#: Logarithms of a shape in the middle of the table: 2048 x 4096, 1024 rows for each of 128 experts.
_CENTRE = np.array([*(math.log(size) for size in (2048, 4096, 2048, 1024, 128)), 0.0, 0.0])


@functools.cache
def _fit(without: frozenset[tuple[int, int, int]]) -> Fit:
    return Fit([timing for timing in timings() if timing.shape not in without])
