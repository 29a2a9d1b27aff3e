"""Non-finite losses and parameters: skipped updates, rollback, spikes and dead experts."""

import dataclasses
import json
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe.checkpoints.integrity import DamagedError
from moe.checkpoints.manager import Checkpoints
from moe.config import ConfigError, OptimizerConfig, TrainConfig
from moe.models.state import TrainState, continue_at
from moe.parallel.mesh import make_mesh
from moe.system.signals import StartAgain
from moe.training import loop as training
from moe.training import recovery
from moe.training.optimizer import make_optimizer
from moe.training.train import train
from tests.run_helpers import ONE, SETTINGS, Interrupted, interrupted, rows, state_of, steps, tiny

# Most runs of this file share one program.
pytestmark = pytest.mark.usefixtures("compilation_cache")


def test_an_update_that_is_not_finite_changes_nothing(directory, whole, programs):
    config = tiny(directory, **SETTINGS)
    mesh = make_mesh(config.mesh, ONE)
    with jax.set_mesh(mesh):
        program = programs(config, mesh)
        rng = np.random.default_rng(0)
        tokens = rng.integers(3, 400, (8, 16)).astype(np.int32)
        ones = np.ones_like(tokens)
        batch = {"tokens": tokens, "targets": tokens, "segment_ids": ones, "positions": ones.cumsum(1) - 1}
        batch = training.place(batch, mesh)
        # One infinite norm scale: the loss is NaN.
        scale = lambda state: state.parameters["final_norm"]["scale"]  # noqa: E731
        before = state_of(program, whole, 4)
        scale_before = scale(before)
        before.parameters["final_norm"]["scale"] = scale_before.at[0].set(jnp.inf)
        kept = jax.tree.map(np.asarray, before)
        after, metrics = program.train_step(before, batch)
        assert not np.isfinite(metrics.loss)
        assert metrics.skipped == 1
        assert after.step == 5
        for name in ("parameters", "biases", "rng"):
            jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(kept, name))
        changed = [
            jax.tree_util.keystr(path)
            for (path, ours), theirs in zip(
                jax.tree_util.tree_leaves_with_path(after.optimizer), jax.tree.leaves(kept.optimizer), strict=True
            )
            if (np.asarray(ours) != theirs).any()
        ]
        assert len(changed) == 1  # the schedule's count: the learning rate follows the steps
        assert metrics.learning_rate == pytest.approx(rows(whole, "train")[4]["learning_rate"])
        # The same state is updated once repaired.
        after.parameters["final_norm"]["scale"] = scale_before
        last, metrics = program.train_step(after, batch)
        assert metrics.skipped == 0
        assert (np.asarray(scale(last)) != np.asarray(kept.parameters["final_norm"]["scale"])).all()


def poisoned(programs, before=(), after=()):
    """A make_program whose parameters become infinite before or after some steps, as after a bad update."""

    def infinite(state):
        norm = jax.tree.map(lambda scale: scale * jnp.inf, state.parameters["final_norm"])
        return dataclasses.replace(state, parameters=state.parameters | {"final_norm": norm})

    def make(config, mesh, teacher=None):
        program = programs(config, mesh, teacher)

        def step(state, batch):
            number = int(state.step) + 1
            state, metrics = program.train_step(infinite(state) if number in before else state, batch)
            return infinite(state) if number in after else state, metrics

        return dataclasses.replace(program, train_step=step)

    return make


def test_training_after_a_rollback_skips_the_bad_batches(directory, tmp_path, programs):
    config = tiny(directory, **SETTINGS, **{"train.num_steps": 10, "train.max_skipped_steps": 3})
    bad = poisoned(programs, {5})
    train(config, str(tmp_path / "run"), ONE, make_program=bad)
    warned = [(row["step"], row["what"]) for row in rows(tmp_path / "run", "warning") if row["what"] != "dead"]
    assert warned == [(5, "skipped"), (6, "skipped"), (7, "skipped"), (7, "rollback")]
    back = next(row for row in rows(tmp_path / "run", "warning") if row["what"] == "rollback")
    assert back["to"] == 4
    first = next(row for row in rows(tmp_path / "run", "warning") if row["what"] == "skipped")
    assert first["first_row"] == 4 * 8  # the fifth batch of 8 rows
    logged = rows(tmp_path / "run", "train")
    assert [row["step"] for row in logged] == [*range(1, 11)]
    assert [row["skipped"] for row in logged] == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert np.isfinite([row["loss"] for row in logged[7:]]).all()
    assert logged[7]["learning_rate"] < logged[4]["learning_rate"] < logged[2]["learning_rate"]
    # Interrupted after the rollback and before the next checkpoint, it writes the same bytes, rollback included.
    with interrupted(8), pytest.raises(Interrupted):
        train(config, str(tmp_path / "stopped"), ONE, make_program=bad)
    assert steps(tmp_path / "stopped") == [2, 4]
    train(config, str(tmp_path / "stopped"), ONE, make_program=bad)
    for name in ("metrics.jsonl", "report.txt"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


@pytest.mark.parametrize(
    ("overrides", "at", "words"),
    [
        ({"train.on_skipped_steps": "stop"}, {3}, "step 4: the last 2 updates were skipped, from step 3 on.*'stop'"),
        ({}, {1}, "no checkpoint is left to roll back to"),
    ],
)
def test_persistent_non_finite_losses_stop_the_run(directory, tmp_path, programs, overrides, at, words):
    config = tiny(directory, **SETTINGS, **{"train.max_skipped_steps": 2}, **overrides)
    with pytest.raises(ConfigError, match=words):
        train(config, str(tmp_path), ONE, make_program=poisoned(programs, at))
    (first,) = at  # the error refers to the warnings, also to those of the row at which the run stops
    assert [row["at"] for row in rows(tmp_path, "warning") if row["what"] == "skipped"] == [first, first + 1]


def test_a_continued_streak_of_skips_rolls_back_further(directory, tmp_path, programs):
    """Non-finite at 7, back to 6, again at 9 without a good step between: back to 4."""
    config = tiny(directory, **SETTINGS, **{"train.num_steps": 12, "train.max_skipped_steps": 2})
    train(config, str(tmp_path), ONE, make_program=poisoned(programs, {7, 9}))
    assert [row["to"] for row in rows(tmp_path, "warning") if row["what"] == "rollback"] == [6, 4]
    assert rows(tmp_path, "train")[-1]["skipped"] == 0


def test_a_rollback_prefers_regular_checkpoints_to_those_of_interruptions():
    checkpoints = object.__new__(Checkpoints)
    checkpoints._manager = SimpleNamespace(all_steps=lambda: [2, 4, 5, 6, 7])
    assert checkpoints.before(6, 2) == [4, 2, 5]


def test_a_state_that_was_rolled_back_can_be_donated_to_the_train_step():
    """Every count of a schedule, of which Muon has several, is an array of its own."""
    optimizer = make_optimizer(OptimizerConfig(name="muon"), 100)
    parameters = {"dense": {"up": jnp.ones((2, 2))}, "norm": {"scale": jnp.ones(2)}}
    state = TrainState(jnp.zeros((), jnp.int32), parameters, {}, optimizer.init(parameters), jnp.zeros(2, jnp.uint32))
    moved = continue_at(state, 7)
    nodes = jax.tree.leaves(moved.optimizer, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))
    counts = [node.count for node in nodes if isinstance(node, optax.ScaleByScheduleState)]
    assert len(counts) > 1
    assert [int(count) for count in (moved.step, *counts)] == [7] * (1 + len(counts))
    following = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)(moved)
    assert int(following.step) == 8


def test_a_rollback_frees_the_state_before_it_reads_another():
    def make():
        arrays = {"w": jnp.ones(2)}, {}, {"count": jnp.zeros(1)}, jnp.zeros(2)
        return TrainState(jnp.zeros((), jnp.int32), *arrays)

    def restore(step, _):
        freed.extend(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        return make(), {}

    state, freed = make(), []
    checkpoints = SimpleNamespace(wait=lambda: None, before=lambda *_: [4], restore=restore)
    program = SimpleNamespace(config=SimpleNamespace(train=TrainConfig(max_skipped_steps=2)), state=None)
    restored, _ = recovery.Recovery(program, checkpoints).after(8, 2, state)
    assert freed == [True] * 4
    assert int(restored.step) == 8


def test_spikes_and_dead_experts_by_hand():
    """Losses 1, 2, 1, 2, ...: median 1.5, every deviation 0.5, sigma 0.7413; a spike is above 1.5 + 6 sigma =
    5.9478."""
    watch = recovery.Health(6.0, TrainConfig())
    metrics = [{"skipped": 0.0, "cross_entropy": 1.0 + step % 2} for step in range(16)]
    load = [[0.5, 0.5, 0.0], [0.2, 0.4, 0.4]]
    (dead,) = watch.look(16, metrics, {"expert_load": load})
    assert (dead["what"], dead["experts"]) == ("dead", [[0, 2]])
    resumed = recovery.Health(6.0, TrainConfig(), json.loads(json.dumps(watch.memory())))
    for follower in (watch, resumed):
        assert follower.look(17, [{"skipped": 1.0, "loss": 9.0, "gradient_norm": np.inf}], {})[0]["what"] == "skipped"
    assert watch.look(18, [{"skipped": 0.0, "cross_entropy": 5.9}], {"expert_load": load}) == []
    (spike,) = resumed.look(18, [{"skipped": 0.0, "cross_entropy": 6.0}], {"expert_load": load})
    assert (spike["what"], spike["at"], spike["median"]) == ("spike", 18, 1.5)
    assert (watch.skipped_in_a_row, resumed.skipped_in_a_row) == (0, 0)
    (dead,) = resumed.look(19, [], {"expert_load": [[0.5, 0.5, 0.0], [0.0, 0.4, 0.6]]})
    assert dead["experts"] == [[1, 0]]  # the other one is already known to be dead
    assert (
        recovery.Health(0.0, TrainConfig(), watch.memory()).look(20, [{"skipped": 0.0, "cross_entropy": 99.0}], {})
        == []
    )


def test_dead_experts_of_a_large_model_cost_no_time():
    """Half of 61 x 256 experts are dead twice: a pair is looked up among 7,808, not compared with each."""

    class Pair(list):
        compared = 0

        def __eq__(self, other):
            Pair.compared += 1
            return list.__eq__(self, other)

        __hash__ = None

    load = np.zeros((61, 256))
    load[:, ::2] = 1 / 128
    watch = recovery.Health(6.0, TrainConfig())
    assert len(watch.look(1, [], {"expert_load": load})[0]["experts"]) == 61 * 128
    watch._dead = [Pair(pair) for pair in watch._dead]
    assert watch.look(2, [], {"expert_load": load}) == []
    assert Pair.compared < 61 * 256


def test_parameters_that_are_not_finite_are_never_saved(directory, programs, tmp_path):
    """An update that leaves infinite parameters while its own loss and gradients were finite."""

    config = tiny(directory, **SETTINGS, **{"train.max_skipped_steps": 1})
    train(config, str(tmp_path / "run"), ONE, make_program=poisoned(programs, after={4}), quiet=True)
    assert steps(tmp_path / "run") == [2, 6]
    assert [row["to"] for row in rows(tmp_path / "run", "warning") if row["what"] == "rollback"] == [2]
    with pytest.raises(ConfigError, match="step 6: the parameters are not finite"):
        train(config, str(tmp_path / "last"), ONE, make_program=poisoned(programs, after={6}), quiet=True)
    assert steps(tmp_path / "last") == [2, 4]


@pytest.mark.parametrize(("begun_at", "expected"), [(0, [160, 185, 160]), (185, [185, 160])])
def test_a_new_streak_of_skipped_updates_begins_at_its_newest_checkpoint(begun_at, expected):
    """Updates 165 to 182 and from 186 on are skipped, every tenth step is logged, and eight in a row are too many. It
    holds although no log falls on the good steps between, and in a run that was resumed among them."""
    saved = [80, 160, 185]
    checkpoints = SimpleNamespace(wait=lambda: None, restore=lambda step, _: (step, None))
    settings = TrainConfig(max_skipped_steps=8, save_every=5)
    rolls = recovery.Recovery(SimpleNamespace(config=SimpleNamespace(train=settings), state=None), checkpoints)
    state, rolled_back, skipped = SimpleNamespace(restored=lambda good: good, stored=()), [], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "continue_at", lambda good, _: state)
        for step in range(begun_at + 1, 211):
            skipped = skipped + 1 if 165 <= step <= 182 or step >= 186 else 0
            if step % 10 == 0:
                there = [each for each in saved if each <= step]
                checkpoints.before = lambda limit, _, there=there: [each for each in reversed(there) if each < limit]
                _, warnings = rolls.after(step, skipped, state)
                rolled_back += [warning["to"] for warning in warnings]
    assert rolled_back == expected


def test_a_rollback_to_a_checkpoint_that_one_process_finds_damaged_starts_the_run_again():
    """The other processes may have read it, and would go on from another step."""
    checkpoints = mock.Mock(before=lambda *_: [4, 2])
    checkpoints.restore.side_effect = DamagedError("cut")
    checkpoints.start_again.side_effect = StartAgain("the checkpoint of step 4 is damaged")
    settings = TrainConfig(max_skipped_steps=8)
    rolls = recovery.Recovery(SimpleNamespace(config=SimpleNamespace(train=settings), state=None), checkpoints)
    with pytest.raises(StartAgain):
        rolls.after(20, 8, SimpleNamespace(stored=()))
    assert [call.args[0] for call in checkpoints.restore.call_args_list] == [4]
