"""The mesh axis `pipeline`: values, gradients and checkpoints equal those without it; transfers between stages;
refusals."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from moe.checkpoints import manager
from moe.checkpoints.arrays import array_handler
from moe.config import Config, ConfigError, DataConfig, DistillConfig, MeshConfig, TrainConfig
from moe.config.mixers import SwitchHead
from moe.models.pipeline import check
from moe.models.state import TrainState
from moe.parallel.mesh import make_mesh
from moe.training import step
from moe.training.batches import place
from moe.training.step import build
from moe.training.train import train
from tests.helpers import axis_groups, collectives, slow_case, step_gradients, tiny_model
from tests.run_helpers import ONE, SETTINGS, Interrupted, interrupted, rows, tiny

T = 8
ALONE = MeshConfig(data=1)
DEEPSEEK = {
    "gate": "deepseek_v3",
    "experts_per_token": 2,
    "expert_groups": 1,
    "kept_expert_groups": 1,
    "scores_per_group": 1,
}


def _config(rounds: int = 1, **model) -> Config:
    """Four layers, 16 rows in four microbatches."""
    model = {"num_layers": 4, "remat": "attention", **model}
    train = TrainConfig(batch_size=16, accumulation_steps=4, pipeline_rounds=rounds)
    return Config(model=tiny_model(**model), data=DataConfig(sequence_length=T), train=train)


def _batch(rows: int) -> dict[str, np.ndarray]:
    """Two documents per row; in every other row the second one ends early."""
    tokens = np.random.default_rng(0).integers(1, 48, (rows, T + 1))
    segment_ids = np.repeat([[1, 1, 1, 2, 2, 2, 2, 2]], rows, axis=0)
    segment_ids[::2, -2:] = 0
    positions = np.repeat([[0, 1, 2, 0, 1, 2, 3, 4]], rows, axis=0)
    targets = np.where(segment_ids > 0, tokens[:, 1:], -1)
    arrays = {"tokens": tokens[:, :-1], "targets": targets, "segment_ids": segment_ids, "positions": positions}
    return {key: value.astype(np.int32) for key, value in arrays.items()}


def _devices(mesh: MeshConfig) -> list[jax.Device]:
    return jax.devices()[: int(np.prod(dataclasses.astuple(mesh)))]


def _drawn(shapes: TrainState) -> TrainState:
    """A state with parameters drawn by NumPy: compiling the program's own takes seconds."""
    generator = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = 0.25 * generator.normal(size=leaf.shape) + (getattr(path[-1], "key", "") == "scale")
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _gradients(config: Config, sizes: MeshConfig) -> tuple[dict[str, np.ndarray], str]:
    """Loss, layer reports and gradients of a training batch by name, and the compiled program."""
    mesh = make_mesh(sizes, _devices(sizes))
    config = dataclasses.replace(config, mesh=sizes)
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        state, batch = _drawn(program.state), place(_batch(config.train.batch_size), mesh)
        compiled = step_gradients(program).lower(state, batch).compile()
        leaves = jax.tree_util.tree_leaves_with_path(compiled(state, batch))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, compiled.as_text()


def _evaluate(config: Config, sizes: MeshConfig) -> tuple[dict[str, np.ndarray], str]:
    """Sums of an evaluation batch by name, and the compiled program."""
    mesh = make_mesh(sizes, _devices(sizes))
    with jax.set_mesh(mesh):
        program = build(dataclasses.replace(config, mesh=sizes), mesh)
        batch, token_bytes = place(_batch(config.train.batch_size), mesh), np.ones(48, np.int32)
        variables = _drawn(program.state).variables
        compiled = program.eval_step.lower(variables, batch, token_bytes).compile()
        leaves = jax.tree_util.tree_leaves_with_path(compiled(variables, batch, token_bytes))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, compiled.as_text()


def _check_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        scale = max(float(np.max(np.abs(value))), 1e-3)
        np.testing.assert_allclose(other[name], value, atol=3e-5 * scale, rtol=0, err_msg=name)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("sizes", "rounds", "model"),
    [
        ({"pipeline": 2}, 1, {"gate": "switch", "dispatch": "gather", "num_layers": 2, "remat": "none"}),
        slow_case({"pipeline": 2}, 1, {"gate": "none", "num_layers": 2}),
        # One layer of each kind before and after the pipelined layers, and multi-token prediction at the end.
        slow_case(
            {"data": 4, "pipeline": 2},
            1,
            DEEPSEEK
            | {"num_layers": 6, "first_dense": 1, "sliding_window": 3, "pattern": "attention sliding x 4 attention"}
            | {"prediction_layers": 1, "dispatch": "einsum", "dropout": 0.1, "remat": "full"},
        ),
        slow_case({"expert": 2, "pipeline": 4}, 1, {"gate": "noisy_topk", "dispatch": "dropless"}),
        slow_case({"fsdp": 2, "pipeline": 2}, 2, {"gate": "switch", "dispatch": "gather", "jitter": 0.1}),
        # Stages that do not divide the layers: one layer, or two, belong to no stage. Routers hand on a vector.
        slow_case(
            {"pipeline": 2},
            1,
            {"gate": "tests.routing.test_carry:Vector", "dispatch": "einsum", "num_layers": 3, "remat": "none"},
        ),
        slow_case(
            {"pipeline": 2}, 2, {"gate": "tests.routing.test_carry:Vector", "dispatch": "dropless", "num_layers": 5}
        ),
        slow_case({"expert": 2, "pipeline": 2}, 1, DEEPSEEK | {"num_layers": 5, "dropout": 0.1}),
        slow_case(
            {"expert": 2, "pipeline": 4},
            1,
            DEEPSEEK | {"num_layers": 7, "first_dense": 1, "dispatch": "dropless", "remat": "full"},
        ),
        slow_case({"fsdp": 2, "pipeline": 4}, 2, {"gate": "switch", "dispatch": "gather", "num_layers": 10}),
        slow_case({"pipeline": 4}, 3, {"gate": "none", "num_layers": 12}),
        slow_case(
            {"expert": 4, "pipeline": 2}, 1, {"gate": "expert_choice", "accept_future_leak": True, "dispatch": "gather"}
        ),
        slow_case(
            {"expert": 2, "pipeline": 2, "context": 2},
            1,
            {"gate": "mixtral", "dispatch": "dropless", "attention": "blocked"},
        ),
        slow_case({"data": 4, "pipeline": 2}, 2, {"gate": "none", "remat": "none"}),
        # Routers in attention, whose balance losses are in the objective.
        slow_case(
            {"pipeline": 2}, 1, {"mixer": SwitchHead(heads=2, head_dim=4, experts=3, balance=0.1), "num_layers": 3}
        ),
        slow_case(
            {"expert": 4, "pipeline": 2}, 1, {"gate": "soft_moe", "accept_future_leak": True, "dispatch": "einsum"}
        ),
        slow_case(
            {"expert": 2, "pipeline": 2}, 2, {"gate": "mixtral", "dispatch": "dropless", "every": 2, "num_layers": 8}
        ),
    ],
)
def test_values_and_gradients_are_those_without_a_pipeline(sizes, rounds, model):
    config = _config(rounds, **model)
    split, text = _gradients(config, MeshConfig(**{"data": 1, **sizes}))
    _check_equal(_gradients(config, ALONE)[0], split)
    # The planner reads these counts. Two stages, two rounds and four microbatches in two blocks: 2 x 2 x 2 + 2 - 1
    # turns; another microbatch may enter in the first two of each block and in the last.
    if (sizes["pipeline"], rounds) == (2, 2):
        conditionals = re.findall(r" conditional\(.*op_name=\"([^\"]+)", text)
        assert conditionals
        assert all("/taken_5_of_9/" in name for name in conditionals)


@pytest.mark.slow
def test_gradients_of_matrices_that_are_sent_in_bfloat16_are_summed_in_float32():
    """Three rounds of two stages; every token goes to every expert, since rounding would change choices.

    The two programs round differently. A sum in bfloat16 would hold only bfloat16 values; in a sum in float32 about a
    fourth are.
    """
    config = _config(3, gate="mixtral", experts_per_token=4, dispatch="dropless", num_layers=7, dtype="bfloat16")
    one, _ = _gradients(config, ALONE)
    split, _ = _gradients(config, MeshConfig(data=1, pipeline=2))
    for matrix in ("gate", "up", "down"):
        name = f"[1]['segment_0']['block_0']['moe']['experts']['{matrix}']"
        assert np.linalg.norm(split[name] - one[name]) <= 0.1 * np.linalg.norm(one[name]), name
        assert np.mean(split[name] == split[name].astype(jnp.bfloat16)) < 0.5


@pytest.mark.slow
def test_stages_exchange_activations_but_no_weights():
    """Two rounds of two stages, experts over two devices, D over two; also evaluation, which has no stages."""
    sizes = MeshConfig(data=1, fsdp=2, expert=2, pipeline=2)
    config = _config(2, gate="mixtral", dispatch="gather")
    found, text = _gradients(config, sizes)
    _check_equal(_gradients(config, ALONE)[0], found)
    evaluated, eval_text = _evaluate(config, sizes)
    _check_equal(_evaluate(config, ALONE)[0], evaluated)

    mesh = make_mesh(sizes, _devices(sizes))
    activations = (1, T, config.model.d_model)  # of one row
    moved = collectives(text, mesh.size)
    assert any(one.kind == "collective-permute" and activations in one.shapes for one in moved)
    stages = axis_groups(mesh, "pipeline")
    for one in moved + collectives(eval_text, mesh.size):
        if one.kind == "all-gather":
            assert not any(len(shape) > 2 and shape[-2:] == activations[1:] for shape in one.shapes), one.text
            matrices = any(len(shape) > 1 and config.model.d_model in shape for shape in one.shapes)
            assert not matrices or all(len(group & pair) < 2 for group in one.groups for pair in stages), one.text
    # No turn keeps weights for the backward pass: 2 rounds of 4 microbatches and one more turn.
    hidden = str(config.model.moe.d_ff)
    assert not [dims for dims in re.findall(r"f32\[9,([\d,]+)\]", text) if hidden in dims.split(",")]


@pytest.mark.parametrize(("layers", "stored"), [(4, (1, 4, 16, 20)), (5, (3, 2, 16, 20))])
def test_a_checkpoint_moves_between_meshes_with_and_without_a_pipeline(layers, stored, tmp_path):
    """Written by two stages, read by one device, and the reverse; of three MoE layers each stores half of each."""
    config = _config(**DEEPSEEK, num_layers=layers, first_dense=2)
    states = {}
    for name, sizes in (("split", MeshConfig(data=1, pipeline=2)), ("whole", ALONE)):
        mesh = make_mesh(sizes, _devices(sizes))
        with jax.set_mesh(mesh):
            program = build(dataclasses.replace(config, mesh=sizes), mesh)
            states[name] = _drawn(program.state), program.state
    of_layers = states["split"][0].parameters["segment_1"]["block_0"]["moe"]["experts"]["up"]
    assert of_layers.sharding.shard_shape(of_layers.shape) == stored
    for writer, reader in (("split", "whole"), ("whole", "split")):
        checkpointer = ocp.Checkpointer(array_handler())
        checkpointer.save(tmp_path / writer, args=ocp.args.PyTreeSave(states[writer][0].stored))
        state, shapes = states[reader]
        found = checkpointer.restore(tmp_path / writer, args=manager._restore(shapes))
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, state)
        assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, shapes)


@pytest.mark.slow
def test_layers_outside_the_stages_are_evaluated_as_without_a_pipeline():
    """Two stages each store half of each of five layers: no device ever holds more than one whole layer."""
    sizes = MeshConfig(data=1, fsdp=2, expert=2, pipeline=2)
    config = _config(gate="mixtral", dispatch="gather", num_layers=5)
    evaluated, text = _evaluate(config, sizes)
    _check_equal(_evaluate(config, ALONE)[0], evaluated)
    gathered = [shape for one in collectives(text, 8) if one.kind == "all-gather" for shape in one.shapes]
    assert not [shape for shape in gathered if len(shape) > 2 and shape[0] == 5 and config.model.moe.d_ff in shape]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_continues_with_and_without_a_pipeline(directory, tmp_path):
    """Two steps on two stages of four devices, two on one device and two on two stages of one equal six on one
    device."""
    settings = SETTINGS | {"model.num_layers": 2, "train.accumulation_steps": 2, "train.sample_tokens": 4}
    train(tiny(directory, **settings), str(tmp_path / "still"), ONE, quiet=True)
    split = {"mesh.data": 1, "mesh.pipeline": 2}
    starts = (split | {"mesh.expert": 4}, {}, split)
    for number, (mesh, count) in enumerate(zip(starts, (8, 1, 2), strict=True)):
        with interrupted(2 * number + 3), contextlib.suppress(Interrupted):
            train(tiny(directory, **settings, **mesh), str(tmp_path / "moved"), jax.devices()[:count], quiet=True)
    for prefix in ("train", "heldout/all"):
        still, moved = (rows(tmp_path / name, prefix) for name in ("still", "moved"))
        assert [row["step"] for row in moved] == [row["step"] for row in still]
        np.testing.assert_allclose([row["loss"] for row in moved], [row["loss"] for row in still], rtol=1e-4)


@pytest.mark.parametrize(("layers", "rounds", "unrolled"), [(2, 1, True), (4, 2, True), (5, 2, True), (4, 1, False)])
def test_loops_over_several_layers_of_a_turn_are_not_unrolled_on_nvidia(layers, rounds, unrolled):
    """Two stages; with one layer per turn there is no such loop."""
    config = _config(rounds, num_layers=layers)
    device = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    for shape, expected in (({"pipeline": 2}, unrolled), ({"data": 2}, True)):
        mesh: Any = types.SimpleNamespace(shape=shape, devices=np.array([device, device]))
        assert ("xla_gpu_enable_while_loop_unrolling" not in step.compiler_options(config, mesh)) == expected


@pytest.mark.parametrize(
    ("changes", "sizes", "message"),
    [
        ({"model": tiny_model(num_layers=1)}, {}, r"num_layers=1: its 1 equal layers must be at least .* = 2"),
        (
            {"train": TrainConfig(accumulation_steps=3, batch_size=24)},
            {},
            r"accumulation_steps=3: must be a multiple of mesh",
        ),
        ({"distill": DistillConfig(teacher="run")}, {}, r"distill.teacher='run': must be '' with mesh.pipeline=2"),
        (
            {"train": TrainConfig(accumulation_steps=8, pipeline_rounds=4)},
            {},
            r"divisible by 2, must be a multiple of .* = 8",
        ),
        ({}, {"tensor": 2}, r"mesh.tensor=2: must be 1 with mesh.pipeline=2"),
    ],
)
def test_impossible_pipelines_are_refused_in_one_sentence(changes, sizes, message):
    with pytest.raises(ConfigError, match=message):
        check(dataclasses.replace(_config(), **changes), {"pipeline": 2} | sizes)
