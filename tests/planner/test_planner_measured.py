"""Prices of grouped matmuls between published timings: error and coverage on shapes left out, and refusals."""

import collections
import csv
import itertools
import math

import numpy as np
import pytest

from moe.config import ConfigError
from moe.planner import measured, row_movement, unembedding
from moe.planner.kinds import KINDS
from moe.planner.measured import price

H100 = "h100", "pallas_mosaic_gpu_ragged_dot"
_FIRST = "pallas_mosaic_tpu_ragged_dot"


@pytest.fixture(scope="module")
def left_out():
    """Group → (log of predicted over measured, inside the interval) of its timings, by fits without their shapes."""
    rows = collections.defaultdict(list)
    for shape in sorted({timing.shape for timing in measured.timings()}):
        fit = measured.leave_out(shape)
        for timing in measured.timings():
            if timing.shape == shape:
                seconds, low, high = fit.price(timing.group, *shape, timing.experts)
                rows[timing.group].append((math.log(seconds / timing.seconds), low <= timing.seconds <= high))
    return {group: np.array(pairs) for group, pairs in rows.items()}


def test_shapes_that_were_not_measured_are_priced_within_15_percent(left_out):
    medians = {group: np.median(np.abs(rows[:, 0])) for group, rows in left_out.items()}
    assert len(medians) == 21
    assert max(medians.values()) <= 0.151, medians


def test_intervals_cover_80_percent_of_shapes_that_were_not_measured(left_out):
    inside = np.concatenate([rows[:, 1] for rows in left_out.values()])
    assert len(inside) == 388
    assert 0.8 <= inside.mean() <= 0.88
    for group, rows in left_out.items():
        if len(rows) >= 15:
            assert 0.7 <= rows[:, 1].mean() <= 0.95, group


def test_closed_form_residuals_equal_those_of_the_fit_without_the_shape(left_out):
    fit = measured.leave_out((0, 0, 0))  # no such shape: the fit of all timings
    assert len(fit.residuals) == 388
    index, timing = next((i, t) for i, t in enumerate(measured.timings()) if t.device == "tpu7x" and t.N == 768)
    smaller = measured.leave_out(timing.shape)
    seconds, *_ = smaller.price(timing.group, *timing.shape, timing.experts)
    limit = measured.roofline(timing.device, timing.kind, *timing.shape, timing.experts)
    slowness = [math.log(each / limit - 1) for each in (timing.seconds, seconds)]
    assert abs(fit.residuals[index]) == pytest.approx(abs(slowness[0] - slowness[1]), rel=1e-6)
    same, error, _ = measured.errors(matrices=False)[index]
    assert (same, error) == (timing, pytest.approx(math.log(timing.seconds / seconds), rel=1e-6))


def test_roofline_by_hand():
    # 2 x 131072 x 2048 x 768 FLOPs at 989 TFLOP/s
    assert measured.roofline("h100", "rows x mats", 131072, 2048, 768, 128) == pytest.approx(
        2 * 131072 * 2048 * 768 / 989e12
    )
    # Of 8 rows at most 8 of 128 matrices are read: 2 bytes x (8 x (2048 + 768) + 8 x 2048 x 768) at 3352 GB/s
    assert measured.roofline("h100", "rows x mats", 8, 2048, 768, 128) == pytest.approx(
        2 * (8 * 2816 + 8 * 2048 * 768) / 3352e9
    )
    # The first kernel of v5p uses one of its two cores.
    one, both = (measured.roofline("v5p", "rows x mats", 131072, 2048, 768, 128, name) for name in (_FIRST, ""))
    assert one == pytest.approx(2 * 131072 * 2048 * 768 / 229.5e12) == pytest.approx(2 * both)
    # A weight gradient writes all 128. A device of TPU v7x is a core, with half of the chip's 7370 GB/s.
    assert measured.roofline("tpu7x", "wgrad", 8, 2048, 768, 128) == pytest.approx(
        2 * (8 * 2816 + 128 * 2048 * 768) / 3685e9
    )


@pytest.mark.parametrize("kind", ["rows x mats", "wgrad"])
def test_more_rows_never_cost_less_and_narrow_intervals_are_near_measured_shapes(kind):
    prices = [price(*H100, kind, 2**i, 2048, 768, 128) for i in range(3, 21)]
    assert all(a[0] <= b[0] for a, b in itertools.pairwise(prices))
    assert all(low < seconds < high for seconds, low, high in prices)
    _, low, high = price(*H100, kind, 131072, 2048, 768, 128)
    _, far_low, far_high = price(*H100, kind, 131072, 65536, 65536, 2)
    assert high / low < far_high / far_low


def test_names_of_the_table_and_of_the_planner_are_interchangeable():
    assert price("v5p", "pallas_mosaic_tpu_ragged_dot", "rows", 4096, 4096, 4096, 8) == price(
        "tpu_v5", "pallas_mosaic_tpu_ragged_dot", "rows x mats", 4096, 4096, 4096, 8
    )
    # The table does not state the experts of a weight gradient: they are those of other products of these matrices.
    assert price(*H100, "wgrad", 131072, 2048, 768) == price(*H100, "weights", 131072, 2048, 768, 128)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("v4", "any", "wgrad", 8, 8, 8, 8), "device=v4: no timings; must be one of a100, h100"),
        (("h100", "gmm", "wgrad", 8, 8, 8, 8), r"kernel=gmm \(wgrad\): .* one of pallas_mosaic_gpu_ragged_dot"),
        ((*H100, "backward", 8, 8, 8, 8), "kind=backward: must be 'rows x mats' or 'wgrad'"),
        ((*H100, "wgrad", 0, 8, 8, 8), "rows=0: must be a positive number"),
        ((*H100, "rows x mats", 8, 8, 8), "experts=None: must be a positive number for kind 'rows x mats'"),
    ],
)  # fmt: skip
def test_what_was_not_measured_is_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        price(*arguments)


def test_the_table_states_its_source():
    text = measured.PATH.read_text()
    assert "tokamax 0.0.17" in text
    assert "Apache License 2.0" in text
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    assert {row["kind"] for row in rows} == {"rows x mats", "wgrad"}
    assert {row["experts"] for row in rows if row["kind"] == "wgrad"} == {""}


def test_moving_rows_takes_longer_than_at_memory_bandwidth():
    """v5p: the two gathers of more than 64 MB took 1.153 and .169 ms, and one of 1.2 times that .075: 2.4, 3.5 and 3.1
    times reading and writing their rows at 2765 GB/s. v6e's are taken as close to its bandwidth."""
    times = [4 * 81920 * 4096 / 1.153e-3, 4 * 4096 * 8192 / 0.169e-3, 4 * 2048 * 8192 / 0.075e-3]
    odds = [2765e9 / rate - 1 for rate in times]
    made = row_movement.price("v5p")
    assert made.seconds == pytest.approx(1 + math.prod(odds) ** (1 / 3))
    assert 1 < made.low < made.seconds < made.high
    assert row_movement.price("v6e").seconds == pytest.approx(1 / 0.95)
    like = row_movement.price("v4")
    assert (made.basis, like.basis, like.seconds) == ("measured", "by analogy", made.seconds)
    assert like.high / like.low > made.high / made.low
    assert all(row_movement.price(name).low > 1 for name in KINDS)


def test_shares_of_the_loss_are_below_the_peak():
    assert {name: round(unembedding.share(name), 2) for name in ("v5p", "v6e", "tpu7x", "h100")} == {
        "v5p": 0.92, "v6e": 0.71, "tpu7x": 0.71, "h100": 0.63
    }  # fmt: skip
    assert all(0 < unembedding.share(name) < 1 for name in KINDS)
