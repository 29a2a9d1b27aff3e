"""Runs that start from a checkpoint: fine-tuning, upcycling, distillation, frozen parts."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import shutil
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

from moe.checkpoints import integrity, manager
from moe.checkpoints.parameters import read_base, read_parameters
from moe.checkpoints.pinned import pinned_steps
from moe.checkpoints.streamed import write_workdir
from moe.checkpoints.workdir import read_config
from moe.config import (
    Changes,
    Config,
    ConfigError,
    DistillConfig,
    LoraConfig,
    Losses,
    MeshConfig,
    ModelConfig,
    StartConfig,
    build_layers,
    inherited,
    to_dict,
)
from moe.config.parse import from_config_dict
from moe.config.registry import find_layer
from moe.configs import base, upcycle
from moe.data.tokenizer import train_tokenizer
from moe.interop import import_checkpoint, load_huggingface
from moe.layers.call import Report
from moe.models.state import set_schedule_step
from moe.objectives.text import Causal
from moe.parallel.mesh import make_mesh
from moe.training import averaging, profiling, start_run, warm_start
from moe.training.batches import place
from moe.training.losses import soft_cross_entropy
from moe.training.optimizer import WeightAverage, averaged_weights
from moe.training.step import build
from moe.training.teacher import read_teacher
from moe.training.train import train
from tests.helpers import random_model, random_state, slow_case, tiny_model
from tests.run_helpers import ONE, SETTINGS, Interrupted, tiny

HERE = Path(__file__).parents[1] / "data" / "checkpoints"
T = 8


def _config(workdir, **changes) -> Config:
    """The imported model as the config of a run with 2 rows of 8 tokens."""
    tree = to_dict(import_checkpoint(workdir[0], workdir[1]) if workdir[0] else read_config(workdir[1]))
    tree["data"] |= {"sequence_length": T}
    tree["train"] |= {"batch_size": 2, "num_steps": 4}
    tree["optimizer"] |= {"warmup_steps": 0, "learning_rate": 1e-3}
    for section, fields in changes.items():
        target = tree["model"]["moe"] if section == "moe" else tree[section]
        target |= fields
    return from_config_dict(tree)


#: Programs of equal configs are compiled once.
_build = functools.cache(build)


def _program(config):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    return mesh, lambda: _build(config, mesh)


def _batch(mesh, vocab):
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, vocab, (2, T + 1)).astype(np.int32)
    ones = np.ones((2, T), np.int32)
    positions = np.arange(T, dtype=np.int32) * ones
    return place(
        {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones, "positions": positions}, mesh
    )


def test_an_upcycled_model_has_the_outputs_of_the_dense_model(tmp_path):
    """Equal experts whose weights sum to 1 are the dense FFN, whatever the fresh router chooses."""
    sparse = {
        "gate": "mixtral",
        "num_experts": 4,
        "experts_per_token": 2,
        "d_ff": 28,
        "dispatch": "einsum",
    }  # with room for all
    config = _config((HERE / "mistral", tmp_path), moe=sparse, start={"checkpoint": str(tmp_path)})
    mesh, make = _program(config)
    dense, _ = load_huggingface(HERE / "mistral")
    tokens = np.arange(16).reshape(2, 8)
    with jax.set_mesh(mesh):
        program = make()
        state = warm_start.first_state(program)
        upcycled = jax.jit(lambda v: program.model(v)(tokens).logits)(state.variables)
        np.testing.assert_allclose(upcycled, jax.jit(lambda t: dense(t).logits)(tokens), rtol=1e-4, atol=1e-5)
        noisy = dataclasses.replace(program, config=dataclasses.replace(config, start=StartConfig(str(tmp_path), 0.1)))
        up = warm_start.first_state(noisy).parameters["segment_0"]["block_0"]["moe"]["experts"]["up"]
        copied = state.parameters["segment_0"]["block_0"]["moe"]["experts"]["up"]
        np.testing.assert_allclose(np.std(up - copied), 0.1 * np.std(copied), rtol=0.1)
        assert np.abs(up[:, 0] - up[:, 1]).min() > 0
        with pytest.raises(ConfigError, match="holds no optimizer state"):
            warm_start.first_state(
                dataclasses.replace(
                    program, config=dataclasses.replace(config, start=StartConfig(str(tmp_path), optimizer="carry"))
                )
            )


def test_a_start_that_does_not_fit_is_refused_by_field(tmp_path):
    wider = {"gate": "mixtral", "num_experts": 2, "d_ff": 20}
    config = _config((HERE / "mistral", tmp_path), moe=wider, start={"checkpoint": str(tmp_path)})
    mesh, make = _program(config)
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match=r"model\.moe\.d_ff=20: must be the dense 28 or"):
        warm_start.first_state(make())
    deeper = _config((None, tmp_path), model={"num_layers": 3}, start={"checkpoint": str(tmp_path)})
    mesh, make = _program(deeper)
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match=r"model\.num_layers=3: .* has 2"):
        warm_start.first_state(make())


@pytest.mark.slow
def test_a_dense_student_keeps_all_but_the_experts_and_learns_from_its_teacher(tmp_path):
    changes = {"start": {"checkpoint": str(tmp_path)}, "distill": {"teacher": str(tmp_path), "soft_share": 1.0}}
    config = _config((HERE / "mixtral", tmp_path), moe={"gate": "none"}, **changes)
    mesh, _ = _program(config)
    with jax.set_mesh(mesh):
        teacher = read_teacher(config, mesh)
        program = build(config, mesh, teacher)
        state = warm_start.first_state(program)
        block, theirs = state.parameters["segment_0"]["block_0"], teacher[1]["segment_0"]["block_0"]
        np.testing.assert_array_equal(block["attention"]["query"], np.float32(theirs["attention"]["query"]))
        assert "moe" not in block
        batch, losses = _batch(mesh, 32), []
        for _ in range(4):
            state, metrics = program.train_step(state, batch)
            losses.append(float(metrics.loss))
        assert losses[-1] < losses[0]
        # The same student with half of its loss on the text: the loss is the mean of both cross-entropies.
        half = dataclasses.replace(config, distill=DistillConfig(str(tmp_path), 0.5))
        _, metrics = build(half, mesh, teacher).train_step(warm_start.first_state(program), batch)
        np.testing.assert_allclose(metrics.loss, (losses[0] + metrics.cross_entropy) / 2, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=40: must be the teacher's 32"):
        read_teacher(dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=40)), mesh)


def test_soft_targets_by_hand():
    """Teacher (1/2, 1/2), student (1/4, 3/4): -(ln 1/4 + ln 3/4)/2; a position without a target does not count."""
    logits = jnp.log(jnp.asarray([[[0.25, 0.75], [0.5, 0.5]]]))
    teacher, targets = jnp.zeros((1, 2, 2)), jnp.asarray([[0, -1]])
    loss, slope = jax.value_and_grad(soft_cross_entropy, argnums=1)(logits, teacher, targets)
    np.testing.assert_allclose(loss, -(np.log(0.25) + np.log(0.75)) / 2, rtol=1e-6)
    assert not slope.any()  # the teacher is not trained


def test_soft_targets_replace_their_share_of_the_hard_targets():
    """Student and teacher as above; the hard target is the first of the two."""
    logits, targets = jnp.log(jnp.asarray([[[0.25, 0.75]]])), jnp.zeros((1, 1), jnp.int32)
    output, taught = (SimpleNamespace(hidden=x, logits=x, report=Report()) for x in (logits, jnp.zeros((1, 1, 2))))
    model, config = SimpleNamespace(output_matrix=lambda: jnp.eye(2)), Config(distill=DistillConfig("other", 0.25))
    sums = Causal().sums(config, model, output, {"targets": targets}, (None, taught))
    hard, soft = -math.log(0.25), -(math.log(0.25) + math.log(0.75)) / 2
    np.testing.assert_allclose((sums.loss, sums.cross_entropy), (0.75 * hard + 0.25 * soft, hard), rtol=1e-6)


def test_a_run_that_starts_from_a_checkpoint_inherits_unset_fields(tmp_path):
    """Fine-tuning inherits the whole model section; upcycling sets what changes, and its gate has its own constants."""
    imported = import_checkpoint(HERE / "mixtral", tmp_path / "moe")
    tree = base.get_config()
    tree.start.checkpoint = str(tmp_path / "moe")
    tree.model.remat = "full"
    model = build_layers(inherited(tree.settings), tree.settings).model
    assert model == dataclasses.replace(imported.model, remat="full")

    dense = import_checkpoint(HERE / "mistral", tmp_path / "dense")
    tree = upcycle.get_config()
    tree.start.checkpoint = str(tmp_path / "dense")
    model = build_layers(inherited(tree.settings), tree.settings).model
    assert (model.moe.gate_name, model.moe.num_experts, model.moe.d_ff) == ("mixtral", 8, dense.model.d_ff)
    assert (model.d_model, model.num_layers) == (dense.model.d_model, dense.model.num_layers)

    tree.start.checkpoint = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"start\.checkpoint=.*must be the workdir of a run or an import"):
        inherited(tree.settings)


def test_the_tokenizer_is_the_checkpoints_unless_the_config_names_one(tmp_path):
    config = _config((HERE / "mixtral", tmp_path), start={"checkpoint": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"has neither .*, or set data\.tokenizer"):
        warm_start.tokenizer(config, tmp_path / "run")
    words = ["one text and another text"] * 300
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(iter(words), 280).model_bytes)
    assert warm_start.tokenizer(config, tmp_path / "run").vocab_size == 280
    named = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="mine.model"))
    assert warm_start.tokenizer(named, tmp_path / "run") is None
    assert warm_start.tokenizer(dataclasses.replace(config, start=StartConfig()), tmp_path / "run") is None


def test_one_line_says_what_is_loaded_fresh_and_inherited(tmp_path):
    config = _config((HERE / "mixtral", tmp_path), start={"checkpoint": str(tmp_path), "fresh": ["router"]})
    mesh, make = _program(config)
    said = []
    with jax.set_mesh(mesh):
        warm_start.first_state(make(), said.append)
    (line,) = said
    assert re.match(r"start: (\d+) of (\d+) arrays from .*; fresh: moe\.router\.kernel; optimizer state: new", line)
    assert line.endswith("tokenizer: inherited; model: inherited")


@pytest.mark.parametrize("names", [("mixtral", "none"), ("none", "mixtral"), ("mixtral", "hash")])
def test_a_changed_gate_is_reported_by_name(names):
    """Without the fields of either gate, which are constants of its paper."""
    theirs, ours = (Config(model=ModelConfig(moe=find_layer(name))) for name in names)
    said = warm_start._summary(ours, theirs)
    changes = said.partition("model: inherited but for ")[2].split(", ")
    assert f"moe.gate {names[0]} -> {names[1]}" in changes
    assert not any(change.startswith("moe.gate.") for change in changes)


def _save_run(workdir, config, state):
    """Write a run's workdir with one checkpoint, without running the loop."""
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    checkpoints = manager.Checkpoints(epath.Path(workdir), 1)
    checkpoints.save(int(state.step), state, None, {}, None)
    checkpoints.close()


LOSS_FREE = {
    "gate": "deepseek_v3",
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_groups": 1,
    "kept_expert_groups": 1,
    "bias_update": "sign",
    "bias_update_rate": 0.1,
    "score_function": "sigmoid",
    "dispatch": "einsum",
}


def test_frozen_parts_are_not_updated_and_fresh_parts_are_reinitialised(tmp_path):
    """Selection biases belong to the router: biases of 1 stay 1 where it is frozen and become zeros where it is
    fresh."""
    source = _config((HERE / "mixtral", tmp_path / "open"), moe=LOSS_FREE)
    mesh, make = _program(source)
    with jax.set_mesh(mesh):
        state = random_state(make())
        _save_run(
            tmp_path / "run", source, dataclasses.replace(state, biases=jax.tree.map(jnp.ones_like, state.biases))
        )
        start = {"checkpoint": str(tmp_path / "run")}
        config = _config((None, tmp_path / "run"), start=start, optimizer={"frozen": ["router", "experts"]})
        program = _program(config)[1]()
        first = warm_start.first_state(program)
        assert jax.tree.leaves(first.biases)
        jax.tree.map(lambda bias: np.testing.assert_array_equal(bias, 1), first.biases)
        before = jax.tree.map(np.asarray, first.parameters)
        # Fresh parts are not taken over: they have the values with which a run without a checkpoint starts.
        partly = dataclasses.replace(config, start=StartConfig(str(tmp_path / "run"), fresh=("router",)))
        partial, random = warm_start.first_state(dataclasses.replace(program, config=partly)), program.init()
        jax.tree.map(lambda bias: np.testing.assert_array_equal(bias, 0), partial.biases)
        for path, leaf in jax.tree_util.tree_leaves_with_path(partial.parameters):
            is_fresh = any(key.key == "router" for key in path)
            expected = random.parameters if is_fresh else before
            np.testing.assert_array_equal(leaf, functools.reduce(lambda tree, key: tree[key.key], path, expected))
        after, _ = program.train_step(first, _batch(mesh, 32))
    jax.tree.map(lambda bias: np.testing.assert_array_equal(bias, 1), after.biases)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, a, b: (bool((a != np.asarray(b)).any()), any(key.key in ("router", "experts") for key in path)),
        before,
        after.parameters,
    )
    for has_moved, is_frozen in jax.tree.leaves(moved, is_leaf=lambda leaf: isinstance(leaf, tuple)):
        assert has_moved != is_frozen
    with pytest.raises(ConfigError, match=r"optimizer\.frozen='gate'"):
        _config((None, tmp_path / "run"), optimizer={"frozen": ["gate"]})


def test_the_state_of_another_rule_is_not_taken_over(tmp_path):
    """ReMoE's strength has the place of DeepSeek-V3's selection bias, and begins at 1e-8."""
    source = _config((HERE / "mixtral", tmp_path / "open"), moe=LOSS_FREE)
    mesh, make = _program(source)
    with jax.set_mesh(mesh):
        state = random_state(make())
        biased = dataclasses.replace(state, biases=jax.tree.map(lambda bias: bias - 0.5, state.biases))
        _save_run(tmp_path / "run", source, biased)
        moe = dataclasses.replace(source.model.moe, gate=find_layer("remoe").gate, losses=Losses())
        model = dataclasses.replace(source.model, moe=moe)
        config = dataclasses.replace(source, model=model, start=StartConfig(str(tmp_path / "run")))
        first = warm_start.first_state(_program(config)[1]())
    assert jax.tree.leaves(first.biases)
    jax.tree.map(lambda strength: np.testing.assert_array_equal(strength, np.float32(1e-8)), first.biases)


def test_the_optimizers_state_is_carried_on_request(tmp_path):
    """Each expert gets the dense FFN's moments and Adam's count continues; the schedule starts at step 0."""
    dense = _config((HERE / "mistral", tmp_path / "open"))
    mesh, make = _program(dense)
    with jax.set_mesh(mesh):
        program = make()
        trained, _ = program.train_step(random_state(program), _batch(mesh, 32))
    _save_run(tmp_path / "run", dense, trained)
    sparse = {"gate": "mixtral", "num_experts": 4, "experts_per_token": 2, "d_ff": 28, "dispatch": "einsum"}
    carry = {"checkpoint": str(tmp_path / "run"), "optimizer": "carry"}
    config = _config((None, tmp_path / "run"), moe=sparse, start=carry)
    mesh, make = _program(config)
    with jax.set_mesh(mesh):
        program = make()
        state = warm_start.first_state(program)
    adam = optax.tree_utils.tree_get(state.optimizer, "mu")["segment_0"]["block_0"]
    old = optax.tree_utils.tree_get(trained.optimizer, "mu")["segment_0"]["block_0"]
    for expert in range(4):
        np.testing.assert_array_equal(adam["moe"]["experts"]["up"][:, expert], old["dense"]["up"])
    assert not np.any(adam["moe"]["router"]["kernel"])
    assert [int(count) for _, count in optax.tree_utils.tree_get_all_with_path(state.optimizer, "count")] == [1, 0]
    assert int(state.step) == 0


def test_a_start_reads_one_step_of_its_source(tmp_path, monkeypatch):
    """Parameters, biases and moments are of one step, although the source saves another one meanwhile."""
    gate = {"name": "deepseek_v3", "k": 2, "groups": 1, "kept_groups": 1, "scores_per_group": 1}
    sparse = {"gate": gate, "num_experts": 4, "d_ff": 28, "dispatch": "einsum"}
    config = _config((HERE / "mistral", tmp_path / "open"), moe=sparse)
    mesh, make = _program(config)
    with jax.set_mesh(mesh):
        _save_run(tmp_path / "run", config, random_state(make()))
    read, parameters = [], warm_start.stored.read_parameters

    def read_and_save(workdir, *args, **options):
        tree = parameters(workdir, *args, **options)
        (tmp_path / "run" / "checkpoints" / "9").mkdir()
        return tree

    monkeypatch.setattr(warm_start.stored, "read_parameters", read_and_save)
    monkeypatch.setattr(warm_start.stored, "read_biases", lambda *_, step: read.append(step))
    monkeypatch.setattr(warm_start, "_carry", lambda *given: read.append(given[-1]))
    monkeypatch.setattr(warm_start, "_transplant", lambda *_: None)
    monkeypatch.setattr(warm_start, "set_schedule_step", lambda *_: None)
    monkeypatch.setattr(warm_start, "_placed", lambda _, state: state)
    start = StartConfig(str(tmp_path / "run"), optimizer="carry")
    with jax.set_mesh(mesh):
        warm_start.first_state(dataclasses.replace(make(), config=dataclasses.replace(config, start=start)))
    assert len(set(read)) == 1 < len(read)
    assert read[0] in manager.complete_steps(epath.Path(tmp_path / "run"))
    assert read[0] != 9


def test_a_base_is_read_without_its_prediction_layers(tmp_path):
    """Adapters trained on preferences have no prediction layers, which that loss does not reach; their base may."""
    model = tiny_model(prediction_layers=1, num_layers=1)
    trees = [nnx.to_pure_dict(nnx.state(random_model(model), nnx.Param)), {}]
    write_workdir(tmp_path / "base", Config(model=model), *trees, {})
    without = dataclasses.replace(model, prediction_layers=0)
    config = dataclasses.replace(Config(model=without), start=StartConfig(str(tmp_path / "base")))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    base, _ = read_base(config, 0, mesh)
    expected = {name: tree for name, tree in trees[0].items() if name != "prediction"}
    assert expected.keys() < trees[0].keys()
    jax.tree.map(np.testing.assert_array_equal, base, expected)


def test_adapters_share_no_array_with_their_base(tmp_path):
    """The train step donates its state, in which a router that is trained whole has a place beside the base's."""
    model = tiny_model(gate="mixtral", experts_per_token=2, num_layers=1)
    parameters = nnx.to_pure_dict(nnx.state(random_model(model), nnx.Param))
    write_workdir(tmp_path / "base", Config(model=model), parameters, {}, {})
    lora, start = LoraConfig(rank=2, trained=("router",)), StartConfig(str(tmp_path / "base"))
    mesh, make = _program(Config(model=model, start=start, lora=lora))
    with jax.set_mesh(mesh):
        fresh = random_state(make())
        state = warm_start.first_state(dataclasses.replace(make(), initialise=lambda _: fresh), base_step=0)
        routers = [tree["segment_0"]["block_0"]["moe"]["router"] for tree in (state.parameters, state.base)]
    jax.tree.map(np.testing.assert_array_equal, *routers)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)


def _trained(folder, optimizer, ema_decay=0.0, skip_sigmas=0.0, **changes):
    """A run of one step of the dense model, and its state, which is drawn so that no train step is compiled."""
    settings = {"name": optimizer, "ema_decay": ema_decay, "skip_sigmas": skip_sigmas}
    config = _config((HERE / "mistral", folder / "open"), optimizer=settings, **changes)
    mesh, make = _program(config)
    generator = np.random.default_rng(1)

    def draw(leaf):
        values = np.ones(leaf.shape) if leaf.dtype == jnp.int32 else np.abs(generator.normal(size=leaf.shape))
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    with jax.set_mesh(mesh):
        state = random_state(make())
    trained = dataclasses.replace(state, step=draw(state.step), optimizer=jax.tree.map(draw, state.optimizer))
    _save_run(folder / "run", config, trained)
    start = {"checkpoint": str(folder / "run"), "optimizer": "carry"}
    return trained, dataclasses.replace(config, start=StartConfig(**start))


@pytest.mark.parametrize("optimizer", [slow_case("reset"), "carry"])
def test_a_run_on_several_devices_starts_from_a_checkpoint(tmp_path, optimizer):
    """The checkpoint is read on one device while the run's mesh of eight devices is in context."""
    trained, config = _trained(tmp_path, "adamw")
    start = StartConfig(str(tmp_path / "run"), optimizer=optimizer)
    train = dataclasses.replace(config.train, batch_size=8)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    with jax.set_mesh(mesh):
        program = build(dataclasses.replace(config, start=start, train=train), mesh)
        state = warm_start.first_state(program)
    expected = set_schedule_step(trained.optimizer, np.zeros((), np.int32))
    expected = expected if optimizer == "carry" else jax.tree.map(np.zeros_like, expected)
    jax.tree.map(np.testing.assert_array_equal, (state.parameters, state.optimizer), (trained.parameters, expected))
    assert jax.tree.leaves(state.parameters)[0].sharding.device_set == set(jax.devices())


def test_the_same_model_is_read_in_shards(tmp_path, monkeypatch):
    """No process holds whole arrays of a checkpoint whose model is the run's, even where a part of it is fresh."""
    trained, config = _trained(tmp_path, "adamw")
    monkeypatch.setattr(warm_start, "_host", lambda tree: pytest.fail("reads whole arrays"))
    start = StartConfig(str(tmp_path / "run"), fresh=("router",))
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    with jax.set_mesh(mesh):
        train = dataclasses.replace(config.train, batch_size=8)
        program = build(dataclasses.replace(config, start=start, train=train), mesh)
        state, random = warm_start.first_state(program), program.init()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.parameters):
        is_fresh = any(key.key == "router" for key in path)
        expected = random.parameters if is_fresh else trained.parameters
        np.testing.assert_array_equal(leaf, functools.reduce(lambda tree, key: tree[key.key], path, expected))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.parameters)
    assert shardings == jax.tree.map(lambda leaf: leaf.sharding, program.state.parameters)


def test_moments_of_the_same_model_are_read_in_shards_and_alone(tmp_path, monkeypatch):
    """One device would need 12 bytes for each of the source's parameters: 560 GB for Mixtral 8x7B."""
    trained, config = _trained(tmp_path, "adamw")
    read = []
    monkeypatch.setattr(manager, "compare", lambda _, tree: read.append(tree))
    monkeypatch.setattr(warm_start, "_host", lambda tree: pytest.fail("reads whole arrays"))
    start = StartConfig(str(tmp_path / "run"), optimizer="carry")
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    with jax.set_mesh(mesh):
        train = dataclasses.replace(config.train, batch_size=8)
        program = build(dataclasses.replace(config, start=start, train=train), mesh)
        state = warm_start.first_state(program)
    expected = set_schedule_step(trained.optimizer, np.zeros((), np.int32))
    jax.tree.map(np.testing.assert_array_equal, state.optimizer, expected)
    (source,) = read
    assert all(leaf is integrity.UNREAD for leaf in jax.tree.leaves(source.parameters))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, source.optimizer)
    assert shardings == jax.tree.map(lambda leaf: leaf.sharding, program.state.optimizer)


def test_averages_have_one_array_in_memory_and_read_no_moments(tmp_path, monkeypatch):
    """The mean of two checkpoints, and the moving average of the newest, by NumPy."""
    trained, config = _trained(tmp_path, "adamw", ema_decay=0.9)
    run, read, original = tmp_path / "run", [], averaging.stored.read_parameters
    other = jax.tree.map(lambda leaf: leaf + 1 / 3, trained.parameters)
    checkpoints = manager.Checkpoints(epath.Path(run), 2)
    checkpoints.save(2, dataclasses.replace(trained, step=trained.step + 1, parameters=other), None, {}, None)
    checkpoints.close()
    first, second = manager.complete_steps(epath.Path(run))

    def read_parameters(*given, **options):
        read.append(original(*given, **options))
        return read[-1]

    monkeypatch.setattr(averaging.stored, "read_parameters", read_parameters)
    monkeypatch.setattr(averaging, "find_tokenizer", lambda _: None)
    monkeypatch.setattr(averaging, "companions", lambda _: {})
    averaging.write_average(str(run), str(tmp_path / "mean"), [first, second], ema=False)
    assert {len(jax.tree.leaves(tree)) for tree in read} == {1}
    mean = original(tmp_path / "mean", config.model)
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(c, (a + b) / 2, rtol=1e-6), trained.parameters, other, mean)
    compared = []
    monkeypatch.setattr(manager, "compare", lambda _, tree: compared.append(tree))
    averaging.write_average(str(run), str(tmp_path / "ema"), [], ema=True)
    moving = original(tmp_path / "ema", config.model)
    expected = averaged_weights(config.optimizer, trained.optimizer)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), moving, expected)
    found = [leaf for leaf in jax.tree.leaves(compared) if leaf is not integrity.UNREAD]
    assert len(found) == len(jax.tree.leaves(trained.parameters)) + 3  # step, key of the noise, number of averages


def test_an_optimizers_copy_of_the_weights_begins_with_those_of_the_checkpoint(tmp_path, monkeypatch):
    module = types.ModuleType("copying_optimizers")
    vars(module)["make"] = lambda config, schedule: optax.contrib.schedule_free_adamw(schedule)
    monkeypatch.setitem(sys.modules, "copying_optimizers", module)
    start = {"checkpoint": str(tmp_path)}
    config = _config((HERE / "mistral", tmp_path), start=start, optimizer={"name": "copying_optimizers:make"})
    mesh, make = _program(config)
    with jax.set_mesh(mesh):
        state = warm_start.first_state(make())
    copy = optax.tree_utils.tree_get(state.optimizer, "z")
    jax.tree.map(np.testing.assert_array_equal, copy, state.parameters)


def test_moments_of_adapters_are_not_carried_to_a_model(tmp_path):
    config = _config((HERE / "mistral", tmp_path / "open"))
    adapted = dataclasses.replace(config, lora=LoraConfig(rank=2), start=StartConfig(str(tmp_path / "open")))
    with pytest.raises(ConfigError, match="trained adapters, whose moments fit no parameter; use 'reset'"):
        warm_start._carry(SimpleNamespace(config=config), adapted, None, 0)


@pytest.mark.slow
def test_the_average_of_weights_restarts_in_another_model(tmp_path):
    """The source has no average of the fresh parameters to continue."""
    _, dense = _trained(tmp_path, "adamw", ema_decay=0.9)
    sparse = {"gate": "mixtral", "num_experts": 4, "experts_per_token": 2, "d_ff": 28, "dispatch": "einsum"}
    config = _config((None, tmp_path / "run"), moe=sparse, start=dataclasses.asdict(dense.start))
    mesh, make = _program(config)
    with jax.set_mesh(mesh):
        program = make()
        state, _ = program.train_step(warm_start.first_state(program), _batch(mesh, 32))
    average = averaged_weights(config.optimizer, state.optimizer)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), average, state.parameters)


def test_the_average_of_weights_restarts_under_another_decay(tmp_path):
    """The average is divided by the sum of its factors, 1 - decay^steps, which depends on the decay."""
    _, config = _trained(tmp_path, "adamw", ema_decay=0.9, skip_sigmas=6.0)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, ema_decay=0.999))
    mesh, make = _program(config)
    with jax.set_mesh(mesh):
        state = warm_start.first_state(make())
    nodes = jax.tree.leaves(state.optimizer, is_leaf=lambda node: isinstance(node, WeightAverage))
    (average,) = (node for node in nodes if isinstance(node, WeightAverage))
    assert int(average.steps) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(average.total))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(optax.tree_utils.tree_get(state.optimizer, "mu")))
    assert not any(np.any(leaf) for leaf in state.optimizer.history)


def test_losses_of_another_run_are_not_carried(tmp_path):
    """Those of this run's data may be above them, and would be skipped as spikes."""
    trained, config = _trained(tmp_path, "adamw", skip_sigmas=6.0)
    mesh, make = _program(config)
    with jax.set_mesh(mesh):
        state = warm_start.first_state(make())
    moments = (optax.tree_utils.tree_get(each.optimizer, "mu") for each in (state, trained))
    jax.tree.map(np.testing.assert_array_equal, *moments)
    assert np.any(trained.optimizer.history.losses)
    assert not any(np.any(leaf) for leaf in state.optimizer.history)


def test_settings_of_a_start_need_a_checkpoint():
    config = Config(start=StartConfig(optimizer="carry", fresh=("router",)))
    with pytest.raises(
        ConfigError, match=r"start.checkpoint='': must name a workdir to use start.fresh, start.optimizer"
    ):
        warm_start.check(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora": {"alpha": 32.0}}, r"lora.rank=0: must be above 0 to use lora.alpha"),
        ({"distill": {"soft_share": 0.5}}, r"distill.teacher='': must name a workdir to use distill.soft_share"),
        (
            {"distill": {"teacher": "reference", "soft_share": 0.5}, "data": {"objective": "preferences"}},
            r"distill.soft_share=0.5: is not read with data.objective='preferences'",
        ),
        ({"data": {"pack": False}}, r"data.pack=False: must be True with data.objective='causal'"),
    ],
)
def test_settings_that_a_run_would_not_read_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        warm_start.check(from_config_dict(fields))


@pytest.mark.parametrize("setting", ["expert_noise", "expert_scale", "drop_share", "virtual_groups"])
def test_settings_of_upcycling_need_a_dense_ffn_that_becomes_experts(setting, tmp_path):
    """A dense FFN stays one here, and experts that are drawn anew are no copies of it."""
    import_checkpoint(HERE / "mistral", tmp_path)
    start = {"checkpoint": str(tmp_path), setting: True if setting == "virtual_groups" else 0.5}
    fresh = {"gate": "mixtral", "num_experts": 4, "d_ff": 28}, start | {"fresh": ("experts",)}
    for moe, changes in (({"gate": "none"}, start), fresh):
        mesh, make = _program(_config((None, tmp_path), moe=moe, start=changes))
        with jax.set_mesh(mesh), pytest.raises(ConfigError, match=rf"start.{setting}=.*: is read only where experts"):
            warm_start.first_state(make())


def test_moments_are_carried_in_the_type_of_this_run(tmp_path):
    """Saved in the source's type, they would be cast when the run resumes, and the checkpoint refused as damaged."""
    trained, config = _trained(tmp_path, "adamw")
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, moment_dtype="bfloat16"))
    mesh, make = _program(config)
    with jax.set_mesh(mesh):
        program = make()
        state = warm_start.first_state(program)
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == jax.tree.map(lambda leaf: leaf.dtype, program.state)
    moments, expected = (optax.tree_utils.tree_get(each.optimizer, "mu") for each in (state, trained))
    assert np.any(jax.tree.leaves(expected)[0])
    jax.tree.map(lambda ours, old: np.testing.assert_array_equal(ours, old.astype(ours.dtype)), moments, expected)


@pytest.mark.slow  # AdamW's is tested below
@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_every_optimizers_state_is_carried_to_the_same_model(tmp_path, optimizer):
    trained, config = _trained(tmp_path, optimizer)
    mesh, make = _program(config)
    with jax.set_mesh(mesh):
        state = warm_start.first_state(make())
    expected = set_schedule_step(trained.optimizer, np.zeros((), np.int32))
    jax.tree.map(np.testing.assert_array_equal, state.optimizer, expected)


def test_a_changed_moment_is_not_carried(tmp_path, monkeypatch):
    """The checkpoint's checksums are compared, as when a run resumes."""
    trained, config = _trained(tmp_path, "adamw")
    saved = integrity.checksums(trained)
    name = next(name for name in saved if ".mu" in name)
    monkeypatch.setattr(
        manager, "compare", lambda found, tree: integrity.compare(found | {name: saved[name] ^ 1}, tree)
    )
    mesh, make = _program(config)
    with (
        jax.set_mesh(mesh),
        pytest.raises(ConfigError, match=r"'carry': .* 1 arrays differ from what"),
    ):
        warm_start.first_state(make())


def test_a_teacher_of_another_kind_or_tokenizer_is_refused(tmp_path):
    import_checkpoint(HERE / "t5", tmp_path / "t5")
    model = read_config(tmp_path / "t5").model
    config = _config((HERE / "mistral", tmp_path / "run"))
    taught = dataclasses.replace(config, distill=DistillConfig(str(tmp_path / "t5"), 0.5))
    taught = dataclasses.replace(taught, model=dataclasses.replace(config.model, vocab_size=model.vocab_size))
    mesh = _program(config)[0]
    with pytest.raises(ConfigError, match="is an encoder-decoder, and this model is decoder-only"):
        read_teacher(taught, mesh)
    same = dataclasses.replace(config, distill=DistillConfig(str(tmp_path / "run"), 0.5))
    texts = [f"word {i} of some text\n" * 9 for i in range(99)]
    ours, theirs = (train_tokenizer(texts, size) for size in (320, 330))
    (tmp_path / "run" / "tokenizer.model").write_bytes(theirs.model_bytes)
    assert read_teacher(same, mesh, theirs) is not None
    with pytest.raises(ConfigError, match="has another tokenizer, so its ids mean other texts"):
        read_teacher(same, mesh, ours)


def test_a_teacher_that_does_not_fit_the_mesh_is_refused(tmp_path):
    import_checkpoint(HERE / "mixtral", tmp_path / "teacher")
    experts = read_config(tmp_path / "teacher").model.moe.num_experts
    config = _config((HERE / "mistral", tmp_path / "run"), train={"batch_size": 8})
    taught = dataclasses.replace(config, distill=DistillConfig(str(tmp_path / "teacher"), 0.5))
    message = rf"distill\.teacher='.*': model\.moe\.num_experts={experts}: must be divisible by mesh\.expert = 8"
    with pytest.raises(ConfigError, match=message):
        read_teacher(taught, make_mesh(MeshConfig(data=1, expert=8)))


@pytest.mark.parametrize(
    ("field", "reads"),
    [
        ("distill.teacher", {"distill": DistillConfig("other", 0.5)}),
        ("start.checkpoint", {"start": StartConfig("other"), "lora": LoraConfig(rank=2)}),
    ],
)
def test_a_run_always_reads_the_same_checkpoint_of_another_run(tmp_path, monkeypatch, field, reads):
    monkeypatch.chdir(tmp_path)
    import_checkpoint(HERE / "mistral", tmp_path / "other")
    config, folder = dataclasses.replace(Config(), **reads), epath.Path(tmp_path / "run")
    folder.mkdir()
    steps = pinned_steps(config, None)
    assert (steps.base, steps.teacher) == ((None, 0) if field == "distill.teacher" else (0, None))
    steps.note(folder)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "0", tmp_path / "other" / "checkpoints" / "9")
    assert pinned_steps(config, folder) == steps
    for other in (epath.Path(tmp_path), None):  # a folder without notes; a failed start may have left its notes
        newest = pinned_steps(config, other)
        assert (newest.base, newest.teacher) == ((None, 9) if field == "distill.teacher" else (9, None))
    weights = read_parameters("other", read_config("other").model)
    weights["embedding"]["table"] = weights["embedding"]["table"] + 1
    write_workdir("changed", read_config("other"), weights, {}, {})
    shutil.move("other", "kept")
    shutil.move("changed", "other")
    with pytest.raises(ConfigError, match=f"{field}='other': its checkpoint of step 0 is not the one that this run"):
        pinned_steps(config, folder)
    shutil.rmtree("other")
    shutil.move("kept", "other")
    shutil.rmtree(tmp_path / "other" / "checkpoints" / "0")
    with pytest.raises(ConfigError, match=f"{field}='other': this run reads its checkpoint of step 0, which is gone"):
        pinned_steps(config, folder)


def test_adapters_belong_to_the_base_that_was_read(tmp_path, monkeypatch, directory):
    """The base is trained further while the run starts: the note has the step that was read, not the newest. A start
    after the first rows, before a checkpoint, reads it again and says so too."""
    config = tiny(directory, **SETTINGS)
    (tmp_path / "base" / "checkpoints" / "0").mkdir(parents=True)
    (tmp_path / "base" / "config.json").write_text(json.dumps(to_dict(config)))
    config = dataclasses.replace(config, lora=LoraConfig(rank=2), start=StartConfig(str(tmp_path / "base")))
    read, said = [], []

    def first_state(program, say=None, base_step=None):
        read.append(base_step)
        said.append(say is not None)
        (tmp_path / "base" / "checkpoints" / "9").mkdir(exist_ok=True)

    def interrupt(*_, **__):
        raise Interrupted

    monkeypatch.setattr(warm_start, "tokenizer", lambda *_: None)
    monkeypatch.setattr(warm_start, "first_state", first_state)
    monkeypatch.setattr(profiling, "refuse_too_large", lambda *_: None)
    monkeypatch.setattr(start_run, "Checkpoints", interrupt)
    with pytest.raises(Interrupted):
        train(config, str(tmp_path / "run"), ONE, make_program=lambda *_: None)
    assert read == [0]
    assert json.loads((tmp_path / "run" / "base.json").read_text()) == {"step": 0, "digest": ""}
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\n')
    with pytest.raises(Interrupted):
        train(config, str(tmp_path / "run"), ONE, make_program=lambda *_: None)
    assert read == [0, 0]
    assert said == [True, True]


def test_a_started_run_no_longer_needs_its_start_checkpoint(tmp_path):
    """The command line inherits model and tokenizer from the run's own workdir."""
    import_checkpoint(HERE / "mistral", tmp_path / "run")
    tree = Changes()
    tree.start.checkpoint = str(tmp_path / "deleted")
    with pytest.raises(ConfigError, match="must be the workdir of a run"):
        inherited(tree.settings, str(tmp_path / "new"))
    own = inherited(tree.settings, str(tmp_path / "run"))
    assert own["model.d_model"] == read_config(tmp_path / "run").model.d_model


def test_processes_start_from_the_step_that_the_first_one_found(tmp_path, monkeypatch):
    """The other run saves step 9 after process 0 has looked and before this process does."""
    config = _config((HERE / "mistral", tmp_path), start={"checkpoint": str(tmp_path)})
    mesh, make = _program(config)
    with jax.set_mesh(mesh):
        program = make()
        shutil.copytree(tmp_path / "checkpoints" / "0", tmp_path / "checkpoints" / "9")
        found, read, original = [], [], warm_start.stored.read_parameters
        monkeypatch.setattr(
            warm_start.stored, "read_parameters", lambda *a, **k: read.append(k["step"]) or original(*a, **k)
        )
        warm_start.first_state(program)
        monkeypatch.setattr(warm_start, "agreed", lambda newest: newest - 9)
        warm_start.first_state(program)
    assert read == [9, 0]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda step: found.append(step) or np.int32(0))
    assert pinned_steps(dataclasses.replace(config, lora=LoraConfig(rank=2)), None).base == 0
    assert found == [9]
