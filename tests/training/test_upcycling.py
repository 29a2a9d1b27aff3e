"""Upcycling: experts from shards of a dense FFN, virtual groups, drop-upcycling and noise."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from moe.config import ConfigError, MeshConfig, StartConfig, build_layers, inherited, to_dict
from moe.config.parse import from_config_dict
from moe.configs import upcycle, upcycle_drop, upcycle_granular, upcycle_noise, upcycle_virtual_groups
from moe.interop import import_checkpoint, load_huggingface
from moe.parallel.mesh import make_mesh
from moe.training import upcycling, warm_start
from moe.training.step import build
from tests.helpers import slow_case

DENSE = Path(__file__).parents[1] / "data" / "checkpoints" / "mistral"


def test_shards_by_hand():
    # F = 4 in two shards: experts 0 and 2 hold units 0 and 1, experts 1 and 3 units 2 and 3.
    up, down = np.arange(8.0).reshape(2, 4), np.arange(8.0).reshape(4, 2)
    experts = upcycling.copy_shards("up", up, 4, 2)
    np.testing.assert_array_equal(experts[0], [[0, 1], [4, 5]])
    np.testing.assert_array_equal(experts[1], [[2, 3], [6, 7]])
    np.testing.assert_array_equal(experts[2:], experts[:2])
    np.testing.assert_array_equal(upcycling.copy_shards("down", down, 4, 2)[1], [[4, 5], [6, 7]])
    # Columns of the router: experts 0 and 1 are one group, experts 2 and 3 the other.
    np.testing.assert_array_equal(upcycling.group_columns(np.array([[1.0, 2, 3, 4]]), 2), [[1, 1, 3, 3]])
    assert upcycling.granularity(28, 8, 7) == 4
    for d_ff, experts in ((8, 8), (7, 6), (56, 8)):
        with pytest.raises(ConfigError, match=f"model.moe.d_ff={d_ff}: must be the dense 28 or that over a divisor"):
            upcycling.granularity(28, experts, d_ff)


def test_drop_upcycling_reinitialises_the_same_units_of_every_matrix():
    """Half of eight units: four columns of up and gate and the same four rows of down, different ones in each
    expert."""
    rng = np.random.default_rng(0)
    start = StartConfig(drop_share=0.5, expert_scale=3.0)
    dense = {name: rng.normal(2.0, 0.5, (400, 8)).astype(np.float32) for name in ("up", "gate")}
    dense["down"] = rng.normal(-1.0, 0.25, (8, 400)).astype(np.float32)
    dropped = {}
    for name, matrix in dense.items():
        copies = upcycling.copy_shards(name, matrix, 3, 1)
        experts = upcycling.diversify(name, copies, start, 0, 5)
        changed = experts != copies * (3.0 if name == "down" else 1.0)
        units = changed.all(axis=2) if name == "down" else changed.all(axis=1)  # [E,F]
        np.testing.assert_array_equal(changed.any(axis=2 if name == "down" else 1), units)
        np.testing.assert_array_equal(units.sum(1), [4, 4, 4])
        dropped[name] = units
        anew = experts[changed] / (3.0 if name == "down" else 1.0)
        mean, deviation = (-1.0, 0.25) if name == "down" else (2.0, 0.5)
        # 4800 values: the mean within five standard errors, the deviation within 5 %.
        assert abs(anew.mean() - mean) < 5 * deviation / 4800**0.5 + 0.03
        assert anew.std() == pytest.approx(deviation, rel=0.05)
    np.testing.assert_array_equal(dropped["up"], dropped["down"])
    np.testing.assert_array_equal(dropped["up"], dropped["gate"])
    assert (dropped["up"][0] != dropped["up"][1]).any()
    again = upcycling.diversify("up", upcycling.copy_shards("up", dense["up"], 3, 1), start, 0, 6)
    assert ((again != dense["up"]).all(axis=1) != dropped["up"]).any(), "another layer, other units"


def started(tmp_path, moe, **start):
    """(program, its first state) of an upcycled tiny Mistral, whose dense FFN has 28 units."""
    tree = to_dict(import_checkpoint(DENSE, tmp_path))
    tree["data"]["sequence_length"] = 8
    tree["train"] |= {"batch_size": 2, "num_steps": 4}
    tree["optimizer"]["warmup_steps"] = 0
    tree["model"]["moe"] |= {"dispatch": "dropless"} | moe
    tree["start"] |= {"checkpoint": str(tmp_path)} | start
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    program = build(from_config_dict(tree), mesh)
    with jax.set_mesh(mesh):
        return program, warm_start.first_state(program)


@pytest.mark.slow
def test_virtual_groups_keep_the_dense_models_output(tmp_path):
    """Four shards of 7 units in four groups; K = 8 is two whole groups, and down is multiplied by four."""
    moe = {"gate": "mixtral", "num_experts": 16, "experts_per_token": 8, "d_ff": 7}
    dense, _ = load_huggingface(DENSE)
    tokens = np.arange(16).reshape(2, 8)
    expected = jax.jit(lambda t: dense(t).logits)(tokens)
    program, state = started(tmp_path / "groups", moe, virtual_groups=True, expert_scale=4.0)
    output = jax.jit(lambda v: program.model(v)(tokens, return_routing=True))(state.variables)
    np.testing.assert_allclose(output.logits, expected, rtol=1e-4, atol=1e-5)
    groups = np.sort(np.asarray(output.routing.expert_index), axis=-1).reshape(-1, 2, 4)
    np.testing.assert_array_equal(groups % 4, np.broadcast_to(np.arange(4), groups.shape))
    # Without the groups a token gets some shards twice and others never; without the scale, a quarter of the output.
    for i, start in enumerate(({"expert_scale": 4.0}, {"virtual_groups": True})):
        program, state = started(tmp_path / str(i), moe, **start)
        logits = jax.jit(lambda v, program=program: program.model(v)(tokens).logits)(state.variables)
        assert np.abs(logits - expected).max() > 0.01


@pytest.mark.parametrize(("k", "null"), [(6, 0), (4, 1)])
def test_virtual_groups_are_complete_and_leave_out_experts_without_an_ffn(k, null, tmp_path):
    """Four shards of 7 units: K = 6 is a group and a half; the router's column of a zero expert belongs to no group."""
    moe = {"gate": "mixtral", "num_experts": 16, "experts_per_token": k, "d_ff": 7, "zero_experts": null}
    if k % 4:
        with pytest.raises(ConfigError, match=r"start.virtual_groups=True: K=6 must be a multiple of the 4 shards"):
            started(tmp_path, moe, virtual_groups=True, expert_scale=4.0)
        return
    program, state = started(tmp_path, moe, virtual_groups=True, expert_scale=4.0)
    assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, program.state)


@pytest.mark.parametrize(
    ("module", "shards"),
    [
        *(slow_case(module, 1) for module in (upcycle, upcycle_noise)),
        *((upcycle_drop, 1), (upcycle_granular, 4), slow_case(upcycle_virtual_groups, 4)),
    ],
)
def test_upcycling_configs_start_from_a_dense_checkpoint(module, shards, tmp_path):
    dense = import_checkpoint(DENSE, tmp_path)
    tree = module.get_config()
    tree.start.checkpoint = str(tmp_path)
    config = build_layers(inherited(tree.settings), tree.settings)
    moe = config.model.moe
    assert moe.num_experts % shards == moe.experts_per_token % shards == 0
    if shards > 1:  # written for the 512 units of configs/dense.py
        moe = dataclasses.replace(moe, d_ff=dense.model.d_ff // shards)
    assert upcycling.granularity(dense.model.d_ff, moe.num_experts, moe.d_ff) == shards
