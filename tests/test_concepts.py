"""The numbers and the links of docs/concepts.md."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch.buffers import expert_capacity, make_plan
from moe.routing import balancing
from moe.routing.interface import GateInputs
from moe.routing.routing import route
from tests.helpers import gate_named

EXPERTS = [0, 1, 0, 0, 2, 1, 0, 3]


def _weights(gate, k):
    """Combine weights [E] of one token with the logits 2, 1, 0, -1."""
    logits = jnp.asarray([[[2.0, 1.0, 0.0, -1.0]]])
    routing = route(gate_named(gate, k), logits, GateInputs(jnp.ones((1, 1), bool)))
    return np.asarray(jnp.zeros(4).at[routing.expert_index[0, 0]].set(routing.combine_weights[0, 0]))


@pytest.mark.parametrize(
    ("gate", "k", "expected"),
    [
        ("dense_mixture", 4, [0.644, 0.237, 0.087, 0.032]),  # e^2, e, 1, 1/e over 11.475
        ("switch", 1, [0.644, 0, 0, 0]),
        ("mixtral", 2, [0.731, 0.269, 0, 0]),  # e / (1 + e), 1 / (1 + e)
        ("deepseek_moe", 2, [0.644, 0.237, 0, 0]),
    ],
)
def test_sparse_softmax(gate, k, expected):
    np.testing.assert_allclose(_weights(gate, k), expected, atol=5e-4)


def test_eight_tokens():
    probs = np.full((1, 8, 4), 0.1, np.float32)
    probs[0, np.arange(8), EXPERTS] = 0.7
    mask = jnp.ones((1, 8), bool)
    routing = route(gate_named("switch"), jnp.log(probs), GateInputs(mask))
    assert (expert_capacity(1.0, 1, 8, 4), expert_capacity(2.0, 1, 8, 4)) == (2, 4)
    plan = make_plan(routing, 2)
    assert plan.position_in_expert[0, :, 0].tolist() == [0, 0, 1, 2, 0, 1, 3, 0]
    report = balancing.report(routing, mask, plan.kept)
    np.testing.assert_allclose(report.fraction_tokens_dropped, 2 / 8)
    np.testing.assert_allclose(report.expert_load, [4 / 8, 2 / 8, 1 / 8, 1 / 8])
    # 4 * (4/8 * 0.4 + 2/8 * 0.25 + 1/8 * 0.175 + 1/8 * 0.175) = 1.225
    np.testing.assert_allclose(report.load_balancing_loss, 1.225, rtol=1e-5)
    np.testing.assert_allclose(balancing.max_violation(np.asarray(report.expert_load)), 1.0)
    assert bool(make_plan(routing, 4).kept.all())


def test_every_answer_links_to_its_evidence():
    docs = Path(__file__).parents[1] / "docs"
    _, *sections = (docs / "concepts.md").read_text().split("\n## ")
    assert len(sections) == 13
    for section in sections:
        evidence = section.partition("*Evidence.*")[2]
        targets = re.findall(r"\]\(([^)]+)\)", evidence)
        assert targets, section.splitlines()[0]
        for target in targets:
            assert (docs / target.partition("#")[0]).exists(), target
