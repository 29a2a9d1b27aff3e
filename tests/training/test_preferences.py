"""Preferences: documents, rows, the DPO loss by hand, and a run that resumes bit for bit."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from moe.config import (
    Config,
    ConfigError,
    DataConfig,
    DistillConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    TrainConfig,
    from_config_dict,
    to_dict,
    validate_mesh,
)
from moe.data import documents, pipeline
from moe.data.tokenizer import train_tokenizer
from moe.objectives import preferences
from moe.objectives.preferences import Preferences, margins
from moe.parallel.mesh import make_mesh
from moe.training import open_workdir, teacher, warm_start
from moe.training.step import build
from moe.training.train import train
from tests.data.test_chat import EXPECTED, HERE, tokenizer
from tests.helpers import random_state
from tests.run_helpers import ONE, compile_once, rows, state_of, steps, tiny, write_run

PROMPT = [{"role": "user", "content": "ab"}]


def pair(chosen="ab ab", rejected="b"):
    return documents.make_document(("prompt", "chosen", "rejected"), ("ab", chosen, rejected))


def test_documents_of_all_forms():
    answers = [[{"role": "assistant", "content": text}] for text in ("ab ab", "b")]
    whole = [PROMPT + answer for answer in answers]
    expected = documents.CONVERSATION + json.dumps({"chosen": whole[0], "rejected": whole[1]})
    assert pair() == expected
    assert documents.make_document(("prompt", "chosen", "rejected"), (PROMPT, *answers)) == expected
    assert documents.make_document(("chosen", "rejected"), whole) == expected
    assert documents.make_document(("prompt", "chosen", "rejected"), ("ab", *whole)) == expected  # prompt given twice
    with pytest.raises(ValueError, match="both answers, or both whole conversations"):
        documents.make_document(("prompt", "chosen", "rejected"), ("ab", whole[0], answers[1]))
    assert documents.text_fields({"prompt", "chosen", "rejected", "score"}) == ("prompt", "chosen", "rejected")
    with pytest.raises(ValueError, match="not a list of objects"):
        documents.make_document(("prompt", "chosen", "rejected"), ("ab", None, "b"))


def test_a_pair_is_two_segments_with_targets_in_the_answers():
    tokens = tokenizer("mistral")
    (example,) = preferences.example(pair(), 64, tokens, "")
    packed = {key: np.concatenate([values, values, [0]]) for key, values in example.items()}
    size = len(example["tokens"])
    packed["tokens_segment_ids"] = np.repeat([1, 2, 0], [size, size, 1])
    packed["tokens_positions"] = np.concatenate([np.arange(size), np.arange(size), [0]])
    row = Preferences().row(packed, tokens.pad_id)
    first = int((example["rejected"] == 0).sum())
    np.testing.assert_array_equal(
        row["segment_ids"], np.repeat([1, 2, 3, 4, 0], [first, size - first, first, size - first, 1])
    )
    np.testing.assert_array_equal(
        row["positions"], [*range(first), *range(size - first), *range(first), *range(size - first), 0]
    )
    answers = [
        tokens.decode(example["targets"][(example["rejected"] == n) & (example["targets"] >= 0)]) for n in (0, 1)
    ]
    assert [answer.strip() for answer in answers] == ["ab ab", "b"]
    assert (Preferences().heldout_row(row)["targets"][row["segment_ids"] % 2 == 0] == -1).all()
    assert not preferences.example(pair(rejected="ab ab"), 64, tokens, "")
    assert not preferences.example(pair(chosen="ab " * 40 + "a", rejected="ab " * 40 + "b"), 64, tokens, "")
    (cut,) = preferences.example(pair(chosen="ab " * 40, rejected="b " * 40), 64, tokens, "")
    np.testing.assert_array_equal(cut["rejected"], np.repeat([0, 1], 32))
    with pytest.raises(ConfigError, match="needs documents with prompt, chosen and rejected"):
        preferences.example(documents.join_texts("a", "b"), 64, tokens, "text")


@pytest.mark.parametrize("name", ["chatml", "mistral", "marked"])
def test_earlier_answers_of_a_pair_belong_to_the_prompt(name):
    """Earlier answers, in any template, since both conversations have them. The last ones share the first word."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}"
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    tokens = tokenizer("mistral", chat_template=template) if name == "marked" else tokenizer(name)
    prompt = [*PROMPT, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    sides = [[*prompt, {"role": "assistant", "content": text}] for text in ("ab ab", "ab b")]
    document = documents.make_document(("chosen", "rejected"), sides)
    (example,) = preferences.example(document, 200, tokens, "")
    targets = [example["targets"][example["rejected"] == number] for number in (0, 1)]
    assert [tokens.decode(ids[ids >= 0]).strip() for ids in targets] == ["ab ab", "ab b"]


def test_loss_and_gradient_by_hand():
    """p(chosen) = 3/4 and p(rejected) = 1/4 against 1/2 for each: margin ln 3/2 − ln 1/2 = ln 3; beta 1/2."""
    log3 = float(np.log(3))
    batch = {
        "segment_ids": jnp.array([[1, 1, 2, 2, 0, 0], [0] * 6]),
        "targets": jnp.array([[0, -1, 0, -1, -1, -1], [-1] * 6]),
    }
    logits = jnp.zeros((2, 6, 2)).at[0, 0].set(jnp.array([log3, 0.0])).at[0, 2].set(jnp.array([0.0, log3]))
    model = SimpleNamespace(output_matrix=lambda: jnp.eye(2))
    config = SimpleNamespace(preferences=SimpleNamespace(beta=0.5))

    def sums(logits):
        output, reference = (SimpleNamespace(hidden=hidden) for hidden in (logits, jnp.zeros((2, 6, 2))))
        return Preferences().sums(config, model, output, batch, (model, reference))

    run = jax.jit(jax.value_and_grad(lambda logits: ((found := sums(logits)).loss, found.terms), has_aux=True))
    with jax.set_mesh(make_mesh(MeshConfig(), ONE)):
        (loss, terms), gradient = run(logits)
        (equal, of_equal), _ = run(jnp.zeros((2, 6, 2)))
    assert Preferences().count(batch) == 1
    assert float(loss) == pytest.approx(np.log(1 + 3**-0.5), rel=1e-6)
    assert float(terms["preference_margin"]) == pytest.approx(log3, rel=1e-6)
    assert float(terms["preference_accuracy"]) == 1
    # dloss/dlog p(chosen) = −beta σ(−beta margin) = −1/2 / (1 + √3); dlog p/dlogit = 1 − 3/4.
    assert float(gradient[0, 0, 0]) == pytest.approx(-0.5 / (1 + 3**0.5) / 4, rel=1e-5)
    assert float(gradient[0, 2, 0]) == pytest.approx(0.5 / (1 + 3**0.5) * 3 / 4, rel=1e-5)
    assert not gradient[1].any()
    # At the reference itself no pair is preferred: margin 0, loss ln 2.
    assert float(equal) == pytest.approx(np.log(2), rel=1e-6)
    assert (float(of_equal["preference_margin"]), float(of_equal["preference_accuracy"])) == (0, 0)


def test_margins_of_two_pairs_in_a_row():
    found = margins(jnp.array([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 0.0]]), jnp.array([[1, 1, 2, 3, 4, 4, 0, 0]]))
    assert found[0].tolist() == [-1, -40, 0, 0]  # 1 + 2 − 4, and 8 − 16 − 32


@pytest.fixture
def start(tmp_path):
    """(workdir of a random model with Llama 3's template, settings of a run on pairs)."""
    (tmp_path / "text" / "pairs").mkdir(parents=True)
    lines = [{"prompt": f"p{i}", "chosen": "ab " * (1 + i % 3), "rejected": "b" * (1 + i % 4)} for i in range(120)]
    (tmp_path / "text" / "pairs" / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = epath.Path(tmp_path / "start")
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((HERE / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(EXPECTED["llama3"]["tokenizer_config"]))
    settings = {
        "model.num_layers": 1, "model.moe.gate": "mixtral", "model.moe.capacity.train": 4.0,
        "data.dataset": str(tmp_path / "text"), "data.sequence_length": 128,
        "data.objective": "preferences", "distill.teacher": str(folder), "optimizer.learning_rate": 1e-2,
        "train.num_steps": 4, "train.batch_size": 4, "train.eval_every": 4, "train.sample_tokens": 0,
        "train.log_every": 1,
    }  # fmt: skip
    config = tiny(tmp_path / "cache", **settings | {"data.objective": "chat", "distill.teacher": ""})
    mesh = make_mesh(config.mesh, ONE)
    with jax.set_mesh(mesh):
        write_run(folder, config, random_state(build(config, mesh)).parameters)
    return folder, settings | {"start.checkpoint": str(folder)}


def test_a_run_begins_at_the_reference_learns_and_resumes_bit_for_bit(start, tmp_path, capsys):
    _, settings = start
    program = compile_once(build)
    config = tiny(tmp_path / "cache", **settings)
    train(config, str(tmp_path / "run"), ONE, make_program=program)
    assert "preferences (DPO), beta 0.1, against" in (said := capsys.readouterr().out)
    assert "auxiliary losses: on (load balancing x 0.0" in said
    first, *_, last = rows(tmp_path / "run", "train")
    assert first["cross_entropy"] == pytest.approx(np.log(2), abs=1e-6)  # the policy is the reference
    assert first["preference_margin"] == pytest.approx(0, abs=1e-5)
    assert last["cross_entropy"] < first["cross_entropy"]
    assert last["preference_accuracy"] > 0.5
    assert steps(tmp_path / "run") == [2, 4]
    expected = state_of(program(config, None), tmp_path / "run", 4)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (tmp_path / "run" / "report.txt").unlink()
    epath.Path(tmp_path / "run" / "checkpoints" / "4").rmtree()
    train(config, str(tmp_path / "run"), ONE, make_program=program)
    jax.tree.map(np.testing.assert_array_equal, state_of(program(config, None), tmp_path / "run", 4), expected)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("objective", ["preferences", "policy"])
def test_prediction_layers_without_a_loss_are_refused(objective, tmp_path):
    data = {"data.objective": objective, "distill.teacher": str(tmp_path) if objective == "preferences" else ""}
    with pytest.raises(ConfigError, match=r"model.prediction_layers=1: must be 0 with data.objective="):
        tiny(tmp_path, **data, **{"model.prediction_layers": 1, "model.moe.dispatch": "dropless"})


def test_the_reference_may_have_two_tokenizers(tmp_path, monkeypatch):
    """An import keeps both files; start and reference render conversations with their tokenizer.json."""
    config = tiny(tmp_path, **{"data.objective": "preferences", "distill.teacher": str(tmp_path)})
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(["word of a text\n" * 99], 272).model_bytes)
    for name, content in tokenizer("llama3").files.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(teacher.stored, "read_variables", lambda *_, **__: {})
    ours = warm_start.tokenizer(config, epath.Path(tmp_path / "run"))
    assert teacher.read_teacher(config, make_mesh(MeshConfig(), ONE), ours) == (config.model, {})


def test_a_users_chat_template_works_with_a_reference(start, tmp_path):
    folder, settings = start
    (tmp_path / "own.jinja").write_text(json.loads((folder / "tokenizer_config.json").read_text())["chat_template"])
    config = tiny(tmp_path / "cache", **settings | {"data.chat_template": str(tmp_path / "own.jinja")})
    assert teacher.read_teacher(config, make_mesh(config.mesh, ONE)) is not None


def test_a_teacher_fits_a_mesh_that_splits_rows():
    sizes = {"data": 4, "fsdp": 1, "expert": 1, "tensor": 1, "context": 2, "pipeline": 1}
    model = ModelConfig(moe=MoEConfig(group_size=64))
    train = TrainConfig(batch_size=4, sample_tokens=0)
    config = Config(model=model, train=train, distill=DistillConfig("t", 0.5))
    validate_mesh(config, sizes)
    teacher._check_fit(config, model, SimpleNamespace(shape=sizes))


def test_a_run_on_pairs_is_compared_with_its_start(start, tmp_path):
    _, settings = start
    config = tiny(tmp_path / "cache", **settings)
    tree = to_dict(tiny(tmp_path / "cache"))
    for (section, name), value in open_workdir.same_text(config, ("pairs",)).items():
        tree[section][name] = value
    assert from_config_dict(tree).data.objective == "preferences"


def test_a_compared_run_reads_the_same_files_and_rows(start, tmp_path):
    own = start[1] | {"data.text_suffixes": (".tex",), "data.pack": False}
    tree = to_dict(tiny(tmp_path / "cache"))
    for (section, name), value in open_workdir.same_text(tiny(tmp_path / "cache", **own), ("pairs",)).items():
        tree[section][name] = value
    data = from_config_dict(tree).data
    assert (data.text_suffixes, data.pack) == ((".tex",), False)


def test_rows_are_resumed_exactly_and_need_a_reference(start, tmp_path):
    folder, settings = start
    data = DataConfig(
        dataset=settings["data.dataset"], directory=str(tmp_path / "cache"), tokenizer=str(folder / "tokenizer.json"),
        objective="preferences", sequence_length=128, shuffle_window=4, heldout_rows=2,
    )  # fmt: skip
    prepared = pipeline.prepare(data, 400, progress=lambda _: None)
    batch = next(pipeline.train_iterator(prepared, data, batch_size=4, seed=0))
    assert batch["segment_ids"].max() >= 4  # two pairs in a row
    for row in batch["segment_ids"]:
        assert row.max() % 2 == 0
    (heldout,) = pipeline.heldout_batches(prepared, data, domain="pairs", batch_size=2)
    assert ((heldout["targets"] == -1) | (heldout["segment_ids"] % 2 == 1)).all()
    with pytest.raises(ConfigError, match=r"distill\.teacher='': must be the reference model"):
        tiny(tmp_path / "cache", **settings | {"distill.teacher": ""})
