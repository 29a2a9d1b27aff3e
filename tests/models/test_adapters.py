"""Low-rank adapters: values and gradients of merged matrices on every mesh, and runs that save only the adapters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.checkpoints import parameters
from moe.checkpoints.parameters import read_parameters, read_variables
from moe.config import ConfigError, LoraConfig, MeshConfig, StartConfig, validate_mesh
from moe.layers.parameter import parameter
from moe.models.adapters import initial_adapters, merge
from moe.parallel.mesh import make_mesh
from moe.parallel.parameters import parameter_shardings
from moe.system.metrics_files import read_rows
from moe.training import averaging
from moe.training import loop as training
from moe.training.averaging import write_average
from moe.training.batches import place
from moe.training.step import build
from moe.training.train import train
from tests.helpers import random_model, random_state, slow_case, step_gradients, tiny_model
from tests.run_helpers import ONE, SETTINGS, Interrupted, at_step, raise_interrupted, tiny

EVERYTHING = ("attention", "experts")


def test_merged_matrices_by_hand():
    """A = (1,2)ᵀ, B = (3,4), alpha / rank = 2: 2 A B = (6 8; 12 16). Two experts share one A and have a B each."""
    base = {"dense": {"up": jnp.eye(2)}, "experts": {"up": jnp.zeros((2, 2, 2))}, "norm": {"scale": jnp.ones(2)}}
    a, b = jnp.asarray([[1.0], [2.0]]), jnp.asarray([[3.0, 4.0]])
    adapters = {
        "dense": {"up": {"lora_a": a, "lora_b": b}},
        "experts": {"up": {"lora_common_a": a, "lora_b": jnp.stack([b, 10 * b])}},
    }
    merged = merge(base, adapters, 2.0)
    product = np.asarray([[6, 8], [12, 16]])
    np.testing.assert_array_equal(merged["dense"]["up"], np.eye(2) + product)
    np.testing.assert_array_equal(merged["experts"]["up"], [product, 10 * product])
    assert merged["norm"]["scale"] is base["norm"]["scale"]


def test_products_of_adapters_are_exact_on_every_device():
    """By default TPUs multiply float32 in bfloat16 passes; merged weights and gradients would be rounded."""
    adapters = {"w": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 3))}}
    run = jax.value_and_grad(lambda adapters: merge({"w": jnp.ones((4, 3))}, adapters, 1.0)["w"].sum())
    dots = [line for line in str(jax.make_jaxpr(run)(adapters)).split("dot_general") if "precision" in line]
    assert len(dots) == 3  # A B, dA and dB
    assert all("HIGHEST" in line for line in dots)


def test_a_mean_of_checkpoints_averages_a_and_b_as_the_moving_average_does(tmp_path, monkeypatch):
    """A of 1 and 3 and B of 1 and 5: 2 x 3 = 6; the mean of the products would be (1 + 15) / 2 = 8."""
    steps = {1: (1.0, 1.0), 2: (3.0, 5.0)}

    def read(workdir, config, *, step, dtype):
        a, b = steps[step]
        return {"w": {"lora_a": np.full((1, 1), a, dtype), "lora_b": np.full((1, 1), b, dtype)}}

    monkeypatch.setattr(averaging.stored, "chosen_step", lambda *_: 1)
    monkeypatch.setattr(averaging.stored, "read_adapters", read)
    monkeypatch.setattr(
        averaging, "_with_base", lambda _, config, adapters: merge({"w": jnp.zeros((1, 1))}, adapters, 1.0)
    )
    config = tiny(tmp_path, **{"lora.rank": 1, "start.checkpoint": str(tmp_path), "data.directory": str(tmp_path)})
    assert float(averaging._mean(str(tmp_path), config, [1, 2])["w"][0, 0]) == 6


def test_fresh_adapters_change_nothing_and_have_the_shapes_of_their_matrices():
    shapes = {
        "attention": {"query": (3, 8, 4, 2), "out": (3, 4, 2, 8), "query_bias": (3, 4, 2)},
        "moe": {"experts": {"down": (3, 5, 6, 8), "down_bias": (3, 5, 8)}, "router": {"kernel": (3, 8, 5)}},
    }
    heads, inputs = jax.P("layers", None, "tensor", None), {"out": 2, "query_bias": 0, "down_bias": 0}
    specs = {"query": heads, "out": heads, "down": jax.P("layers", "expert", "tensor", "fsdp")}

    def variable(path, shape):
        name = path[-1].key
        return parameter(jnp.ones(shape), specs.get(name, jax.P()), inputs=inputs.get(name, 1))

    base = jax.tree_util.tree_map_with_path(variable, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    base = nnx.State(base)
    config = LoraConfig(rank=2, parts=EVERYTHING, trained=("router",))
    adapters = nnx.to_pure_dict(initial_adapters(base, config, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, adapters) == {
        "attention": {
            "query": {"lora_a": (3, 8, 2), "lora_b": (3, 2, 4, 2)},
            "out": {"lora_a": (3, 4, 2, 2), "lora_b": (3, 2, 8)},
        },
        "moe": {
            "experts": {"down": {"lora_a": (3, 5, 6, 2), "lora_b": (3, 5, 2, 8)}},
            "router": {"kernel": (3, 8, 5)},
        },
    }
    jax.tree.map(np.testing.assert_array_equal, merge(nnx.to_pure_dict(base), adapters, 8.0), nnx.to_pure_dict(base))
    assert np.abs(adapters["attention"]["out"]["lora_a"]).max() <= 8**-0.5
    common = initial_adapters(base, dataclasses.replace(config, common_a=True), jax.random.key(0))
    down = common["moe"]["experts"]["down"]
    assert down["lora_common_a"].shape == (3, 6, 2)
    assert down["lora_common_a"].get_metadata("spec") == ("layers", "tensor", None)
    assert down["lora_b"].get_metadata("spec") == ("layers", "expert", None, "fsdp")


def test_a_base_is_freed_array_by_array_where_it_is_merged():
    """A model that just fits the devices does not fit them twice; sums stay where the base's shards were."""
    model, lora = tiny_model(num_layers=1), LoraConfig(rank=2, parts=("experts",), trained=("router",))
    whole = nnx.state(random_model(model), nnx.Param)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    with jax.set_mesh(mesh):
        base = jax.device_put(nnx.to_pure_dict(whole), parameter_shardings(mesh, whole))
    adapters = nnx.to_pure_dict(initial_adapters(whole, lora, jax.random.key(0)))
    adapters = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, adapters)
    expected = jax.tree.map(np.asarray, merge(nnx.to_pure_dict(whole), adapters, 0.5))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, base)
    found = parameters._merged(base, adapters, 0.5, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    block = base["segment_0"]["block_0"]
    merged = [name for name, leaf in block["moe"]["experts"].items() if leaf.is_deleted()]
    assert sorted(merged) == ["down", "gate", "up"]
    assert not block["attention"]["query"].is_deleted()
    where, sums = (tree["segment_0"]["block_0"]["moe"]["experts"] for tree in (shardings, found))
    assert all(sums[name].sharding.is_equivalent_to(where[name], sums[name].ndim) for name in merged)


def test_parts_that_the_model_lacks_are_refused():
    base = nnx.State({"moe": {"experts": {"down": parameter(jnp.ones((2, 5, 6, 8)), jax.P(), inputs=1)}}})
    with pytest.raises(ConfigError, match=r"lora\.parts=\('shared',\): must name a part that has matrices"):
        initial_adapters(base, LoraConfig(rank=2, parts=("shared",)), jax.random.key(0))


def _adapted(tmp_path, dispatch):
    """Config of adapters of a tiny Mixtral; the tests give it a random base."""
    changes = {"start.checkpoint": "base", "lora.rank": 2, "lora.alpha": 6.0, "lora.parts": EVERYTHING}
    changes["model.num_layers"] = 1
    return tiny(tmp_path, **changes | {"model.moe.dispatch": dispatch, "lora.trained": ("router",)})


def _batch(mesh):
    tokens = np.random.default_rng(0).integers(3, 32, (8, 17)).astype(np.int32)
    ones = np.ones((8, 16), np.int32)
    arrays = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones}
    return place(arrays | {"positions": np.arange(16, dtype=np.int32) * ones}, mesh)


def _gradients(config, state):
    """Loss, gradients, and the state with its arrays placed on the config's mesh."""
    count = int(np.prod([abs(size) for size in dataclasses.astuple(config.mesh)]))
    mesh = make_mesh(config.mesh, jax.devices()[:count])
    validate_mesh(config, mesh.shape)
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        state = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), state, program.state)
        (loss, *_), gradients = step_gradients(program)(state, _batch(mesh))
    return float(loss), jax.tree.map(np.asarray, gradients), jax.tree.map(np.asarray, state)


MESHES = [{"data": 2, "expert": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "expert": 2}]


@pytest.mark.parametrize(
    ("dispatch", "mesh", "common_a"),
    [
        ("einsum", MESHES[0], True),
        slow_case("gather", MESHES[0], False),
        slow_case("dropless", MESHES[0], False),
        slow_case("gather", MESHES[1], True),
        slow_case("dropless", MESHES[1], False),
        slow_case("gather", {"data": 1}, False),
        slow_case("dropless", {"data": 1}, True),
    ],
)
def test_values_and_gradients_are_those_of_the_merged_model(tmp_path, dispatch, mesh, common_a):
    """dA = alpha / rank · dW Bᵀ and dB = alpha / rank · Aᵀ dW, with dW of the merged model on one device."""
    config = _adapted(tmp_path, dispatch=dispatch)
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, common_a=common_a))
    mesh_of_one = make_mesh(MeshConfig(data=1), ONE)
    with jax.set_mesh(mesh_of_one):
        state = random_state(build(config, mesh_of_one))
    placed = dataclasses.replace(config, mesh=MeshConfig(**mesh))
    loss, gradients, state = _gradients(placed, state)
    plain = dataclasses.replace(config, lora=LoraConfig(), start=StartConfig(), mesh=MeshConfig(data=1))
    with jax.set_mesh(mesh_of_one):
        fresh = random_state(build(plain, mesh_of_one))
    whole = dataclasses.replace(fresh, parameters=state.variables, biases={})
    expected_loss, full, _ = _gradients(plain, whole)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    block, adapters = gradients["segment_0"]["block_0"], state.parameters["segment_0"]["block_0"]
    full, scale = full["segment_0"]["block_0"], 3.0
    forms = {
        ("attention", "out"): "lnhd,lrd->lnhr,lnhr,lnhd->lrd",
        ("attention", "query"): "ldnh,lrnh->ldr,ldr,ldnh->lrnh",
    }
    for (owner, name), form in forms.items():
        _compare(block[owner][name], adapters[owner][name], scale * full[owner][name], form, "lora_a")
    experts = "ledf,lerf->ldr,ldr,ledf->lerf" if common_a else "ledf,lerf->ledr,ledr,ledf->lerf"
    for name in ("gate", "up", "down"):
        of = (tree["moe"]["experts"][name] for tree in (block, adapters, full))
        gradient, factors, dense = of
        _compare(gradient, factors, scale * dense, experts, "lora_common_a" if common_a else "lora_a")
    np.testing.assert_allclose(block["moe"]["router"]["kernel"], full["moe"]["router"]["kernel"], rtol=1e-4, atol=1e-6)


def _compare(gradient, factors, dense, form, a):
    """Compare both factors' gradients with those derived from their matrix's; the form is "dW,B->dA,A,dW->dB"."""
    of_a, middle, of_b = form.split("->")
    name_a, second = middle.split(",", 1)
    expected = {
        a: np.einsum(f"{of_a}->{name_a}", dense, factors["lora_b"]),
        "lora_b": np.einsum(f"{second}->{of_b}", factors[a], dense),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(gradient[name], values, rtol=1e-4, atol=1e-6)
        assert np.abs(values).max() > 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("compilation_cache")
def test_a_run_saves_only_adapters_resumes_bit_for_bit_and_is_read_merged(directory, tmp_path, monkeypatch):
    base = tiny(directory, **SETTINGS | {"train.num_steps": 4, "train.save_every": 2})
    train(base, str(tmp_path / "base"), ONE, quiet=True)
    write_average(str(tmp_path / "base"), str(tmp_path / "mean"), [], ema=False)
    parts = [read_parameters(tmp_path / "base", base.model, step=step) for step in (2, 4)]
    mean = read_parameters(tmp_path / "mean", base.model)
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(c, (a + b) / 2, rtol=1e-6), *parts, mean)
    changes = {
        "start.checkpoint": str(tmp_path / "base"), "lora.rank": 2, "lora.parts": EVERYTHING, "train.num_steps": 4,
        "train.save_every": 2, "optimizer.ema_decay": 0.5,
    }  # fmt: skip
    config = tiny(directory, **SETTINGS | changes)
    train(config, str(tmp_path / "whole"), ONE, quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(training, "next_batch", at_step(3, raise_interrupted))
        with pytest.raises(Interrupted):
            train(config, str(tmp_path / "broken"), ONE, quiet=True)
    # The base is trained further; the adapters still belong to its step 4.
    longer = tiny(directory, **SETTINGS | {"train.num_steps": 6, "train.save_every": 2, "train.keep_every": 4})
    train(longer, str(tmp_path / "base"), ONE, quiet=True, allow_changes=True)
    train(config, str(tmp_path / "broken"), ONE, quiet=True)
    rows = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "broken")]
    assert rows[0] == rows[1]
    merged, again = (read_variables(tmp_path / name, config.model) for name in ("whole", "broken"))
    jax.tree.map(np.testing.assert_array_equal, merged, again)
    before = read_parameters(tmp_path / "base", config.model, step=4)
    experts = [tree["segment_0"]["block_0"]["moe"]["experts"]["up"] for tree in (merged, before)]
    change = np.asarray(experts[0] - experts[1])[0]
    assert all(np.linalg.matrix_rank(matrix, tol=1e-6) == 2 for matrix in change)
    np.testing.assert_array_equal(merged["embedding"]["table"], before["embedding"]["table"])
    # The moving average, with decay 0.5, differs from the last weights by less than these from the base.
    write_average(str(tmp_path / "whole"), str(tmp_path / "ema"), [], ema=True)
    average = read_parameters(tmp_path / "ema", config.model)["segment_0"]["block_0"]["moe"]["experts"]["up"]
    assert 0 < np.abs(average - experts[0]).max() < np.abs(change).max()
    rows = [row for row in read_rows(tmp_path / "whole" / "metrics.jsonl") if row["kind"] == "heldout_ema/all"]
    assert rows
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / name / "checkpoints" / "4").rglob("*") if path.is_file())
        for name in ("whole", "base")
    ]
    assert sizes[0] < sizes[1] / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.rank": -1}, "lora.rank=-1: must be at least 0"),
        ({"lora.rank": 2}, "needs start.checkpoint"),
        ({"lora.rank": 2, "start.checkpoint": "x", "optimizer.frozen": ("router",)}, "must be empty with lora.rank"),
        ({"lora.rank": 2, "start.checkpoint": "x", "start.fresh": ("router",)}, r"unset start\.fresh"),
        ({"lora.rank": 2, "start.checkpoint": "x", "lora.parts": ()}, "at least one part"),
        ({"lora.alpha": 0.0}, "must be positive"),
        ({"lora.common_a": True, "lora.parts": ("attention",)}, "common_a=True: needs experts among lora.parts"),
        ({"lora.parts": ("attention", "router")}, "must be among attention, dense, .*; lora.trained takes the others"),
        ({"lora.rank": 2, "start.checkpoint": "x", "optimizer.name": "muon"}, "muon does not train adapters"),
        (
            {"optimizer.schedule": "wsd", "train.num_steps": 100, "optimizer.warmup_steps": 95},
            r"decay_steps=0: must be at most train\.num_steps - optimizer\.warmup_steps; 0 is a tenth",
        ),
    ],
)
def test_impossible_settings_of_adapters_and_schedules_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(tmp_path, **changes)
