"""Rollouts by the model's own sampler, what they record, and a run on them that resumes bit for bit."""

import dataclasses
import shutil
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest
from etils import epath

from moe.checkpoints.pinned import pinned_steps
from moe.config import Config, ConfigError, DataConfig, DistillConfig, LoraConfig, MeshConfig, StartConfig, TrainConfig
from moe.config.run_sections import OptimizerConfig
from moe.lab.benchmarks.train_steps import random_rows, refuse_more_than_the_model
from moe.models.sampling import Rollout, check_prompts, make_sampler
from moe.objectives import online
from moe.objectives.online import Engine, Rounds, make_groups, own_engine, train_online
from moe.parallel.mesh import make_mesh
from moe.training.batches import EXPERTS_KEY
from moe.training.step import build
from moe.training.teacher import read_teacher
from tests.helpers import random_parameters, slow_case, tiny_model
from tests.run_helpers import ONE, Interrupted, state_of, write_run

CONFIG = Config(
    model=tiny_model(vocab_size=13, gate="mixtral", num_experts=5, experts_per_token=2, dispatch="dropless"),
    data=DataConfig(objective="policy", sequence_length=9),
    optimizer=OptimizerConfig(warmup_steps=0, schedule="constant"),
    train=TrainConfig(num_steps=6, batch_size=8, keep_checkpoints=3),
)


class Evens:
    """A task that rewards even ids."""

    def prompts(self, rng, count):
        return [rng.integers(1, 13, 2 + i % 2) for i in range(count)]

    def reward(self, prompt, completion):
        return float(np.mean(completion % 2 == 0))


#: A completion of two tokens.
ROLLOUT = Rollout(np.array([3, 2]), np.array([-1.0, -2.0], np.float32), None)


def without_training(monkeypatch):
    """A program for tests of rounds that do not need its updates; nothing is saved."""
    checkpoints = mock.MagicMock(resume=mock.Mock(return_value=None))
    monkeypatch.setattr(online, "Checkpoints", lambda *_: checkpoints)
    return SimpleNamespace(
        config=CONFIG, state=None, init=lambda: SimpleNamespace(variables={}), train_step=None, mesh=None
    )


def test_sampled_log_probabilities_and_experts_are_those_of_a_full_forward_pass():
    graphdef, variables = random_parameters(CONFIG.model)
    prompts = [np.array([3, 1, 4]), np.array([1]), np.array([5, 9])]
    sample = make_sampler(CONFIG.model, 6, stop_tokens=(2, 7))
    found = sample(variables, prompts, jax.random.key(1))
    again = sample(variables, prompts, jax.random.key(1))
    assert [one.tokens.tolist() for one in found] == [one.tokens.tolist() for one in again]
    assert any(len(one.tokens) < 6 for one in found)  # a stop token ends a row and is included
    for one in found:
        assert not np.isin(one.tokens[:-1], (2, 7)).any()
        assert len(one.tokens) == 6 or one.tokens[-1] in (2, 7)
    texts = np.zeros((3, 9), np.int64)
    for row, prompt, one in zip(texts, prompts, found, strict=True):
        ids = np.concatenate([prompt, one.tokens])
        row[: len(ids)] = ids

    @jax.jit
    def run(variables, texts):
        from flax import nnx

        output = nnx.merge(graphdef, variables)(texts, return_routing=True)
        return jax.nn.log_softmax(output.logits), output.routing.expert_index

    log_probs, experts = jax.tree.map(np.asarray, run(variables, texts))
    for row, (prompt, one) in enumerate(zip(prompts, found, strict=True)):
        places = len(prompt) - 1 + np.arange(len(one.tokens))
        np.testing.assert_allclose(one.log_probs, log_probs[row, places, one.tokens], atol=1e-5)
        np.testing.assert_array_equal(one.experts, experts[:, row, : len(prompt) + len(one.tokens) - 1].swapaxes(0, 1))
    (group,) = make_groups([prompts[0]], [found[0], found[0]], Evens(), 2)
    assert group.completions[1].reward == np.mean(found[0].tokens % 2 == 0)


def test_rounds_of_other_prompts_share_a_program(monkeypatch):
    """Longest prompts of 5 to 8 tokens are padded to 8, of 257 to 512 tokens to 512, and of 513 to 640 to 640."""
    shapes = []

    def run(variables, token_ids, lengths, key):
        shapes.append((token_ids.shape, lengths.tolist()))
        return np.ones((1, 2), np.int32), np.zeros((1, 2)), None

    monkeypatch.setattr(jax, "jit", lambda _: run)
    sample = make_sampler(CONFIG.model, 2)
    lengths = (1, 5, 8, 257, 512, 513, 640)
    for length in lengths:
        sample({}, [np.ones(length, np.int32)], jax.random.key(1))
    assert shapes == [((1, size), [n]) for size, n in zip((1, 8, 8, 512, 512, 640, 640), lengths, strict=True)]


@pytest.mark.slow
def test_a_run_on_its_own_samples_resumes_bit_for_bit(tmp_path):
    mesh = make_mesh(MeshConfig(), ONE)
    with jax.set_mesh(mesh):
        program, engine = build(CONFIG, mesh), own_engine(CONFIG.model, 6, (2,))
        rounds = Rounds(group_size=4, updates=2, save_every=1)
        whole = train_online(program, str(tmp_path / "whole"), Evens(), engine, rounds)
        shutil.copytree(tmp_path / "whole", tmp_path / "parts")
        for step in (4, 6):
            shutil.rmtree(tmp_path / "parts" / "checkpoints" / str(step))
        rest = train_online(program, str(tmp_path / "parts"), Evens(), engine, rounds)
        other = dataclasses.replace(program, config=dataclasses.replace(CONFIG, seed=1))
        with pytest.raises(ConfigError, match="seed"):
            train_online(other, str(tmp_path / "parts"), Evens(), engine, rounds)
        for sizes in (
            Rounds(group_size=2, updates=2),
            Rounds(updates=1),
        ):  # other draws, or other numbers of rounds
            with pytest.raises(ConfigError, match=r"rounds.json: the run has .'group_size': 4, 'updates': 2.*, not"):
                train_online(program, str(tmp_path / "parts"), Evens(), engine, sizes)
        states = [state_of(program, epath.Path(tmp_path / name), 6) for name in ("whole", "parts")]
    assert len(whole) == 3
    assert rest == whole[1:]
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "parts" / "metrics.jsonl").read_bytes()
    assert len(list((tmp_path / "whole" / "tensorboard").iterdir())) == 1
    jax.tree.map(np.testing.assert_array_equal, *states)
    # The first step of a round uses the parameters and experts that sampled: only the order of sums differs.
    assert all(row["policy_ratio"] == pytest.approx(1, abs=1e-5) for row in whole)
    assert all(row["policy_extreme"] == 0 for row in whole)
    assert len({row["reward"] for row in whole}) > 1


def test_several_processes_are_refused(tmp_path, monkeypatch):
    """Each would place the whole batch as its share of the rows."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    program = without_training(monkeypatch)
    with pytest.raises(ConfigError, match="must run in one process, not in 2"):
        train_online(program, str(tmp_path / "run"), Evens(), Engine(None), Rounds())
    assert not (tmp_path / "run").exists()


def test_each_round_draws_new_prompts_and_samples(tmp_path, monkeypatch):
    drawn, keys, loaded = [], [], []

    class Seen(Evens):
        def prompts(self, rng, count):
            found = super().prompts(rng, count)
            drawn.append(b"".join(prompt.tobytes() for prompt in found))
            return found

    def sample(variables, prompts, key):
        keys.append(np.asarray(jax.random.key_data(key)).tobytes())
        assert [len(prompt) for prompt in prompts] == [2] * 4 + [3] * 4  # the samples of a prompt are consecutive
        return [ROLLOUT, dataclasses.replace(ROLLOUT, tokens=np.array([4, 2]))] * 4

    def load(variables, key):
        loaded.append(np.asarray(jax.random.key_data(key)).tobytes())
        return variables

    monkeypatch.setattr(online, "_updates", lambda program, state, *_: (state, {}))
    program = without_training(monkeypatch)
    rows = train_online(program, str(tmp_path / "0"), Seen(), Engine(sample, load), Rounds(updates=2, save_every=2))
    # Six steps, two per round, saved after every second round and at the end; rewards of 1/2 and 1 alternate.
    assert [call.args[0] for call in online.Checkpoints().save.call_args_list] == [4, 6]
    assert [row["reward"] for row in rows] == [0.75] * 3
    assert len(set(drawn)) == len(drawn) == 3
    assert len(set(keys)) == len(keys) == 3
    # Another seed draws others, and an engine has keys of its own to load the weights.
    program.config = dataclasses.replace(CONFIG, seed=1)
    train_online(program, str(tmp_path / "1"), Seen(), Engine(sample, load), Rounds(updates=2))
    assert len(set(drawn)) == 6
    assert len({*keys, *loaded}) == 12


def test_groups_have_the_samples_of_their_prompt_and_no_positive_log_probabilities():
    """A sum of rounded numbers may be slightly above 0."""
    samples = [Rollout(np.array([2 * i, 1]), np.array([1e-7, -2.0], np.float32), None) for i in range(4)]
    groups = make_groups([np.array([3]), np.array([4, 5])], samples, Evens(), 2)
    assert [group.prompt_tokens for group in groups] == [[3], [4, 5]]
    assert [[one.tokens[0] for one in group.completions] for group in groups] == [[0, 2], [4, 6]]
    assert all(one.log_probs == [0.0, -2.0] for group in groups for one in group.completions)


def test_every_skipped_update_of_a_round_is_counted(monkeypatch):
    monkeypatch.setattr(online, "place", lambda batch, mesh: batch)
    steps = iter([{"skipped": 0.0, "loss": 1.0}, {"skipped": 1.0, "loss": np.nan}, {"skipped": 1.0, "loss": np.nan}])
    program = SimpleNamespace(train_step=lambda state, _: (state + 1, next(steps)), mesh=None)
    objective = SimpleNamespace(batch=lambda examples: {})
    assert online._updates(program, 5, objective, [], 3) == (8, {"skipped": 2, "loss": 1.0})
    # The row is of the first step, whose parameters sampled.
    steps = iter([{"skipped": 0.0, "loss": 1.0}, {"skipped": 0.0, "loss": 3.0}])
    assert online._updates(program, 5, objective, [], 2) == (7, {"skipped": 0, "loss": 1.0})


class Odd(Evens):
    """A task with one method replaced."""

    def __init__(self, **methods):
        vars(self).update(methods)


def _fails(*_):
    raise KeyError("x")


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (Odd(prompts=lambda rng, count: [[1]]), "the task's prompts=1: must be 2"),
        (Odd(prompts=lambda rng, count: [[99]] * count), "tokens must be from 0 to 12"),
        (Odd(prompts=lambda rng, count: [[]] * count), "each of at least one token"),
        (Odd(prompts=_fails), "the task's prompts raises KeyError"),
        (Odd(reward=_fails), "the task's reward raises KeyError"),
        (Odd(reward=lambda *_: None), "the task's reward raises TypeError"),
        (Odd(reward=lambda *_: float("nan")), "the rollouts of a round: reward=nan: must be a finite number"),
    ],
)
def test_a_wrong_task_is_refused_in_one_sentence(tmp_path, monkeypatch, task, says):
    sampled = Engine(lambda variables, prompts, key: check_prompts(CONFIG.model, prompts) or [ROLLOUT] * len(prompts))
    program = without_training(monkeypatch)
    with pytest.raises(ConfigError, match=says):
        train_online(program, str(tmp_path), task, sampled, Rounds())


@pytest.mark.parametrize("rank", [0, slow_case(2)])
def test_a_run_begins_with_its_checkpoint(tmp_path, monkeypatch, rank):
    """The parameters that sample the first rollouts are those of ``start``; fresh adapters do not change them.

    The other run is trained further after a first start that failed before any checkpoint: adapters stay with the base
    that they began with, while without adapters the next start takes the newest checkpoint.
    """

    def load(variables, key):
        seen.append(variables)
        raise Interrupted

    def kept(directory, *arguments):
        retention.append(arguments)
        return Checkpoints(directory, *arguments)

    seen, retention, Checkpoints = [], [], online.Checkpoints
    monkeypatch.setattr(online, "Checkpoints", kept)
    parameters = random_parameters(CONFIG.model)[1]
    further = jax.tree.map(np.negative, parameters)
    write_run(tmp_path / "base", CONFIG, parameters)
    write_run(tmp_path / "later", CONFIG, further)
    train = dataclasses.replace(CONFIG.train, keep_every=80)
    start, reference = StartConfig(checkpoint=str(tmp_path / "base")), DistillConfig(str(tmp_path / "base"))
    config = dataclasses.replace(CONFIG, start=start, lora=LoraConfig(rank=rank), train=train)
    config = dataclasses.replace(config, distill=reference, policy=dataclasses.replace(CONFIG.policy, kl=0.1))
    with jax.set_mesh(mesh := make_mesh(MeshConfig(), ONE)):
        program = build(config, mesh, read_teacher(config, mesh))
        for _ in range(2):
            with pytest.raises(Interrupted):
                train_online(program, str(tmp_path / "run"), Evens(), Engine(None, load), Rounds())
            source, target = (tmp_path / name / "checkpoints" / step for name, step in (("later", "0"), ("base", "9")))
            shutil.copytree(source, target, dirs_exist_ok=True)
    for variables, expected in zip(seen, (parameters, parameters if rank else further), strict=True):
        jax.tree.map(np.testing.assert_array_equal, variables, expected)
    assert set(retention) == {(3, 80)}
    assert (tmp_path / "run" / "base.json").exists() == bool(rank)
    assert pinned_steps(config, epath.Path(tmp_path / "run")).teacher == 0


def test_sizes_that_do_not_divide_are_refused(tmp_path):
    mesh = make_mesh(MeshConfig(), ONE)
    with jax.set_mesh(mesh):
        program = build(CONFIG, mesh)
        for rounds in (Rounds(group_size=3), Rounds(updates=4)):
            with pytest.raises(ConfigError, match="must be divisible by"):
                train_online(program, str(tmp_path), Evens(), own_engine(CONFIG.model, 4), rounds)
        for sizes in ({"group_size": 1}, {"updates": 0}, {"save_every": 0}, {"updates": 1.5}):
            with pytest.raises(ConfigError, match=f"rounds.{next(iter(sizes))}"):
                Rounds(**sizes)
    assert not list(tmp_path.iterdir())


def test_a_single_step_is_timed_only_on_texts():
    """The random row for --saves, which times the run itself, has K different experts for each token and layer."""
    experts = random_rows(CONFIG)[EXPERTS_KEY]
    assert experts.shape == (8, 9, CONFIG.model.num_layers, 2)
    assert (experts[..., 0] != experts[..., 1]).all()
    assert set(experts.flat) == set(range(5))
    taught = Config(distill=DistillConfig("other", 0.5))
    for config, says in ((CONFIG, "data.objective='policy': a step is timed"), (taught, "distill.teacher='other'")):
        with pytest.raises(ConfigError, match=says):
            refuse_more_than_the_model(config)
    refuse_more_than_the_model(Config())
