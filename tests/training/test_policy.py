"""Reinforcement learning from rollouts: advantages, clipped losses and weights by hand; replay; files; a run."""

import base64
import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from etils import epath
from flax import nnx

from moe.config import (
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    PolicyConfig,
    TrainConfig,
)
from moe.data import folders, pipeline, rollouts
from moe.data.engines import EngineName
from moe.data.tokenizer import train_tokenizer
from moe.data.tokenizer_files import find_tokenizer
from moe.models.sampling import make_sampler
from moe.objectives import sampling
from moe.objectives.grpo import divergence, token_terms, token_weights
from moe.objectives.policy import Policy, advantages
from moe.parallel.mesh import make_mesh
from moe.system.sealed_folder import unsealed
from moe.training import warm_start
from moe.training.batches import forward, place
from moe.training.losses import token_cross_entropy
from moe.training.step import build
from moe.training.teacher import read_teacher
from moe.training.train import train
from moe.training.update import _noise_key
from tests.data.test_chat import EXPECTED, HERE
from tests.helpers import random_parameters, random_state, slow_case, tiny_model
from tests.run_helpers import ONE, compile_once, rows, state_of, tiny, write_run


def test_advantages_of_four_completions_by_hand():
    """Rewards 1, 0, 0, 1: mean 1/2, variance 4 · 1/4 / 3 = 1/3, so ±1/2 · √3."""
    rewards = np.array([1.0, 0.0, 0.0, 1.0])
    by_hand = np.sqrt(3) / 2 * np.array([1, -1, -1, 1])
    np.testing.assert_allclose(advantages(rewards, divide=True), by_hand, rtol=1e-5)
    np.testing.assert_allclose(advantages(rewards, divide=False), [0.5, -0.5, -0.5, 0.5])
    assert not advantages(np.full(4, 0.3), divide=True).any()


def test_losses_and_gradients_of_tokens_by_hand():
    """Ratios 3/2, 3/2, 1/2, 1/2 with advantages 2, −2, 2, −2, clipped to [0.8, 1.28].

    −min(3, 2.56), −min(−3, −2.56), −min(1, 1.6), −min(−1, −1.6). The first and the last are clipped and have no
    gradient; that of the others is −r A.
    """
    settings = PolicyConfig(clip_low=0.2, clip_high=0.28, kl=0.5)
    log_probs = jnp.log(jnp.array([[0.3, 0.3, 0.1, 0.1]]))
    old = jnp.full((1, 4), jnp.log(0.2))
    values = jnp.array([[2.0, -2.0, 2.0, -2.0]])
    terms = token_terms(settings, log_probs, old, values, None)
    np.testing.assert_allclose(terms["loss"], [[-2.56, 3.0, -1.0, 1.6]], rtol=1e-5)
    np.testing.assert_allclose(terms["ratio"], [[1.5, 1.5, 0.5, 0.5]], rtol=1e-5)
    assert terms["clipped"].tolist() == [[1, 0, 0, 1]]
    # KL(π_old ‖ π) by samples of π_old: r − ln r − 1 with r = 3/2 or 1/2.
    np.testing.assert_allclose(terms["old_kl"], [[0.5 - np.log(1.5)] * 2 + [np.log(2) - 0.5] * 2], rtol=1e-5)
    assert not terms["extreme"].any()
    assert token_terms(settings, log_probs - 0.1, old, values, None)["extreme"].tolist() == [[0, 0, 1, 1]]
    slope = jax.grad(lambda x: token_terms(settings, x, old, values, None)["loss"].sum())(log_probs)
    np.testing.assert_allclose(slope, [[0, 3.0, -1.0, 0]], rtol=1e-5)
    # ρ = π_ref/π = 2 for the third: 2 − ln 2 − 1; the slope of the estimate is 1 − ρ.
    reference = log_probs.at[0, 2].add(jnp.log(2.0))
    terms = token_terms(settings, log_probs, old, values, reference)
    np.testing.assert_allclose(terms["kl"], [[0, 0, 1 - np.log(2), 0]], atol=1e-6)
    np.testing.assert_allclose(terms["loss"][0, 2], -1 + 0.5 * (1 - np.log(2)), rtol=1e-5)
    slope = jax.grad(lambda x: divergence(x, reference).sum())(log_probs)
    np.testing.assert_allclose(slope, [[0, 0, -1, 0]], atol=1e-5)
    # Logarithms of ratios are bounded by 20, so that no ratio overflows.
    far, near, down = jnp.full((1, 4), -200.0), jnp.zeros((1, 4)), jnp.full((1, 4), -1.0)
    loss = token_terms(settings, near, far, down, None)["loss"]
    np.testing.assert_allclose(loss, np.full((1, 4), np.exp(20)), rtol=1e-5)
    np.testing.assert_allclose(divergence(far, near), np.full((1, 4), np.exp(20) - 21), rtol=1e-5)
    np.testing.assert_allclose(divergence(near, far), np.full((1, 4), 19.0), rtol=1e-5)  # e^-20 + 20 - 1


def test_the_divergence_of_close_policies_is_not_rounding():
    """e^x - x - 1 = x²/2 + x³/6 + …, of logarithms of ratios of 0.001 and 0.0001, and never negative."""
    x = jnp.array([[1e-3, -1e-3, 1e-4, -1e-4]])
    want = [[5.0016671e-7, 4.9983338e-7, 5.000167e-9, 4.999833e-9]]
    np.testing.assert_allclose(divergence(jnp.zeros((1, 4)), x), want, rtol=1e-3)
    many = jnp.linspace(-1e-3, 1e-3, 1001)[None]
    assert (divergence(jnp.zeros_like(many), many) >= 0).all()


def test_means_over_tokens_completions_and_a_constant():
    """Completions of 1 and of 3 tokens in one row, and one of 2 in another."""
    targets = jnp.array([[-1, 5, -1, 5, 5, 5], [5, 5, -1, -1, -1, -1]])
    segments = jnp.array([[1, 1, 2, 2, 2, 2], [1, 1, 0, 0, 0, 0]])
    weights = token_weights(targets >= 0, segments, per_completion=True)
    np.testing.assert_allclose(weights, [[0, 1, 0, 1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0, 0, 0, 0]])
    np.testing.assert_array_equal(token_weights(targets >= 0, segments, per_completion=False), targets >= 0)
    # At ratios of 1 the loss of a token is minus its completion's advantage: 1, 2 and 4.
    advantages = jnp.array([[0, 1, 0, 2, 2, 2], [4, 4, 0, 0, 0, 0]], jnp.float32)
    old = jnp.where(targets >= 0, -jnp.log(6.0), 0.0)
    batch = {"targets": targets, "segment_ids": segments, "log_probs": old, "advantages": advantages}
    model, output = SimpleNamespace(output_matrix=lambda: jnp.eye(6)), SimpleNamespace(hidden=jnp.zeros((2, 6, 6)))
    config = SimpleNamespace(data=SimpleNamespace(sequence_length=8))
    for mean, count, loss in (
        ("tokens", 6, 1 + 3 * 2 + 2 * 4),
        ("completions", 3, 1 + 2 + 4),
        ("constant", 3, (1 + 3 * 2 + 2 * 4) / 8),
    ):
        objective = Policy(policy=PolicyConfig(mean=mean))
        assert objective.count(batch) == count
        with jax.set_mesh(make_mesh(MeshConfig(), ONE)):
            found = jax.jit(lambda batch, of=objective: vars(of.sums(config, model, output, batch, None)))(batch)
        np.testing.assert_allclose(found["loss"], -loss, rtol=1e-5)
        np.testing.assert_allclose(found["terms"]["policy_ratio"], count, rtol=1e-5)  # a mean of 1


def group(rng, engine: EngineName | None = "vllm", size=3, vocab=48, layers=3):
    """A group of completions of lengths 2, 3, ... with random experts (K = 2 of 5) in MoE layers 1 and 2 of three."""
    prompt = rng.integers(1, vocab, 3).tolist()
    completions = []
    for i in range(size):
        tokens = rng.integers(1, vocab, 2 + i).tolist()
        experts = rng.permuted(np.tile(np.arange(5), (4 + i, layers, 1)), axis=-1)[..., :2]
        completions.append(
            {"tokens": tokens, "log_probs": [-2.5] * len(tokens), "reward": float(i), "experts": experts}
        )
    return {"prompt_tokens": prompt, "completions": [_laid_out(one, engine) for one in completions]} | (
        {"engine": engine} if engine else {}
    )


def _laid_out(completion, engine):
    experts = completion.pop("experts")
    if engine is None:
        return completion
    laid_out = {
        "vllm": lambda: experts.tolist(),
        "sglang": lambda: base64.b64encode(experts.astype("<i4").tobytes()).decode(),
        "tensorrt_llm": lambda: experts[:, 1:].tolist(),
        "tunix": lambda: np.pad(experts.swapaxes(0, 1), ((0, 0), (0, 4), (0, 0)), constant_values=-1).tolist(),
    }
    return completion | {"experts": laid_out[engine]()}


@pytest.fixture(scope="module")
def model():
    """A model with a dense layer and two MoE layers."""
    sizes = {"num_experts": 5, "experts_per_token": 2, "layers": (1, 2)}
    room = {"dispatch": "einsum", "capacity_factor": 2.5, "eval_capacity_factor": 2.5}  # for every token
    config = tiny_model(num_layers=3, gate="mixtral", **sizes, **room)
    return nnx.merge(*random_parameters(config))


def examples(model, engine="vllm", **settings):
    reader = Policy(model=model.config, policy=PolicyConfig(**settings), length=16)
    return reader.completions(rollouts.document(group(np.random.default_rng(0), engine)))


@pytest.mark.parametrize("engine", EngineName.__args__)
def test_an_example_by_hand_in_every_layout(model, engine):
    """A prompt of three tokens and a completion of two: targets begin at the prompt's last token."""
    one = group(np.random.default_rng(0))
    first, *_ = examples(model, engine)
    ids = one["prompt_tokens"] + one["completions"][0]["tokens"]
    assert first["tokens"].tolist() == ids[:-1]
    assert first["targets"].tolist() == [-1, -1, *ids[3:]]
    assert first["log_probs"].tolist() == [0, 0, -2.5, -2.5]
    np.testing.assert_allclose(first["advantages"], [0, 0, -1, -1], rtol=1e-5)  # rewards 0, 1, 2: deviation 1
    np.testing.assert_array_equal(first["experts"], np.array(one["completions"][0]["experts"])[:, 1:])
    # The longest completion has seven tokens with its prompt, of which six are read: it fits a row of six.
    reader = Policy(model=model.config, length=6)
    assert len(reader.completions(rollouts.document(group(np.random.default_rng(0), engine)))) == 3


def _batch(model, mesh, **settings):
    return place(Policy(length=8).batch(examples(model, **settings)), mesh)


def test_replay_makes_the_ratio_exactly_one(model):
    """The rollout used other experts than our router chooses, as with noise: without replay the ratios differ from
    one."""
    mesh = make_mesh(MeshConfig(), ONE)
    with jax.set_mesh(mesh):
        batch = _batch(model, mesh)

        @nnx.jit
        def score(model, batch):
            return -token_cross_entropy(forward(model, batch).hidden, model.output_matrix(), batch["targets"])

        old = score(model, batch)
        present = batch["targets"] >= 0
        again, plain = score(model, batch), score(model, {k: v for k, v in batch.items() if k != "experts"})
        ratios = [token_terms(PolicyConfig(), now, old, old, None)["ratio"][present] for now in (again, plain)]
    np.testing.assert_array_equal(ratios[0], 1)
    assert np.abs(ratios[1] - 1).max() > 0.01


def test_the_policy_runs_without_routing_noise():
    parts = SimpleNamespace(objective=Policy())
    assert _noise_key(parts, jax.random.key(0)) is None


@pytest.mark.parametrize("mean", [slow_case("tokens"), "completions", slow_case("constant")])
def test_gradients_are_those_of_a_loop_over_tokens(rng, mean):
    """Completions of 2 and 3 tokens in one row, and of 4 in another; some ratios are clipped."""
    settings = PolicyConfig(mean=mean, clip_low=0.1, clip_high=0.15, kl=0.3)
    objective, config = Policy(policy=settings), SimpleNamespace(data=SimpleNamespace(sequence_length=8))
    targets = np.array([[-1, 3, 1, -1, 2, 4, 0, -1], [-1, -1, 1, 2, 3, 4, -1, -1]])
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 0, 0]])
    logits, reference = (jnp.asarray(rng.normal(size=(2, 8, 5)), jnp.float32) for _ in range(2))
    here = [(b, t) for b in range(2) for t in range(8) if targets[b, t] >= 0]
    values = {(0, 1): 0.7, (0, 2): -1.3, (1, 1): 0.4}  # of each completion, by row and segment
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    old, advantages = np.zeros((2, 8), np.float32), np.zeros((2, 8), np.float32)
    for number, (b, t) in enumerate(here):
        old[b, t] = log_probs[b, t, targets[b, t]] + 0.3 * (-1) ** number * (number % 3)
        advantages[b, t] = values[b, segments[b, t]]
    batch = {"targets": targets, "segment_ids": segments, "log_probs": old, "advantages": advantages}
    batch = {key: jnp.asarray(array) for key, array in batch.items()}
    model = SimpleNamespace(output_matrix=lambda: jnp.eye(5))

    def ours(logits):
        outputs = (SimpleNamespace(hidden=hidden) for hidden in (logits, reference))
        output, other = outputs
        return objective.sums(config, model, output, batch, (model, other)).loss / objective.count(batch)

    def looped(logits):
        total = 0.0
        for b, t in here:
            v, segment = targets[b, t], segments[b, t]
            of_token, of_reference = (jax.nn.log_softmax(of[b, t])[v] for of in (logits, reference))
            ratio, a = jnp.exp(of_token - old[b, t]), values[b, segment]
            loss = -jnp.minimum(ratio * a, jnp.clip(ratio, 0.9, 1.15) * a)
            loss += 0.3 * (jnp.exp(of_reference - of_token) - (of_reference - of_token) - 1)
            size = {(0, 1): 2, (0, 2): 3, (1, 1): 4}[b, segment]
            total += loss / {"tokens": 9, "completions": 3 * size, "constant": 3 * 8}[mean]
        return total

    with jax.set_mesh(make_mesh(MeshConfig(), ONE)):
        value, gradient = jax.jit(jax.value_and_grad(ours))(logits)
    expected, slope = jax.jit(jax.value_and_grad(looped))(logits)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, atol=1e-6)
    terms = token_terms(settings, *(jnp.asarray(x) for x in (old + 0.5, old, advantages)), None)
    assert 0 < terms["clipped"].sum() < 9


@pytest.mark.slow
def test_replay_on_eight_devices_equals_one_device():
    """Two steps in two microbatches, rows and parameters over fsdp and experts over expert."""
    sizes = {"num_experts": 6, "experts_per_token": 2, "dispatch": "dropless", "layers": (1, 2)}
    found = []
    for sizes_of_mesh, devices in ((MeshConfig(), ONE), (MeshConfig(data=1, fsdp=4, expert=2), jax.devices())):
        config = Config(
            model=tiny_model(num_layers=3, gate="mixtral", **sizes),
            data=DataConfig(sequence_length=16, objective="policy"),
            train=TrainConfig(batch_size=16, num_steps=9, accumulation_steps=2),
            mesh=sizes_of_mesh,
            optimizer=OptimizerConfig(warmup_steps=1),
            policy=PolicyConfig(mean="completions"),
        )
        mesh, rng = make_mesh(config.mesh, devices), np.random.default_rng(0)
        reader = Policy(model=config.model, policy=config.policy, length=16)
        parts = [one for _ in range(6) for one in reader.completions(rollouts.document(group(rng)))][:16]
        with jax.set_mesh(mesh):
            program = build(config, mesh)
            state, batch = program.init(), place(reader.batch(parts), mesh)
            for _ in range(2):
                state, metrics = program.train_step(state, batch)
                found.append((metrics.loss, metrics.gradient_norm, *metrics.terms.values()))
    np.testing.assert_allclose(found[:2], found[2:], rtol=1e-5)


# --- Files and runs --------------------------------------------------------------------------------------------------
MODEL = {
    "model.num_layers": 1, "model.moe.gate": "mixtral", "model.moe.num_experts": 5, "model.moe.dispatch": "dropless",
}  # fmt: skip


def write_lines(folder, lines):
    """Write groups as JSON lines into a folder's only domain; returns the file."""
    (folder / "sums").mkdir(parents=True)
    path = folder / "sums" / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def open_all(folder):
    """Training split and held-out split of such a folder."""
    return folders.open_folder(str(folder), epath.Path(folder.parent), lambda _: None)[0]["sums"]


def check_all(folder, reader):
    for split in open_all(folder):
        reader.check_documents(split)


@pytest.fixture(scope="module")
def place_of_run(tmp_path_factory):
    return tmp_path_factory.mktemp("policy")


@pytest.fixture(scope="module")
def start(place_of_run):
    """Settings of a run on 60 groups that starts from a random model with a tokenizer."""
    rng = np.random.default_rng(0)
    write_lines(place_of_run / "text", [group(rng, layers=1) for _ in range(60)])
    reference = epath.Path(place_of_run / "start")
    reference.mkdir()
    (reference / "tokenizer.json").write_bytes((HERE / "tokenizer.json").read_bytes())
    (reference / "tokenizer_config.json").write_text(json.dumps(EXPECTED["llama3"]["tokenizer_config"]))
    settings = MODEL | {
        "data.dataset": str(place_of_run / "text"), "data.sequence_length": 16, "data.objective": "policy",
        "policy.kl": 0.1, "distill.teacher": str(reference), "optimizer.learning_rate": 1e-2,
        "train.num_steps": 4, "train.batch_size": 4, "train.eval_every": 4, "train.log_every": 1,
        "train.accumulation_steps": 2, "train.sample_tokens": 0,
    }  # fmt: skip
    config = tiny(place_of_run / "cache", **settings | {"data.objective": "causal"})
    with jax.set_mesh(mesh := make_mesh(config.mesh, ONE)):
        write_run(reference, config, random_state(build(config, mesh)).parameters)
    return settings | {"start.checkpoint": str(reference)}


def test_a_run_from_a_file_learns_and_resumes_bit_for_bit(start, place_of_run, tmp_path, capsys):
    program = compile_once(build)
    config = tiny(place_of_run / "cache", **start)
    train(config, str(tmp_path / "run"), ONE, make_program=program)
    said = capsys.readouterr().out
    assert "objective: policy (GRPO), mean over tokens, ratios clipped to [0.8, 1.2], KL 0.1 against" in said
    assert "experts of the rollouts" in said
    first, *_, last = rows(tmp_path / "run", "train")
    assert first["policy_kl"] == 0  # the policy is the reference, with the same experts
    assert last["policy_kl"] > 0
    expected = state_of(program(config, None), tmp_path / "run", 4)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (tmp_path / "run" / "report.txt").unlink()
    epath.Path(tmp_path / "run" / "checkpoints" / "4").rmtree()
    train(config, str(tmp_path / "run"), ONE, make_program=program)
    jax.tree.map(np.testing.assert_array_equal, state_of(program(config, None), tmp_path / "run", 4), expected)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


def test_a_reference_drops_no_tokens(start, place_of_run, tmp_path):
    reference = tmp_path / "reference"
    shutil.copytree(start["distill.teacher"], reference)
    tree = unsealed((reference / "config.json").read_text())
    tree["model"]["moe"] |= {
        "dispatch": "gather",
        "capacity": {"train": 0.5, "eval": 0.5, "fixed": 0},
        "group_size": 32,
    }
    (reference / "config.json").write_text(json.dumps(tree))
    config = tiny(place_of_run / "cache", **start | {"distill.teacher": str(reference)})
    model, _ = read_teacher(config, make_mesh(config.mesh, ONE))
    assert (model.moe.dispatch, model.moe.group_size) == ("gather", 0)
    assert model.moe.capacity.eval == model.moe.num_experts / model.moe.experts_per_token  # room for every token


def test_parquet_tables_are_read_as_the_same_rollouts(tmp_path):
    rng = np.random.default_rng(0)
    lines = [group(rng) for _ in range(60)]
    write_lines(tmp_path / "text", lines)
    (tmp_path / "tables" / "sums").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), tmp_path / "tables" / "sums" / "a.parquet")
    found = []
    for folder in ("text", "tables"):
        found.append(sorted(text for split in open_all(tmp_path / folder) for text in split))
    assert found[0] == found[1]
    assert [rollouts.read(text).engine for text in found[0]] == ["vllm"] * 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g["completions"].pop() and g["completions"].pop(), "completions=.*: .*at least 2 items"),
        (lambda g: g["completions"][1].pop("reward"), "has no completions.1.reward"),
        (lambda g: g["completions"][1].update(reward=float("inf")), r"completions.1.reward=inf: .*finite"),
        (lambda g: g["completions"][1].update(tokens=[]), r"completions.1.tokens=\[\]: .*at least 1 item"),
        (
            lambda g: g["completions"][1]["log_probs"].pop(),
            "completions.1.log_probs=.*: must be one for each of the 3 tokens, and there are 2",
        ),
        (lambda g: g["completions"][2]["log_probs"].__setitem__(0, 0.5), "completions.2.log_probs.0=0.5: .*less"),
        (lambda g: g["prompt_tokens"].append("a"), "prompt_tokens.3='a': must be an integer"),
        (lambda g: g.pop("engine"), "completions.0.experts is given, and engine is not"),
        (lambda g: g.update(engine="vlm"), "engine='vlm': must be 'vllm', 'sglang'"),
        (lambda g: g["completions"][0].pop("experts"), "completions.0.experts has none, and engine is set"),
        (lambda g: g["completions"][1]["experts"].pop(), "completions.1.experts: token 4 of 5 has none"),
        (lambda g: g["completions"][1]["experts"][2].pop(), "completions.1.experts: record 0 has lists of different"),
        (lambda g: g["completions"][1]["experts"][0][1].__setitem__(0, 7), "completions.1.experts: .*expert 7"),
        (lambda g: g["prompt_tokens"].extend([1] * 13), "completions.0.tokens: is 18 tokens .*, and .* most 17"),
        (lambda g: g["completions"][1]["experts"][0][1].__setitem__(0, 2**32 + 1), r"expert 4294967297, beyond"),
        (lambda g: g["completions"][1]["experts"][0][1].__setitem__(0, True), r"experts 0.1.0=True: must be an int"),
        (lambda g: g["completions"][1].update(reward=1e300), r"completions.1.reward=1e\+300: must be less than"),
        (lambda g: g["completions"][1]["log_probs"].__setitem__(0, -1e39), r"log_probs.0=-1e\+39: must be gr"),
        (lambda g: g.update(completions="[" * 9**5), "completions: is text that is not JSON"),
        (lambda g: g.update(completions='[{"reward": 1, "reward": 2}]'), "completions: .*two values of 'reward'"),
        (lambda g: g["prompt_tokens"].append(48), "completions.0.tokens: token 48 must be below model.vocab_size=48"),
    ],
)  # fmt: skip
def test_bad_rollouts_are_refused_by_line_and_field(tmp_path, model, change, message):
    rng = np.random.default_rng(0)
    lines = [group(rng) for _ in range(12)]
    change(lines[6])
    write_lines(tmp_path / "text", lines)
    reader = Policy(model=model.config, length=16)
    with pytest.raises(ConfigError, match=rf"a.jsonl, line 7: .*{message}"):
        check_all(tmp_path / "text", reader)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_of_single_completions_are_refused(tmp_path, model, suffix):
    rows = [{"group": i, "prompt_tokens": [5, 9], **completion} for i in range(4) for completion in _flat(i)]
    write_lines(tmp_path / "text", rows)
    if suffix == "parquet":
        (tmp_path / "text" / "sums" / "a.jsonl").unlink()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "text" / "sums" / "a.parquet")
    reader = Policy(model=model.config, length=16)
    with pytest.raises(ConfigError, match=rf"a.{suffix}, .* holds one completion; .* rows of each group id"):
        check_all(tmp_path / "text", reader)


def _flat(number):
    return [{"tokens": [number + 1, 2], "log_probs": [-0.5, -0.1], "reward": float(reward)} for reward in (0, 1)]


def test_recorded_experts_are_refused_for_a_model_without_moe_layers():
    dense = Policy(model=tiny_model(vocab_size=48, gate="none"), length=16)
    text = rollouts.document(group(np.random.default_rng(0)))
    with pytest.raises(ConfigError, match=r"engine='vllm': belongs to a model with MoE layers; set policy.replay"):
        dense.completions(text)
    assert len(dataclasses.replace(dense, policy=PolicyConfig(replay=False)).completions(text)) == 3


def test_impossible_settings_of_a_policy_run_are_refused(start, place_of_run):
    for changes, message in (
        ({"policy.kl": 0.0}, r"distill\.teacher='.*': must name the reference model with policy\.kl above 0"),
        ({"model.moe.dispatch": "einsum"}, r"model\.moe\.dispatch='einsum': must be 'dropless' with data\.objective"),
        ({"model.moe.gate": "soft_moe", "model.moe.accept_future_leak": True}, r"policy\.replay=True|dispatch"),
        ({"model.moe.num_experts": 2**15 + 1}, r"num_experts=32769: must be at most 32768 .* policy\.replay=False"),
        *(
            ({"model.moe.gate": gate, "model.moe.accept_future_leak": True}, f"'{gate}', whose tokens have any number")
            for gate in ("remoe", "expert_choice", "expert_threshold")
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny(place_of_run / "cache", **start | changes)
    dense = tiny(place_of_run / "cache", **start | {"model.moe.gate": "none"})
    assert "experts" not in build(dense, make_mesh(dense.mesh, ONE)).about
    texts = tiny(place_of_run / "cache", **start | {"data.objective": "causal"})
    with pytest.raises(ConfigError, match=r"kl=0.1.*: is read only with data.objective='policy'"):
        warm_start.check(texts)
    with pytest.raises(ConfigError, match="holds rollouts"):
        pipeline.prepare_run(texts, tokenizer=find_tokenizer(start["start.checkpoint"]), progress=lambda _: None)


def test_sampled_and_scored_prompts_are_rollouts_that_train(model, tmp_path, monkeypatch):
    """The written file is read as a dataset of this model: log-probabilities and experts of every sampled token."""
    tokens = train_tokenizer(["the cat sat on the mat " * 40], 290)
    texts = ["the cat", "on"]
    prompts = [tokens.encode(text).tolist() for text in texts]
    seen = []

    def reward(prompt, completion):
        seen.append((prompt, completion))
        return len(completion)

    model = nnx.merge(*random_parameters(dataclasses.replace(model.config, vocab_size=290)))
    sampler = make_sampler(model.config, 3, (tokens.eos_id,))
    task = sampling.TextTask(tokens, reward, dict(zip(map(tuple, prompts), texts, strict=True)))
    variables = nnx.to_pure_dict(nnx.state(model))
    groups = list(sampling.sample_groups(sampler, variables, prompts, task, samples=2, seed=5))
    sampling.write_groups(str(tmp_path / "rollouts" / "a.jsonl"), groups)
    assert [prompt for prompt, _ in seen] == ["the cat"] * 2 + ["on"] * 2
    reader = Policy(model=model.config, length=16)
    lines = (tmp_path / "rollouts" / "a.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for line, prompt in zip(lines, prompts, strict=True):
        fields = json.loads(line)
        for one, example in zip(fields["completions"], reader.completions(rollouts.document(fields)), strict=True):
            assert example["tokens"].tolist() == (prompt + one["tokens"])[:-1]
            np.testing.assert_allclose(example["log_probs"][len(prompt) - 1 :], one["log_probs"], rtol=1e-6)
            assert example["experts"].shape == (len(example["tokens"]), 2, 2)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n\n{"text": "on"}\n')
    with pytest.raises(ConfigError, match=r'line 3: must be an object with a string "prompt"'):
        sampling.read_prompts(str(tmp_path / "prompts.jsonl"))
    (tmp_path / "prompts.txt").write_text("the cat\non\n")
    assert sampling.read_prompts(str(tmp_path / "prompts.txt")) == texts
    with pytest.raises(ConfigError, match=r"must end in \.jsonl"):
        sampling.check(model.config, "rollouts.json", 2)
