"""Learning-rate schedules against values computed by hand."""

import typing

import numpy as np
import pytest

from moe.config import OptimizerConfig
from moe.config.run_sections import Schedule
from moe.training.optimizer import SCHEDULES, learning_rate_schedule

#: Rates at steps 0, 2, 4, 12 and 20 of a run of 20 steps (0 to 19); peak of 1 at step 4, final fraction 0.1.
EXPECTED = {
    "cosine": [0.2, 0.6, 1.0, 0.55, 0.1],
    "constant": [0.2, 0.6, 1.0, 1.0, 1.0],
    "wsd": [0.2, 0.6, 1.0, 0.73, 0.1],  # a decay of 10 steps: 0.09 less per step from step 10 on
    "rsqrt": [1.0, 1.0, 1.0, (4 / 12) ** 0.5, (4 / 20) ** 0.5],  # √(4 / max(step, 4)): no linear start
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_by_hand(name):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule=name, decay_steps=10 if name == "wsd" else 0)
    schedule = learning_rate_schedule(config, 20)
    np.testing.assert_allclose([schedule(step) for step in (0, 2, 4, 12, 20)], EXPECTED[name], rtol=1e-5)


@pytest.mark.parametrize("decay", [1, 10])
def test_the_last_step_of_a_decay_has_the_final_rate(decay):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, schedule="wsd", decay_steps=decay)
    rates = [float(learning_rate_schedule(config, 20)(step)) for step in (19 - decay, 19)]
    assert rates == pytest.approx([1.0, 0.1])


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_of_one_step_has_the_peak(name):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, schedule=name)
    assert float(learning_rate_schedule(config, 1)(0)) == 1.0


def test_every_name_of_the_config_has_a_schedule():
    assert set(typing.get_args(Schedule)) == set(SCHEDULES)
