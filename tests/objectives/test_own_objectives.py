"""Objectives from a user's module, docs/own_objectives.md: data.objective=module:object."""

import dataclasses
import importlib
import itertools
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import (
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
    command_line,
    to_dict,
)
from moe.config.objectives import OBJECTIVES, find_objective
from moe.config.parse import from_config_dict, from_workdir_dict
from moe.config.user_code import user_code
from moe.data import pipeline, preparation
from moe.lab import identity
from moe.layers.call import Report
from moe.models import pipeline as stages
from moe.objectives.encoder_decoder import EncoderDecoder
from moe.parallel.mesh import make_mesh
from moe.training import evaluation
from moe.training.losses import Sums
from moe.training.step import build
from moe.training.train import train
from tests import run_helpers
from tests.data.test_objectives import LetterTokenizer
from tests.tiny_text import build as build_text

ROOT = Path(__file__).resolve().parents[2]
NAME = "my_objective:FillInTheMiddle"


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """The module my_objective of the page."""
    folder = tmp_path_factory.mktemp("mine")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_objectives.md").read_text(), re.DOTALL)
    (folder / "my_objective.py").write_text(block)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("my_objective")
    sys.path.remove(str(folder))
    del sys.modules["my_objective"]


class Fixed:
    """A random generator that cuts at 2 and 5, and draws zero."""

    def integers(self, low, high, size):
        return np.array([5, 2])

    def random(self):
        return 0.0


def _letters(*texts):
    return preparation.Prepared(LetterTokenizer(), ("x",), {"x": list(texts)}, {"x": list(texts)})


def test_a_name_gives_the_objective(guide):
    assert find_objective(NAME) == guide.FillInTheMiddle(name=NAME)
    assert find_objective("my_objective:HEAVY").weight == 2
    config = Config(data=DataConfig(objective=NAME))
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))).objective == config.objective
    _, texts = command_line.split([f"--config.data.objective={NAME}"])
    settings = command_line.layers(str(ROOT / "configs" / "base.py"), texts)
    assert command_line.build_layers(*settings).objective == config.objective


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_objective:FillTheMiddle", "has no 'FillTheMiddle'; did you mean 'FillInTheMiddle'"),
        ("my_objective:jnp", "data.objective='my_objective:jnp': must be an Objective, not module"),
        ("fill_in_the_middle", "must be one of causal, .*, or module:object"),
    ],
)
def test_what_is_no_objective_is_refused(guide, name, message):
    with pytest.raises(ConfigError, match=message):
        Config(data=DataConfig(objective=name))


def test_a_workdir_imports_no_module_that_the_user_did_not_name():
    tree = json.loads(json.dumps(to_dict(Config())))
    tree["data"]["objective"] = "their_objective:Theirs"
    with pytest.raises(ConfigError, match=r"data.objective='their_objective:Theirs' is code .* --allow_module=their_"):
        from_workdir_dict(tree)


def test_settings_that_it_does_not_support_are_refused(guide):
    data = DataConfig(objective=NAME)
    for changes in ({"encoder_layers": 1}, {"prediction_layers": 1}):
        with pytest.raises(ConfigError, match=re.escape(f"'{NAME}'")):
            Config(model=ModelConfig(**changes), data=data)
    with pytest.raises(ConfigError, match=r"data\.chat_template='x': must be empty"):
        Config(data=dataclasses.replace(data, chat_template="x"))
    model, steps = ModelConfig(num_layers=4, scan_layers=True), TrainConfig(accumulation_steps=2)
    config = Config(model=model, data=data, train=steps)
    with pytest.raises(ConfigError, match=f"data.objective='{NAME}': must not be '{NAME}' with mesh.pipeline=2"):
        stages.check(config, {"pipeline": 2})


def test_a_row_by_hand(guide):
    """a b | c d e | f: sentinels 31, 30, 29 (V = 29); prefix "ab", suffix "f", then the middle "cde" and eos."""
    objective = guide.FillInTheMiddle(name=NAME)
    data = DataConfig(objective=NAME, sequence_length=12, heldout_rows=1)
    (example,) = objective.examples("abcdef", Fixed(), data, LetterTokenizer())
    assert example["tokens"].tolist() == [31, 3, 4, 30, 8, 29, 5, 6, 7]
    assert example["targets"].tolist() == [3, 4, 30, 8, 29, 5, 6, 7, 2]
    assert example["middle"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    packed = {name: np.pad(values, (0, 3)) for name, values in example.items()}
    packed |= {"tokens_segment_ids": np.array([1] * 9 + [0] * 3), "tokens_positions": np.array([*range(9), 0, 0, 0])}
    row = objective.row(packed, 0)
    assert row["targets"].tolist() == [3, 4, 30, 8, 29, 5, 6, 7, 2, -1, -1, -1]
    assert row["middle"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0]
    assert objective.ids(LetterTokenizer()) == 32
    # 6 of 12 tokens may be a prompt of ... more than 16: none.
    assert objective.prompt("abcdef", data, LetterTokenizer()) is None


def test_a_loss_by_hand(guide):
    """Of four even logits every target costs ln 4; one of three targets is in the middle, which counts twice."""
    objective = guide.FillInTheMiddle(weight=2.0)
    batch = {"targets": jnp.array([[1, 2, 3, -1]]), "middle": jnp.array([[0, 0, 1, 0]])}
    model, output = SimpleNamespace(output_matrix=lambda: jnp.eye(4)), SimpleNamespace(hidden=jnp.zeros((1, 4, 4)))
    output.report = Report()
    with jax.set_mesh(make_mesh(MeshConfig(), run_helpers.ONE)):
        found = jax.jit(lambda batch: vars(objective.sums(Config(), model, output, batch, None)))(batch)
    assert objective.count(batch) == 3
    np.testing.assert_allclose(found["loss"], 4 * np.log(4), rtol=1e-6)
    np.testing.assert_allclose(found["cross_entropy"], 3 * np.log(4), rtol=1e-6)
    np.testing.assert_allclose(found["terms"]["middle"], np.log(4), rtol=1e-6)


def test_it_reads_trains_evaluates_reports_and_resumes(guide, tmp_path, capsys):
    directory = build_text(tmp_path / "data")
    settings = run_helpers.SETTINGS | {
        "model.vocab_size": 403, "data.objective": NAME, "data.sequence_length": 48, "train.num_steps": 4,
        "train.eval_every": 4, "train.sample_tokens": 4, "model.moe.gate": "none",
    }  # fmt: skip
    config = run_helpers.tiny(directory, **settings)
    workdir, programs = tmp_path / "run", run_helpers.compile_once()
    train(config, str(workdir), run_helpers.ONE, make_program=programs)
    assert "objective: fill in the middle of 50% of the pieces" in capsys.readouterr().out
    rows = run_helpers.rows(workdir, "train")
    assert all(0 < row["middle"] < row["cross_entropy"] for row in rows)
    assert "<extra_id_2>" in (workdir / "report.txt").read_text()
    kept = {name: (workdir / name).read_bytes() for name in ("metrics.jsonl", "report.txt")}
    shutil.rmtree(workdir / "checkpoints" / "4")
    (workdir / "report.txt").unlink()
    train(config, str(workdir), run_helpers.ONE, make_program=programs)  # from step 2
    assert {name: (workdir / name).read_bytes() for name in kept} == kept
    # Sentinels stand for no text.
    prepared = pipeline.prepare_run(config, progress=lambda _: None)
    assert prepared.tokenizer.vocab_size == 400
    assert evaluation.token_bytes(SimpleNamespace(config=config), prepared)[400:].tolist() == [0, 0, 0]


def test_held_out_text_without_targets_is_refused(monkeypatch):
    monkeypatch.setattr(pipeline, "heldout_batches", lambda *_, **__: iter([{"targets": np.full((8, 4), -1)}]))
    program = SimpleNamespace(config=Config(), mesh=make_mesh(MeshConfig(), jax.devices()[:1]))
    with pytest.raises(ConfigError, match="held-out text of stories: no token is a target"):
        evaluation.load_heldout(program, SimpleNamespace(domains=["stories"]))


def test_records_of_a_suite_name_it_and_its_code(guide):
    config = Config(data=DataConfig(objective=NAME))
    assert identity.canonical(config)["objective"] == NAME
    assert identity.canonical(config)["code"] == user_code(config) != user_code(Config())


COUNT = itertools.count(1)


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        ("examples", lambda self, *_: 1 / 0, "examples raises ZeroDivisionError"),
        (
            "examples",
            lambda self, *_: [{"tokens": np.zeros(3, int)}],
            r"examples: has arrays \['tokens'\], and lengths",
        ),
        (
            "lengths",
            lambda self, data: dict.fromkeys(["tokens", "targets", "middle"], 2),
            "examples: .*, and lengths allows 2",
        ),
        ("examples", lambda self, *_: iter([]), "examples raises TypeError: gives list_iterator, must be a list"),
        (
            "examples",
            lambda self, *_: [{name: [3, 4] for name in ("tokens", "targets", "middle")}],
            r"examples: \w+ must be an array \[n\] of numpy",
        ),
        (
            "examples",
            lambda self, *_: [dict.fromkeys(["tokens", "targets", "middle"], np.full(2, next(COUNT)))],
            "examples: gives other arrays when it is called again",
        ),
        (
            "heldout_row",
            lambda self, row: row | {"tokens": np.roll(row["tokens"], next(COUNT))},
            "heldout_row: gives other arrays when it is called again",
        ),
        ("row", lambda self, packed, padding: {}, "row raises TypeError: .*unexpected keyword argument 'pad_id'"),
        ("row", lambda self, packed, *, pad_id: None, "row: must return a dictionary of NumPy arrays"),
        ("heldout_row", lambda self, row: {"tokens": [1, 2]}, "heldout_row: must return a dictionary of NumPy arrays"),
        (
            "sentinel_ids",
            lambda tokenizer, count: np.array([700, 701, 702]),
            "examples: must give token ids from 0 to 402",
        ),
    ],
)
def test_wrong_examples_are_refused_before_a_run(guide, tmp_path, monkeypatch, method, wrong, message):
    texts = _letters("abcdefghijklmnopqrstuvwxyz")
    texts = dataclasses.replace(texts, tokenizer=type("Letters", (LetterTokenizer,), {"vocab_size": 400})())
    monkeypatch.setattr(pipeline, "open_data", lambda *_: texts)
    monkeypatch.setattr(guide if method == "sentinel_ids" else guide.FillInTheMiddle, method, wrong)
    data = DataConfig(objective=NAME, sequence_length=16)
    with pytest.raises(ConfigError, match=f"data.objective='{NAME}': {message}"):
        pipeline.prepare(data, 403, progress=lambda _: None)


@pytest.mark.parametrize("method", ["examples", "row"])
def test_examples_that_depend_on_the_process_are_noted(guide, monkeypatch, method):
    """Python orders sets of texts otherwise in each process: a resumed run would read other rows unsaid."""
    texts = _letters("abcdefghijklmnopqrstuvwxyz")
    texts = dataclasses.replace(texts, tokenizer=type("Letters", (LetterTokenizer,), {"vocab_size": 400})())
    monkeypatch.setattr(pipeline, "open_data", lambda *_: texts)

    def examples(name=NAME):
        data = DataConfig(objective=name, sequence_length=16)
        return pipeline.prepare(data, 403, progress=lambda _: None).examples

    before, original = examples(), getattr(guide.FillInTheMiddle, method)
    assert before == examples()
    assert examples("causal") == ""

    def changed(self, *arguments, **named):
        found = original(self, *arguments, **named)
        for arrays in found if method == "examples" else [found]:
            arrays["tokens"] = arrays["tokens"][::-1]
        return found

    monkeypatch.setattr(guide.FillInTheMiddle, method, changed)
    assert examples() != before


def test_a_loss_that_raises_is_named(guide, monkeypatch):
    config = run_helpers.tiny("x", **{"model.num_layers": 1, "data.objective": NAME})
    monkeypatch.setattr(guide.FillInTheMiddle, "sums", lambda self, *_: 1 / 0)
    mesh = make_mesh(config.mesh, run_helpers.ONE)
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        with pytest.raises(ConfigError, match=f"data.objective='{NAME}': sums raises ZeroDivisionError"):
            program.train_step.lower(program.state, program.batch)
        wrong = Sums(jnp.ones(()), jnp.ones(()), {"middle": jnp.ones(3)})
        monkeypatch.setattr(guide.FillInTheMiddle, "sums", lambda self, *_: wrong)
        with pytest.raises(ConfigError, match=r"sums raises ValueError: middle is an array \[3\], must be a number"):
            program.train_step.lower(program.state, program.batch)


def test_the_recipe_of_the_guide_for_contributors():
    """The class and the line of the table in CONTRIBUTING.md work as written."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding an objective")[2]
    recipe, line = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:2]
    names = {"EncoderDecoder": EncoderDecoder}
    exec(recipe, names)
    assert eval(f"{{{line}}}").keys().isdisjoint(OBJECTIVES)
    data = DataConfig(objective="pairs", input_length=8, sequence_length=8)
    (example,) = names["Halves"]().examples("abcde", np.random.default_rng(0), data, LetterTokenizer())
    assert (example["encoder"].tolist(), example["decoder"].tolist()) == ([3, 4, 2], [5, 6, 7, 2])
