"""Layers of other libraries from their own weights, and how to run one: :func:`moe.interop.layers.run_reference`."""

from pathlib import Path

import numpy as np
import pytest

from moe.config import ConfigError
from moe.conformance import reference, reference_gates, rows, table
from moe.dispatch.modes import CONFIG_MODES
from moe.interop.layers import run_reference
from tests.helpers import slow_case

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "parity" / "layers"


@pytest.mark.skipif(not FOLDER.exists(), reason="the reference layers are not beside this repository")
@pytest.mark.slow
def test_layers_of_hugging_face():
    found = list(table.reference_layers(FOLDER))
    assert len(found) >= 16
    assert not [row for row in found if not row.passes]


def _expected(arrays, gate, mask, k, capacity, rule, matrices, activation):
    logits = arrays["x"].astype(np.float64) @ matrices["router"]
    decisions = reference.decide(gate, logits, mask, k, capacity, rule=rule)
    y = reference.moe_output(
        arrays["x"],
        matrices["router"],
        matrices["up"],
        matrices.get("gate"),
        matrices["down"],
        gate=gate,
        decisions=decisions,
        activation=activation,
        rule=rule,
    )
    return np.asarray(y), decisions


@pytest.mark.parametrize(
    ("experts", "groups", "kept", "k", "normalise", "scale", "shared", "modes"),
    [
        (9, 3, 2, 4, True, 1.7, True, ("einsum",)),
        slow_case(9, 3, 2, 4, True, 1.7, True, CONFIG_MODES),
        slow_case(6, 3, 1, 2, False, 1.0, False, CONFIG_MODES),
    ],
)
def test_deepseek_v3_of_other_shapes(experts, groups, kept, k, normalise, scale, shared, modes, rng):
    d, f, x = 5, 4, rng.normal(size=(2, 4, 5)).astype(np.float32)
    gate_up, down = rng.normal(size=(experts, 2 * f, d)), rng.normal(size=(experts, d, f))
    router, bias = rng.normal(size=(experts, d)), rng.normal(size=experts) * 0.3
    arrays = {
        "x": x,
        "n_group": np.array(groups),
        "topk_group": np.array(kept),
        "num_experts_per_tok": np.array(k),
        "routed_scaling_factor": np.array(scale),
        "norm_topk_prob": np.array(normalise),
        "weights/gate.weight": router,
        "weights/gate.e_score_correction_bias": bias,
        "weights/experts.gate_up_proj": gate_up,
        "weights/experts.down_proj": down,
    }
    y_shared = 0.0
    if shared:
        names = {"gate_proj": (2 * f, d), "up_proj": (2 * f, d), "down_proj": (d, 2 * f)}
        matrices = {name: rng.normal(size=shape) for name, shape in names.items()}
        arrays |= {f"weights/shared_experts.{name}.weight": matrix for name, matrix in matrices.items()}
        gate = x @ matrices["gate_proj"].T
        y_shared = (gate / (1 + np.exp(-gate)) * (x @ matrices["up_proj"].T)) @ matrices["down_proj"].T
    matrices = {
        "router": router.T,
        "gate": gate_up[:, :f].swapaxes(1, 2),
        "up": gate_up[:, f:].swapaxes(1, 2),
        "down": down.swapaxes(1, 2),
    }
    rule = reference_gates.Rule(groups, kept, normalise, scale, bias)
    y, decisions = _expected(arrays, "deepseek_v3", np.ones((2, 4), bool), k, 8, rule, matrices, "swiglu")
    for mode in modes:
        ours = run_reference(arrays, mode)
        np.testing.assert_array_equal(ours["topk_index"], decisions.expert.reshape(-1, k))
        assert rows.error(ours["y"], y + y_shared) < 1e-5


@pytest.mark.parametrize(("experts", "tokens", "capacity"), [slow_case(3, 7, 1), (5, 6, 2), slow_case(2, 5, 9)])
def test_switch_of_other_shapes(experts, tokens, capacity, rng):
    d, f, x = 4, 6, rng.normal(size=(2, tokens, 4)).astype(np.float32)
    router, up, down = (rng.normal(size=s) for s in ((d, experts), (experts, d, f), (experts, f, d)))
    arrays = {"x": x, "expert_capacity": np.array(capacity), "weights/router.classifier.weight": router.T}
    for e in range(experts):
        arrays[f"weights/experts.expert_{e}.wi.weight"] = up[e].T
        arrays[f"weights/experts.expert_{e}.wo.weight"] = down[e].T
    matrices = {"router": router, "up": up, "down": down}
    mask = np.ones((2, tokens), bool)
    y, decisions = _expected(arrays, "switch", mask, 1, capacity, reference_gates.PLAIN, matrices, "relu")
    for mode in ("gather", "einsum"):
        ours = run_reference(arrays, mode)
        assert rows.error(ours["y"], y) < 1e-5
        np.testing.assert_array_equal(ours["dispatch"].sum(-1), decisions.kept[..., 0])


def test_a_tensor_that_no_layer_reads_is_refused():
    arrays = {"x": np.zeros((1, 2, 3)), "expert_capacity": np.array(1)}
    arrays |= {"weights/router.classifier.weight": np.zeros((1, 3)), "weights/router.classifier.bias": np.zeros(1)}
    with pytest.raises(ConfigError, match=r"classifier\.bias"):
        run_reference(arrays)


@pytest.mark.slow
def test_conformance_passes_its_check_values():
    found = list(table.check_values())
    assert len(found) == 11
    assert all(row.passes for row in found)


def test_conformance_notices_a_wrong_value():
    assert rows.value("section", "what", 1.0, 1.0, 1e-3).passes
    assert not rows.value("", "", 1.0, 1.1, 1e-3).passes
    assert not rows.close("", "", "", 2e-5, 1e-5).passes
    assert "**FAILS**" in table.page([rows.value("section", "what", 1.0, 1.1, 1e-3)])
