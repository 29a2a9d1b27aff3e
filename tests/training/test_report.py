"""The report at the end of a run: which document it continues, and that its failures are raised at the start."""

import dataclasses
import json
import re
import types
from typing import Any

import numpy as np
import pytest
from etils import epath

from moe.config import ConfigError
from moe.data import pipeline
from moe.training import progress, report
from moe.training.train import train
from tests.run_helpers import ONE, tiny
from tests.tiny_text import random_text

DOMAIN = "tiny_text/split"


@pytest.fixture(scope="module")
def prepared(directory):
    return pipeline.prepare_run(tiny(directory), progress=lambda _: None)


def _with(prepared, *texts):
    return dataclasses.replace(prepared, heldout={DOMAIN: [*texts, random_text(3)]})


def test_prompts_come_from_the_first_document_that_is_long_enough(directory, prepared):
    tokenizer = prepared.tokenizer
    long = tokenizer.encode(random_text(3))
    begin = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    one = next(text for text in "aeiou0" if len(tokenizer.encode(text)) == 1)
    found = report.prompts(tiny(directory), _with(prepared, one))
    np.testing.assert_array_equal(found[DOMAIN], [*begin, *tokenizer.encode(one)])
    # One token leaves an encoder-decoder's prefix nothing to predict; empty text without BOS has no first token.
    encoder = {"model.encoder_layers": 1, "data.objective": "prefix_lm", "data.input_length": 16}
    found = report.prompts(tiny(directory, **encoder), _with(prepared, one))
    assert found[DOMAIN]["encoder"][0] == long[0]
    without_bos = dataclasses.replace(_with(prepared, ""), tokenizer=_without_bos(tokenizer))
    np.testing.assert_array_equal(report.prompts(tiny(directory), without_bos)[DOMAIN], long[:31])
    only = dataclasses.replace(prepared, heldout={DOMAIN: [one]})
    assert report.prompts(tiny(directory, **encoder), only) == {}


def _without_bos(tokenizer):
    return types.SimpleNamespace(bos_id=-1, encode=tokenizer.encode)


@pytest.mark.parametrize("gate", ["soft_moe", "expert_choice"])
def test_the_report_under_a_gate_that_looks_ahead_has_no_sample(directory, prepared, gate):
    config = tiny(directory, **{"model.moe.gate": gate, "model.moe.accept_future_leak": True})
    program: Any = types.SimpleNamespace(config=config)
    state: Any = None
    text = report._sampled(program, state, prepared)
    assert text.startswith(f"no text was sampled: model.moe.gate={gate!r}: routes by the other tokens of a group")


def test_a_document_that_the_report_cannot_show_is_refused_at_the_start(directory, tmp_path, monkeypatch):
    """Not after training: the program is never even built."""
    prepare = pipeline.prepare_run

    def with_plain_text(config, **options):
        return dataclasses.replace(prepare(tiny(directory), **options), heldout={DOMAIN: ["no conversation"]})

    monkeypatch.setattr(pipeline, "prepare_run", with_plain_text)
    config = tiny(directory, **{"data.objective": "chat", "train.sample_tokens": 4})
    never: Any = None
    with pytest.raises(ConfigError, match="needs documents with messages"):
        train(config, str(tmp_path / "run"), ONE, make_program=never)


def test_the_end_of_a_run_names_only_what_was_written(tmp_path):
    assert "tensorboard/" not in report._files(epath.Path(tmp_path))
    (tmp_path / "tensorboard").mkdir()
    assert "tensorboard/" in report._files(epath.Path(tmp_path))


def test_the_time_of_a_resumed_run_is_that_of_its_own_steps(tmp_path):
    """Rows of steps 10 to 40, 2 s a step, then, after a restart at 40, 3 s a step: 2 logged rows, 20 steps, 60 s."""
    seconds = {10: 9.0, 20: 2.0, 30: 2.0, 40: 2.0, 50: 7.0, 60: 3.0}
    rows = [json.dumps({"kind": "timing", "step": step, "step_seconds": each}) for step, each in seconds.items()]
    (tmp_path / report.TIMING).write_text("\n".join(rows) + "\n")
    assert "a step takes 3.00 s, so that 20 steps take 60 s" in report._spent(epath.Path(tmp_path), 40)
    assert "a step takes 2.00 s, so that 60 steps take 120 s" in report._spent(epath.Path(tmp_path), 0)
    assert report._spent(epath.Path(tmp_path), 50) == ""


@pytest.mark.parametrize(
    ("first", "last", "shown"),
    [
        (
            {"preference_margin": 0.0, "preference_accuracy": 0.5},
            {"preference_margin": 1.2345, "preference_accuracy": 0.875},
            (("margin", "0.000", "1.234"), ("accuracy", "50.0%", "87.5%")),
        ),
        (
            {"policy_ratio": 1.0, "policy_clipped": 0.0, "policy_extreme": 0.0, "policy_old_kl": 0.0, "policy_kl": 0.0},
            {
                "policy_ratio": 1.01,
                "policy_clipped": 0.1,
                "policy_extreme": 0.02,
                "policy_old_kl": 0.5,
                "policy_kl": 0.25,
            },
            (("ratio", "1.000", "1.010"), ("clipped", "0.0%", "10.0%"), ("KL from the reference", "0.0000", "0.2500")),
        ),
        ({}, {}, ()),
    ],
)
def test_the_terminal_and_the_report_show_what_an_objective_on_answers_measures(first, last, shown, capsys):
    heldout = {"loss": 1.0, "perplexity": 2.7, "bits_per_byte": 1.0, "targets": 9}
    text = report.table({"all": heldout}, {"all": 2.0}, [first, {}, last])
    for name, before, after in shown:
        assert re.search(rf"^  {name} +{before} +{after}$", text, re.MULTILINE), text
    assert ("first logged row" in text) == bool(shown)
    bar = progress.Progress(0, 10, quiet=False)
    bar.logged({"cross_entropy": 0.5, "learning_rate": 1e-3} | last, None)
    bar.show(5)
    line = capsys.readouterr().err
    assert " ".join(["loss 0.500", *(f"{name} {after}" for name, _, after in shown[:1])]) in line
    assert all(f"{name} {after}" in line for name, _, after in shown)
