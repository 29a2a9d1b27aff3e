"""Analysis of routing: records, controls and probes."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.analysis import analyse, controls, probes, summary
from moe.analysis.record import Recorder
from moe.config import Capacity, Config, ConfigError, MeshConfig
from moe.config.parse import from_config_dict
from moe.config.registry import LAYERS
from moe.data import pipeline
from moe.parallel.mesh import make_mesh
from moe.routing.interface import GateInputs
from moe.routing.routing import route
from moe.training.evaluation import Heldout, evaluate
from moe.training.step import build
from tests.analysis_helpers import B, T, random_batch, tiny_program
from tests.helpers import gate_named, tiny_encoder_decoder

# --- Records ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded():
    """A program with one dense and two MoE layers, in groups of half a row; batches; its records."""
    rng = np.random.default_rng(0)
    program, variables = tiny_program(num_layers=3, first_dense=1, group_size=T // 2)
    batches = {
        "one": [random_batch(rng, 48), random_batch(rng, 48, real=11)],
        "two": [random_batch(rng, 48)],
    }
    recorder = Recorder(program)
    return recorder, variables, batches, recorder(variables, batches)


def test_records_equal_the_decisions_of_the_routers(recorded):
    recorder, variables, batches, records = recorded
    model = recorder.program.model(variables)

    @jax.jit
    def alone(batch):
        return model(batch["tokens"], batch["segment_ids"], batch["positions"], return_routing=True).routing

    start = 0
    for batch in [*batches["one"], *batches["two"]]:
        routing, real = alone(batch), batch["segment_ids"].reshape(-1) > 0
        here = slice(start, start + real.sum())
        start += real.sum()
        for name in ("expert_index", "combine_weights", "chosen", "router_probs"):
            direct = np.asarray(getattr(routing, name))  # [L,G,S,·], groups in row order
            direct = direct.reshape(2, B * T, -1)[:, real]
            np.testing.assert_allclose(getattr(records, name)[:, here], direct, rtol=1e-5, atol=1e-6)
        for name in ("tokens", "segment_ids", "positions"):
            np.testing.assert_array_equal(getattr(records, name)[here], batch[name].reshape(-1)[real])
        np.testing.assert_array_equal(records.marks["kind"][here], batch["kind"].reshape(-1)[real])
    assert start == len(records.tokens) == 16 + 11 + 16
    assert (records.layers, records.domains, records.num_experts) == ((1, 2), ("one", "two"), 4)
    # Mixtral's rule: the two most probable experts, the first one first.
    np.testing.assert_array_equal(records.expert_index, np.argsort(-records.router_probs, axis=-1)[..., :2])
    assert records.domain.tolist() == [0] * 27 + [1] * 16
    assert np.bincount(records.row).tolist() == [8, 8, 8, 3, 8, 8]
    # No pair crosses the end of a row (8, 16, …) or of a document (5 in every row).
    assert 0 in records.consecutive
    assert not {4, 7, 12, 15, 20, 23, 26} & set(records.consecutive.tolist())
    assert len(records.consecutive) == 5 * (4 + 2) + 2
    half = records.select(records.domain == 1)
    np.testing.assert_array_equal(half.first_choice, records.first_choice[:, 27:])


def test_gates_that_list_every_expert_are_ordered_by_probability():
    program, variables = tiny_program(gate="dense_mixture", num_layers=1)
    records = Recorder(program)(variables, {"one": [random_batch(np.random.default_rng(0), 48)]})
    assert records.expert_index.shape == (1, 16, 4)
    np.testing.assert_array_equal(records.first_choice, records.router_probs.argmax(-1))
    assert (np.diff(records.combine_weights, axis=-1) <= 0).all()


def test_recorded_experts_of_rollouts_are_not_replayed_in_an_analysis(monkeypatch):
    batch = {"tokens": np.ones((1, 4)), "experts": np.zeros((1, 4, 1, 1))}
    monkeypatch.setattr(pipeline, "heldout_batches", lambda *given, **settings: [batch])
    recorder = types.SimpleNamespace(program=types.SimpleNamespace(config=Config()))
    rows = analyse.heldout_rows(recorder, types.SimpleNamespace(domains=("sums",)), 4)
    assert [list(batch) for batch in rows["sums"]] == [["tokens"]]


def test_experts_of_probability_zero_are_ordered_by_their_logits():
    program, variables = tiny_program(gate="remoe", num_layers=1)
    batch = random_batch(np.random.default_rng(0), 48)
    records = Recorder(program)(variables, {"one": [batch]})
    model = program.model(variables)
    arrays = batch["tokens"], batch["segment_ids"], batch["positions"]
    logits = jax.jit(lambda: model(*arrays, return_routing=True).routing.router_logits)()
    np.testing.assert_array_equal(records.expert_index[0], np.argsort(-logits.reshape(16, 4), axis=-1))


def test_layers_of_a_decoder_are_numbered_after_those_of_its_encoder():
    program = build(Config(model=tiny_encoder_decoder()), make_mesh(MeshConfig(data=-1)))  # 3 + 2, every second sparse
    assert [Recorder(program, stack)._layers for stack in ("encoder", "decoder")] == [(1,), (4,)]


def test_a_dense_model_is_refused():
    program, _ = tiny_program(gate="none")
    with pytest.raises(ConfigError, match=r"model.moe.gate='none'.*no routing"):
        Recorder(program)


# --- Controls --------------------------------------------------------------------------------------------------------


def test_hash_routing_depends_only_on_the_token(recorded):
    _, _, _, records = recorded
    control = controls.hash_routing(records)
    assert control.expert_index.shape == records.expert_index.shape
    for token in np.unique(records.tokens):
        sets = control.expert_index[:, records.tokens == token].reshape(-1, 2)
        assert (sets == sets[0]).all()
        assert sets[0, 0] != sets[0, 1]
    assert len(np.unique(control.first_choice)) == 4


def test_untrained_routers_change_nothing_else_in_the_model(recorded):
    recorder, variables, batches, records = recorded
    model = recorder.program.config.model
    random = controls.untrain_routers(variables, model, seed=0)
    changed = []

    def compare(path, before, after):
        assert before.shape == after.shape
        if not np.array_equal(before, after):
            changed.append([entry.key for entry in path])

    jax.tree_util.tree_map_with_path(compare, variables, random)
    assert len(changed) == 1
    assert changed[0][-2:] == ["router", "kernel"]
    kernel = random["segment_1"]["block_0"]["moe"]["router"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])  # a layer each
    control = recorder(random, batches)
    np.testing.assert_array_equal(control.tokens, records.tokens)
    assert (control.first_choice != records.first_choice).any()
    assert controls.has_router(model)
    assert not controls.has_router(tiny_program(gate="hash")[0].config.model)


# --- Probes ----------------------------------------------------------------------------------------------------------


def test_masking_takes_the_most_probable_experts_of_each_token(rng):
    logits = rng.normal(size=(2, 5, 6)).astype(np.float32)
    order = np.argsort(-logits, axis=-1)
    mask = jnp.ones((2, 5), bool)

    def masked_route(name, experts, **options):
        gate = probes.Masked(gate=gate_named(name, 2), experts=experts)
        return jax.jit(lambda x: route(gate, x, GateInputs(mask, **options)))(logits)

    masked = masked_route("mixtral", 3)
    np.testing.assert_array_equal(masked.expert_index, order[..., 3:5])
    two = np.exp(np.take_along_axis(logits, order[..., 3:5], axis=-1))
    np.testing.assert_allclose(masked.combine_weights, two / two.sum(-1, keepdims=True), rtol=1e-5)
    # With a selection bias, the experts of the highest s + b are masked, however large the bias.
    bias = np.array([0, 0, 3, 0, -1, 0], np.float32)
    biased = np.argsort(-(1 / (1 + np.exp(-logits)) + bias), axis=-1)
    masked = masked_route("deepseek_v3", 2, selection_bias=jnp.asarray(bias))
    np.testing.assert_array_equal(masked.expert_index, biased[..., 2:4])


@pytest.mark.slow
def test_probes_of_a_frozen_model(rng):
    program, variables = tiny_program(gate="deepseek_moe", num_layers=1, experts_per_token=1, shared_d_ff=20)
    config, mesh = program.config, program.mesh
    heldout = Heldout({"text": [random_batch(rng, 48)]}, np.ones(48, np.int32))
    narrow, wide = (probes.eval_capacity(config, mesh, factor)(variables, heldout) for factor in (0.5, 4.0))
    full = probes.masked(config, mesh, 0)(variables, heldout)
    assert set(full) == {"all", "text"}
    assert full["all"] == pytest.approx(wide["all"], rel=1e-5)  # a factor of E drops nothing
    assert abs(wide["all"] - narrow["all"]) > 1e-3  # one of 0.5 drops half
    fixed = dataclasses.replace(config.model.moe, capacity=Capacity(fixed=1))  # replaced by the factor
    fixed_config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=fixed))
    assert probes.eval_capacity(fixed_config, mesh, 4.0)(variables, heldout) == wide
    last = probes.masked(config, mesh, 3)(variables, heldout)["all"]
    assert abs(last - full["all"]) > 1e-3

    # Two choices without the shared expert equal two choices with a shared expert of zeros.
    swapped = probes.shared_for_routed(config, mesh)(variables, heldout)["all"]
    gate = dataclasses.replace(config.model.moe.gate, k=2)
    more = dataclasses.replace(config.model.moe, gate=gate, capacity=Capacity(eval=4.0))
    config_two = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=more))
    silent = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if any(key.key == "shared" for key in path) else x, variables
    )
    with jax.set_mesh(mesh):
        expected = evaluate(build(config_two, mesh), silent, heldout)["all"]["loss"]
    assert swapped == pytest.approx(expected, rel=1e-5)
    assert abs(swapped - full["all"]) > 1e-3


def test_a_router_that_chose_more_experts_is_not_saturated():
    """Independent choices, 6 of 8 experts by the earlier router and one by the last: no agreement above chance."""
    rng = np.random.default_rng(0)

    def records(share):
        chosen = rng.random((1, 20_000, 8)) < share
        index = np.broadcast_to(np.arange(8), chosen.shape)
        return types.SimpleNamespace(num_experts=8, expert_index=index, chosen=chosen)

    found = summary.saturation({1: records(6 / 8)}, records(1 / 8))
    assert found["top_k"][0][0] == pytest.approx(0.75, abs=0.02)
    assert found["excess_top_k"][0][0] == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("gate", ["remoe", "expert_threshold"])
def test_the_number_of_experts_of_a_gate_without_a_fixed_k_cannot_be_changed(gate):
    """Their k is a target of training; a token's experts are those with positive, or high enough, scores."""
    with pytest.raises(ConfigError, match="its number of experts per token cannot be changed"):
        probes._with_k(LAYERS[gate], 1)


def test_evaluation_without_drops_ignores_a_fixed_capacity():
    config = from_config_dict({"model": {"moe": {"gate": "switch", "capacity": {"fixed": 4}}}})
    assert probes.dropless(config).model.moe.dispatch == "dropless"


def test_impossible_probes_are_refused():
    program, _ = tiny_program()
    config, mesh = program.config, program.mesh
    with pytest.raises(ConfigError, match="masked experts=3: must be from 0 to num_experts - K = 2"):
        probes.masked(config, mesh, 3)
    with pytest.raises(ConfigError, match="no shared expert"):
        probes.shared_for_routed(config, mesh)
    with pytest.raises(ConfigError, match=r"model\.moe\.capacity\.eval"):
        probes.eval_capacity(config, mesh, -1.0)
    for gate in ("hash", "none"):
        with pytest.raises(ConfigError, match=f"model.moe.gate='{gate}'"):
            probes.masked(tiny_program(gate=gate)[0].config, mesh, 1)
