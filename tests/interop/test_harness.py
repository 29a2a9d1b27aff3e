"""The adapter to lm-evaluation-harness against the model's own log-probabilities, and a task from local files."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from moe.config import ConfigError
from moe.data.tokenizer import train_tokenizer
from moe.interop import import_checkpoint, load_huggingface
from moe.models import sampling
from moe.system.sealed_folder import unsealed
from tests.helpers import random_parameters
from tests.run_helpers import tiny, write_run

pytest.importorskip("lm_eval", reason="pip install lm_eval")
OPEN = Path(__file__).parents[1] / "data" / "checkpoints" / "mixtral"
TEXT = ["one two three four five six seven eight nine ten eleven twelve"] * 40


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """An imported model whose vocabulary is large enough for a trained tokenizer."""
    folder = tmp_path_factory.mktemp("imported")
    source = folder / "source"
    shutil.copytree(OPEN, source)
    _widen(source, 280)
    import_checkpoint(source, folder / "run")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "run" / name).unlink(missing_ok=True)
    (folder / "run" / "tokenizer.model").write_bytes(train_tokenizer(iter(TEXT), 280).model_bytes)
    return folder / "run"


def _widen(source, vocab_size):
    """Give an open checkpoint a larger vocabulary."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    rng = np.random.default_rng(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        like = tensors[name]
        tensors[name] = rng.normal(0, 0.5, (vocab_size, like.shape[1])).astype(like.dtype)
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": vocab_size}))


@pytest.fixture(scope="module")
def model(workdir):
    from moe.interop.harness import WorkdirLM

    return WorkdirLM(str(workdir), batch_size=8, max_length=24)


@pytest.fixture(scope="module")
def log_probs(workdir):
    """Ids → log-probabilities of the next token at every position, by the plain model."""
    loaded, _ = load_huggingface(workdir.parent / "source")
    return lambda ids: np.asarray(jax.nn.log_softmax(loaded(np.asarray([ids])).logits[0]))


def _requests(*arguments):
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, argument, 0) for argument in arguments]


def test_likelihoods_equal_those_of_the_model(model, log_probs):
    pairs = [("one two", " three four"), ("", "five six"), ("seven", " eight"), ("one two three four five" * 9, " ten")]
    results = model.loglikelihood(_requests(*pairs), disable_tqdm=True)
    for (context, continuation), (likelihood, greedy) in zip(pairs, results, strict=True):
        begin = model.tok_encode(context)
        ids = (begin + model.tok_encode(context + continuation)[len(begin) :])[-25:]  # T = 24 inputs
        count = len(model.tok_encode(context + continuation)) - len(begin)
        table = log_probs(ids[:-1])
        expected = sum(table[at - 1, ids[at]] for at in range(len(ids) - count, len(ids)))
        np.testing.assert_allclose(likelihood, expected, rtol=1e-4, atol=1e-4)
        assert greedy == all(table[at - 1].argmax() == ids[at] for at in range(len(ids) - count, len(ids)))


def test_every_token_of_a_long_text_is_scored_once_in_windows(model, log_probs):
    ids = model.tok_encode(TEXT[0] * 2)
    assert len(ids) > 2 * 24
    # Like any other token, a bos of the text is scored after the prefix token, as hf does it.
    assert [model.prefix_token_id, ids[0]] == [model._tokenizer.bos_id] * 2
    (total,) = model.loglikelihood_rolling(_requests((TEXT[0] * 2,)), disable_tqdm=True)
    whole = [model.prefix_token_id, *ids]
    expected = 0.0
    for start in range(0, len(ids), 24):
        end = min(start + 24, len(ids))
        window = whole[end - 24 : end] if start else whole[:24]
        table = log_probs(window)
        expected += sum(table[at - end + len(window), whole[at + 1]] for at in range(start, end))
    np.testing.assert_allclose(total, expected, rtol=1e-4)


def test_generation_ends_at_a_stop_string(model):
    options = {"until": [], "max_gen_toks": 6}
    (free,) = model.generate_until(_requests(("one two", options)))
    prompt = model.tok_encode("one two")
    with jax.set_mesh(model._mesh):
        greedy = sampling.Sampling(temperature=0, stop_tokens=(model.eot_token_id,))
        (ids,) = sampling.sample(model._model, model._variables, [prompt], 6, greedy)
    assert free == model._tokenizer.decode([*prompt, *ids.tolist()]).removeprefix("one two")
    stop = free[2:4]
    (short,) = model.generate_until(_requests(("one two", options | {"until": [stop]})))
    assert short == free[: free.index(stop)]


@pytest.fixture
def sampled(monkeypatch):
    """(prompt, maximum of tokens, options) of each text that the adapter asks for; none is written."""
    calls = []

    def stream(config, variables, prompts, most, options):
        calls.append((prompts[0], most, options))
        return iter(())

    monkeypatch.setattr(sampling, "stream", stream)
    return calls


def test_repeated_requests_have_draws_of_their_own(model, sampled):
    """Tasks such as self-consistency repeat a request and compare its answers."""
    model.generate_until(_requests(*[("one two", {"max_gen_toks": 9, "do_sample": True})] * 3))
    assert len({options for _, _, options in sampled}) == 3
    assert {dataclasses.replace(options, seed=0) for _, _, options in sampled} == {
        sampling.Sampling(temperature=1, stop_tokens=(model.eot_token_id,))
    }


def test_the_number_of_tokens_may_have_the_names_of_other_libraries(model, sampled):
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    requests = [{name: 2} for name in names] + [{names[1]: 9, names[0]: 3}]
    model.generate_until(_requests(*[("one two", options) for options in requests]))
    assert [most for _, most, _ in sampled] == [2, 2, 2, 2, 3]
    with pytest.raises(ConfigError, match="max_gen_toks=256: must be below the 24 tokens of a row"):
        model.generate_until(_requests(("one two", {})))


def test_texts_begin_without_bos_where_the_tokenizer_has_none(model, sampled, monkeypatch):
    """Prefix of eos, as in training, only before a text without context, so that its first token has a probability."""
    tokenizer = model._tokenizer
    begin, three = (tokenizer.encode(text).tolist() for text in ("one two", " three"))
    assert model.tok_encode("one two") == [tokenizer.bos_id, *begin]
    monkeypatch.setattr(type(tokenizer), "bos_id", property(lambda _: -1))
    assert model.tok_encode("one two") == begin
    scored = []

    def score(variables, tokens, targets):
        scored.extend(zip(tokens.tolist(), targets.tolist(), strict=True))
        return np.zeros(8), np.zeros(8, bool)

    monkeypatch.setattr(model, "_score", score)
    eos = tokenizer.eos_id
    model.loglikelihood(_requests(("one two", " three"), ("", " three"), (" ", "three")), disable_tqdm=True)
    without = ([eos, *three][:-1], three)
    wanted = [without, without, ([*begin, *three][:-1], [-1] * (len(begin) - 1) + three)]  # ordered by length
    for (tokens, targets), (inputs, outputs) in zip(scored, wanted, strict=False):
        assert [tokens, targets] == [row + [-1] * (16 - len(row)) for row in (inputs, outputs)]
    model.generate_until(_requests(("", {"max_gen_toks": 9}), ("one two", {"max_gen_toks": 9})))
    assert [prompt for prompt, _, _ in sampled] == [[eos], begin]


def test_special_tokens_are_added_as_the_tokenizer_does_in_transformers(workdir, monkeypatch):
    """A tokenizer may name a bos that its model never saw; in front of every text it moved choices by 27 nats. Another
    ends every text with eos, contexts too, unless --add_bos_token decides: as ``hf`` does."""
    from moe.data.tokenizer import Tokenizer
    from moe.interop.harness import WorkdirLM

    plain = Tokenizer.encode_with_special

    def ended(self, text, *, added=False):
        return np.asarray([*plain(self, text), *[self.eos_id] * added], np.int32)

    monkeypatch.setattr(Tokenizer, "encode_with_special", ended)
    own, asked, never = (WorkdirLM(str(workdir), add_bos_token=choice) for choice in (None, True, False))
    ids, bos, eos = own._tokenizer.encode("one two").tolist(), own._tokenizer.bos_id, own._tokenizer.eos_id
    assert own.tok_encode("one two") == [*ids, eos]
    assert asked.tok_encode("one two") == [bos, *ids]
    assert never.tok_encode("one two") == own.tok_encode("one two", add_special_tokens=False) == ids
    assert own.tok_encode("<s>one two") == [bos, *ids]
    assert own.prefix_token_id == bos  # before a text without context, as hf has it
    monkeypatch.setattr(Tokenizer, "bos_id", property(lambda _: -1))
    with pytest.raises(ConfigError, match="--add_bos_token: the tokenizer has no bos"):
        WorkdirLM(str(workdir), add_bos_token=True)


def test_special_tokens_of_a_text_are_read_and_bos_is_not_repeated(model):
    """Texts that a task or a template begins with bos itself, or separates by eos, are read as by ``hf``."""
    tokenizer = model._tokenizer
    one, two = (tokenizer.encode(text).tolist() for text in ("one two", " three"))
    expected = [tokenizer.bos_id, *one, tokenizer.eos_id, *two]
    assert model.tok_encode("<s>one two</s> three") == model.tok_encode("one two</s> three") == expected
    assert model.tok_encode("<s>one two", add_special_tokens=True) == [tokenizer.bos_id, tokenizer.bos_id, *one]
    assert model.tok_encode("<s>one two", add_special_tokens=False) == [tokenizer.bos_id, *one]


def test_a_task_from_local_files(model, tmp_path, monkeypatch):
    from lm_eval import evaluator, tasks

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = [{"question": "one two", "choices": [" three", " nine"], "answer": 0}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.yaml").write_text(
        f"""task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
    )
    results = evaluator.simple_evaluate(
        model, tasks=["tiny"], task_manager=tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    )
    likelihoods = model.loglikelihood(_requests(("one two", " three"), ("one two", " nine")), disable_tqdm=True)
    assert results["results"]["tiny"]["acc,none"] == float(likelihoods[0][0] > likelihoods[1][0])


def test_a_batch_size_that_devices_do_not_divide_is_refused(workdir):
    from moe.interop.harness import WorkdirLM

    with pytest.raises(ConfigError, match=r"--batch_size=3: must be a positive multiple of the 8 devices"):
        WorkdirLM(str(workdir), batch_size=3)


def test_a_score_does_not_depend_on_other_rows_of_the_batch(tmp_path):
    """LongRoPE rescales positions by the length of a row, which must be the number of its own tokens."""
    from moe.interop.harness import WorkdirLM

    source = Path(__file__).parents[1] / "data" / "checkpoints" / "llama_longrope"
    config = import_checkpoint(source, tmp_path / "run")
    vocab = config.model.vocab_size
    (tmp_path / "run" / "tokenizer.model").write_bytes(train_tokenizer(iter(TEXT), 280).model_bytes)
    model = WorkdirLM(str(tmp_path / "run"), batch_size=8, max_length=256)
    rng = np.random.default_rng(0)
    short, long = rng.integers(3, vocab, 12).tolist(), rng.integers(3, vocab, 240).tolist()
    request = ("", short[:6], short[6:])
    alone = model._loglikelihood_tokens([request])[0][0]
    beside = model._loglikelihood_tokens([request, ("", long[:6], long[6:])])[0][0]
    np.testing.assert_allclose(beside, alone, rtol=1e-5)


def test_a_score_of_a_gate_that_draws_does_not_depend_on_other_rows(tmp_path):
    """Experts drawn by position, as when text is generated, not by the row's place in the batch."""
    from moe.interop.harness import WorkdirLM

    config = tiny(tmp_path, **{"model.moe.gate": "random", "data.dataset": "embedded", "model.num_layers": 1})
    write_run(tmp_path / "run", config, random_parameters(config.model)[1])
    (tmp_path / "run" / "tokenizer.model").write_bytes(train_tokenizer(iter(TEXT), 280).model_bytes)
    model = WorkdirLM(str(tmp_path / "run"), batch_size=8)
    ids = np.random.default_rng(0).integers(3, 280, (2, 12)).tolist()
    first, second = (("", row[:6], row[6:]) for row in ids)
    (alone,) = model._loglikelihood_tokens([second])
    beside = model._loglikelihood_tokens([first, second])[1]
    np.testing.assert_allclose(beside[0], alone[0], rtol=1e-5)


def test_pools_of_prompts_are_refused(tmp_path):
    from moe.interop.harness import WorkdirLM

    changes = {"model.moe.gate": "emo", "model.moe.accept_future_leak": True}
    write_run(tmp_path / "run", tiny(tmp_path, **changes), {"none": np.zeros(1, np.float32)})
    with pytest.raises(
        ConfigError, match="gate='emo' chooses experts from the prompt, and the harness takes models whose"
    ):
        WorkdirLM(str(tmp_path / "run"))


def test_a_prefix_lm_sees_the_context_in_both_directions(workdir, tmp_path):
    from moe.interop.harness import WorkdirLM

    shutil.copytree(workdir.parent / "source", tmp_path / "source")
    written = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(written | {"sliding_window": None}))
    import_checkpoint(tmp_path / "source", tmp_path / "run")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    shutil.copy(workdir / "tokenizer.model", tmp_path / "run")
    content = unsealed((tmp_path / "run" / "config.json").read_text())
    content["data"]["objective"] = "prefix_lm"
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    model = WorkdirLM(str(tmp_path / "run"), batch_size=8, max_length=24)
    context, continuation = list(range(3, 9)), [9, 10, 11]
    ids = np.asarray([context + continuation])
    loaded, _ = load_huggingface(tmp_path / "source")
    prefix = (np.arange(8) < len(context)).astype(np.int32)[None]
    logits = loaded(ids[:, :-1], prefix=prefix).logits
    expected = np.asarray(jax.nn.log_softmax(logits))[0, np.arange(5, 8), continuation].sum()
    scored = model._loglikelihood_tokens([("", context, continuation)])[0][0]
    np.testing.assert_allclose(scored, expected, rtol=1e-4)
    causal = np.asarray(jax.nn.log_softmax(loaded(ids[:, :-1]).logits))[0, np.arange(5, 8), continuation].sum()
    assert abs(scored - causal) > 1e-3
