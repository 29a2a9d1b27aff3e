"""The compiled train step: memory, noise, and clipping and skipping of gradients."""

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import Config, DataConfig, LoraConfig, MeshConfig, OptimizerConfig, StartConfig, TrainConfig
from moe.layers.call import Report
from moe.models.state import TrainState
from moe.parallel.mesh import make_mesh
from moe.training import losses, spikes, update
from moe.training.optimizer import gradient_norm, in_steps, learning_rate_schedule, make_optimizer
from moe.training.rules import next_states
from moe.training.step import build
from tests.helpers import tiny_model
from tests.run_helpers import Interrupted


@pytest.fixture(scope="module")
def programs():
    """(Program, its compiled train step, its text): 4 rows of 24 tokens, vocabulary of 48, chunks of 8 positions."""
    config = Config(
        model=tiny_model(gate="none", num_layers=1),
        data=DataConfig(sequence_length=24),
        train=TrainConfig(batch_size=4, num_steps=100),
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        patch.setattr(losses, "_CHUNK", 32)
        program = build(config, mesh)
        compiled = program.train_step.lower(program.state, program.batch).compile()
    return program, compiled, compiled.as_text()


def test_every_buffer_of_the_state_is_reused(programs):
    program, compiled, text = programs
    # The schedule's count always equals the state's step: it is written but never read, hence not an argument.
    paths = jax.tree_util.tree_leaves_with_path(program.state)
    unread = max(i for i, (path, _) in enumerate(paths) if getattr(path[-1], "name", None) == "count")
    outputs = [i for i in range(len(paths)) if i != unread]
    header = text.splitlines()[0]
    pairs = re.findall(r"\{(\d+)\}: \((\d+), \{\}, (?:may|must)-alias\)", header)
    # Each output reuses the buffer of the corresponding input.
    assert sorted((int(output), int(argument)) for output, argument in pairs) == list(
        zip(outputs, range(len(outputs)), strict=True)
    )
    nbytes = sum(paths[i][1].size * paths[i][1].dtype.itemsize for i in outputs)
    assert compiled.memory_analysis().alias_size_in_bytes == nbytes
    assert "conditional(" not in text  # a branch for skipped updates would hold the old and the new state


@pytest.mark.slow
def test_moments_in_host_memory_give_the_same_steps():
    """Three steps on eight devices are equal bit for bit; AdamW's arrays stay in host memory."""
    states = {}
    for memory in ("device", "host"):
        config = Config(
            model=tiny_model(gate="mixtral", num_layers=1),
            data=DataConfig(sequence_length=8),
            train=TrainConfig(batch_size=8),
            optimizer=OptimizerConfig(memory=memory, warmup_steps=1),
            mesh=MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
        )
        mesh = make_mesh(config.mesh, jax.devices())
        with jax.set_mesh(mesh):
            program = build(config, mesh)
            state = program.init()
            tokens = {
                name: np.arange(np.prod(leaf.shape), dtype=leaf.dtype).reshape(leaf.shape) % 7
                for name, leaf in program.batch.items()
            }
            for _ in range(3):
                state, metrics = program.train_step(state, tokens)
        assert metrics.skipped == 0
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim}
        assert kinds == {"pinned_host" if memory == "host" else "device"}
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.parameters)} == {"device"}
        states[memory] = jax.tree.map(np.asarray, state)
    jax.tree.map(np.testing.assert_array_equal, states["host"], states["device"])
    start = jax.tree.map(np.asarray, program.init().parameters)
    assert not np.array_equal(start["embedding"]["table"], states["host"].parameters["embedding"]["table"])


def test_logits_are_held_a_chunk_at_a_time(programs):
    """The program has no floating-point array of 4·24·48 numbers, in any shape."""
    text = programs[2]
    assert "f32[4,8,48]" in text
    sizes = {shape: 1 for shape in re.findall(r"\bb?f\d+\[([\d,]+)\]", text) if shape.endswith(",48")}
    for shape in sizes:
        elements = 1
        for size in shape.split(","):
            elements *= int(size)
        assert elements < 4 * 24 * 48, shape


@pytest.mark.parametrize("frozen", [(), ("attention",)])
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_clipping_scales_gradients_to_the_allowed_norm(frozen, size):
    """Gradients (3s, 4s) have norm 5s, or 3s without the frozen part; the allowed norm is 2."""
    config = OptimizerConfig(gradient_clip=2.0, frozen=frozen)
    parameters = {"dense": {"up": jnp.ones((1, 1))}, "attention": {"query": jnp.ones((1, 1))}}
    gradients = {"dense": {"up": jnp.full((1, 1), 3 * size)}, "attention": {"query": jnp.full((1, 1), 4 * size)}}
    norm = gradient_norm(config, gradients)
    np.testing.assert_allclose(norm, (3 if frozen else 5) * size, rtol=1e-6)
    factor = min(1.0, 2.0 / float(norm))
    unclipped = make_optimizer(dataclasses.replace(config, gradient_clip=0.0), 100)
    clipped = make_optimizer(config, 100)
    expected = unclipped.update(
        jax.tree.map(lambda gradient: gradient * factor, gradients), unclipped.init(parameters), parameters
    )
    updates = clipped.update(gradients, clipped.init(parameters), parameters, norm=norm)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), jax.tree.leaves(expected), jax.tree.leaves(updates)
    )
    moved: Any = updates[0]
    assert bool(jnp.any(moved["attention"]["query"] != 0)) != bool(frozen)


def test_each_step_has_its_own_noise_key(monkeypatch):
    keys, run = [], jax.random.key(7)

    def gradients(parts, state, batch, rng, teacher):
        keys.append(jax.random.key_data(rng))
        raise Interrupted

    monkeypatch.setattr(update, "_gradients", gradients)
    for number in (3, 4):
        state = TrainState(jnp.asarray(number), {}, {}, None, jax.random.key_data(run))
        with pytest.raises(Interrupted):
            update.train_step(SimpleNamespace(config=Config()), state, {})
        np.testing.assert_array_equal(keys[-1], jax.random.key_data(jax.random.fold_in(run, number)))


def test_evaluation_uses_neither_training_mode_nor_noise(monkeypatch):
    asked = []

    def forward(model, batch, **settings):
        asked.append(settings)
        raise Interrupted

    monkeypatch.setattr(update, "forward", forward)
    monkeypatch.setattr(update.nnx, "merge", lambda *_: None)
    with pytest.raises(Interrupted):
        update.eval_step(None, {}, {}, np.zeros(3, np.int32))
    assert not any(asked[0].values())


def test_only_targets_count_as_text_in_evaluation(monkeypatch):
    """Tokens 0 and 2 of 5 and 1 bytes are targets; the last position has none."""
    monkeypatch.setattr(update.nnx, "merge", lambda *_: SimpleNamespace(output_matrix=lambda: None))
    monkeypatch.setattr(update, "forward", lambda *_: SimpleNamespace(hidden=None, layers=None))
    monkeypatch.setattr(update, "row_cross_entropy", lambda hidden, matrix, targets: (jnp.zeros(1), jnp.zeros(1)))
    batch = {"targets": jnp.asarray([[0, 2, -1]])}
    assert update.eval_step(None, {}, batch, np.asarray([5, 7, 1], np.int32)).target_bytes == 6


def test_a_router_that_is_not_trained_keeps_its_biases():
    gate = {"gate": "deepseek_v3", "num_experts": 8, "experts_per_token": 2}
    frozen = Config(model=tiny_model(**gate), optimizer=OptimizerConfig(frozen=("router",)))
    lora = LoraConfig(rank=2, trained=("embedding",))
    adapted = Config(model=tiny_model(**gate), lora=lora, start=StartConfig(checkpoint="base"))
    biases = {"bias": jnp.ones(8)}
    report = Report(signals={"layers": object()})
    assert all(next_states(config, biases, report) is biases for config in (frozen, adapted))


def test_a_non_finite_gradient_skips_the_update(monkeypatch):
    """Even if the loss is finite."""
    config = Config(model=tiny_model(gate="none"), optimizer=OptimizerConfig(schedule="constant", warmup_steps=0))
    optimizer = in_steps(config.optimizer, make_optimizer(config.optimizer, 10))
    parameters = {"dense": {"up": jnp.ones((2, 2))}}
    schedule = learning_rate_schedule(config.optimizer, 10)
    parts = update.Parts(config, None, None, optimizer, schedule, config.objective)
    key = jax.random.key_data(jax.random.key(0))
    state = TrainState(jnp.zeros((), jnp.int32), parameters, {}, optimizer.init(parameters), key)
    for value, skipped in ((jnp.inf, 1), (1.0, 0)):
        gradients = {"dense": {"up": jnp.ones((2, 2)).at[0, 0].set(value)}}
        found = (jnp.ones(()), (jnp.ones(()), {}), Report()), gradients
        monkeypatch.setattr(update, "_gradients", lambda *_, found=found: found)
        after, metrics = update.train_step(parts, state, {})
        assert metrics.skipped == skipped
        assert bool((after.parameters["dense"]["up"] == 1).all()) == bool(skipped)


def test_a_spike_skips_the_update(monkeypatch):
    """64 steps of losses 1 and 3: mean 2, variance 64/63, so 6 deviations end at 2 + 6·(64/63)^½ = 8.047. Skipped steps
    are recorded too, unless they are not finite."""
    settings = OptimizerConfig(schedule="constant", warmup_steps=0, skip_sigmas=6.0)
    config = Config(model=tiny_model(gate="none"), optimizer=settings)
    optimizer = in_steps(settings, make_optimizer(settings, 10))
    parameters = {"dense": {"up": jnp.ones((2, 2))}}
    schedule = learning_rate_schedule(settings, 10)
    parts = update.Parts(config, None, None, optimizer, schedule, config.objective)
    key = jax.random.key_data(jax.random.key(0))
    state = TrainState(jnp.zeros((), jnp.int32), parameters, {}, optimizer.init(parameters), key)
    seen = jnp.asarray([1.0, 3.0] * 64)  # the last 64 are not of this run until 128 steps are recorded
    for norms, number, loss, skipped in (
        (seen, 64, 8.04, 0),
        (seen, 64, 8.05, 1),
        (seen, 63, 8.05, 0),  # half of the window is needed
        (jnp.full(128, 1.9), 64, 2.0, 1),  # a norm of 2 above equal ones of 1.9
        (seen, 64, jnp.nan, 1),
        (seen, 130, 8.05, 1),
    ):
        found = (jnp.asarray(loss), (jnp.ones(()), {}), Report()), {"dense": {"up": jnp.ones((2, 2))}}
        monkeypatch.setattr(update, "_gradients", lambda *_, found=found: found)
        history = spikes.History(jnp.asarray(number), seen, norms)
        before = dataclasses.replace(state, optimizer=state.optimizer._replace(history=history))
        after, metrics = update.train_step(parts, before, {})
        assert metrics.skipped == skipped
        assert bool((after.parameters["dense"]["up"] == 1).all()) == bool(skipped)
        recorded = after.optimizer.history
        assert int(recorded.steps) == number + bool(np.isfinite(loss))
        if np.isfinite(loss):
            assert (recorded.losses[number % 128], recorded.norms[number % 128]) == (np.float32(loss), 2.0)
