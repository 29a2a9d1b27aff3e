"""Runs of an encoder-decoder: training, its report, held-out losses, routing of both stacks, translation."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from moe.analysis import analyse, specialisation, stacks
from moe.analysis.record import Recorder
from moe.config import ConfigError
from moe.data import pipeline
from moe.data.tokenizer_files import find_tokenizer
from moe.lab.benchmarks.train_steps import random_rows
from moe.lab.running.heldout import RowLosses, mixed_rows
from moe.lab.running.programs import Programs
from moe.parallel.mesh import make_mesh
from moe.training.batches import place
from moe.training.evaluation import evaluate, load_heldout
from moe.training.open_workdir import open_workdir
from moe.training.step import build
from moe.training.train import train
from tests.run_helpers import ONE, Interrupted, interrupted, rows, tiny
from tests.tiny_text import random_text

T5 = {
    "model.vocab_size": 500,
    "model.encoder_layers": 2,
    "model.relative_buckets": 4,
    "model.relative_max_distance": 8,
    "model.moe.gate": "switch",
    "model.moe.every": 2,
    "data.objective": "span_corruption",
    "data.input_length": 32,
    "train.sample_tokens": 16,
}


@pytest.fixture(scope="module")
def programs():
    """A make_program that compiles once."""
    return Programs()


@pytest.fixture(scope="module")
def spans(directory, programs, tmp_path_factory):
    """Workdir of a span-corruption run."""
    workdir = tmp_path_factory.mktemp("spans") / "run"
    train(tiny(directory, **T5), str(workdir), ONE, make_program=programs)
    return workdir


@pytest.fixture(scope="module")
def opened(spans):
    return open_workdir(str(spans), {("mesh", "data"): 1})


@pytest.mark.parametrize("settings", [T5, {"data.objective": "prefix_lm"}])
def test_random_rows_of_a_timed_step_have_all_arrays_of_a_batch(tmp_path, settings):
    config = tiny(tmp_path, **settings)
    mesh = make_mesh(config.mesh, ONE)
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        batch = place(random_rows(config), mesh)
        found, expected = ({key: (x.shape, x.dtype) for key, x in each.items()} for each in (batch, program.batch))
        assert found == expected
        jax.eval_shape(program.train_step, program.state, batch)


@pytest.mark.slow
def test_the_report_shows_filled_blanks(spans):
    report = (spans / "report.txt").read_text()
    shown = report.partition("blanks as [written|removed], tiny_text/split:\n")[2].strip()
    prepared = pipeline.prepare(tiny_data(spans), 500, tokenizer=find_tokenizer(spans), progress=lambda _: None)
    text = prepared.heldout["tiny_text/split"][0]
    assert text.startswith(re.sub(r"\[[^]|]*\|([^]]*)\]", r"\1", shown, flags=re.S))
    final = rows(spans, "heldout/all")[-1]
    assert 0 < final["loss"] < np.log(500) + 1
    assert len(final["expert_load"]) == 2  # one MoE layer in each stack


def tiny_data(workdir):
    return open_workdir(str(workdir), {}).program.config.data


@pytest.mark.slow
def test_an_interrupted_run_writes_the_same_metrics(spans, directory, programs, tmp_path):
    config = tiny(directory, **T5)
    with interrupted(5), pytest.raises(Interrupted):
        train(config, str(tmp_path / "run"), ONE, make_program=programs)
    train(config, str(tmp_path / "run"), ONE, make_program=programs)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (spans / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_row_losses_add_up_to_the_evaluation_loss(opened):
    """The lab's losses of single rows sum to the loss of the evaluation."""
    program = opened.program
    with jax.set_mesh(program.mesh):
        found = evaluate(program, opened.variables(), load_heldout(program, opened.prepared))["all"]
        mixed = mixed_rows(opened.prepared, program.config, program.config.data.heldout_rows)
        losses = RowLosses(program, mixed)(opened.path, 6)
    assert (losses * mixed.targets).sum() / mixed.targets.sum() == pytest.approx(found["loss"], rel=1e-5)


@pytest.mark.slow
def test_routing_of_both_stacks(opened, tmp_path, monkeypatch):
    variables = opened.variables()
    folder = epath.Path(tmp_path)
    recorders = {stack: Recorder(opened.program, stack) for stack in ("encoder", "decoder")}
    for stack, length, layer in (("encoder", 32, 1), ("decoder", 16, 3)):  # the encoder's two layers come first
        recorder = recorders[stack]
        rows_ = pipeline.heldout_batches(
            opened.prepared, opened.program.config.data, domain="tiny_text/split", batch_size=8
        )
        records = recorder(variables, {"text": rows_})
        name = "encoder_tokens" if stack == "encoder" else "tokens"
        segments = name.replace("tokens", "segment_ids")
        expected = np.concatenate([batch[name][batch[segments] > 0] for batch in rows_])
        np.testing.assert_array_equal(records.tokens, expected)
        assert records.layers == (layer,)
        assert len(records.tokens) <= len(rows_) * 8 * length
        analysis = analyse.analyse(recorder, variables, opened.prepared, tokens=64, shuffles=2, seed=0)
        analyse.write(analysis, folder / stack, stack)
        pieces = analysis.passages[0].pieces
        assert any(re.fullmatch(r"<extra_id_\d+>", piece) for piece in pieces)
    monkeypatch.setattr(specialisation, "AT_LEAST", 5)  # there is little text
    compared = stacks.compare(recorders, variables, opened.prepared, tokens=4096, shuffles=3)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"tokens=16: no token of the \w+ occurs 20 times"):
        stacks.compare(recorders, variables, opened.prepared, tokens=16, shuffles=3)
    text = stacks.write(compared, folder)
    assert "| encoder | 1 |" in text
    assert "| decoder | 3 |" in text
    assert re.search(r"training added [+-]\d+\.\d points in the encoder and [+-]\d+\.\d in the decoder", text)
    assert "encoder/experts.html" in (tmp_path / "experts.html").read_text()


@pytest.mark.slow
def test_translation(tmp_path):
    pytest.importorskip("sacrebleu")
    lines = [{"source": random_text(i, words=3), "target": random_text(100 + i, words=2)} for i in range(60)]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = T5 | {"model.vocab_size": 400, "data.objective": "pairs", "data.dataset": str(tmp_path / "text")}
    pairs |= {"model.moe.gate": "gshard", "train.num_steps": 2, "train.eval_every": 2}
    train(tiny(tmp_path / "cache", **pairs, **{"optimizer.warmup_steps": 1}), str(tmp_path / "run"), ONE)
    report = (tmp_path / "run" / "report.txt").read_text()
    assert re.search(r"a target, text:\n.* >>> .*\(reference: document \d", report, re.S)
    command = [sys.executable, "-m", "moe", "translate", f"--workdir={tmp_path / 'run'}", "--rows=3", "--show=1"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"PYTHONPATH": ".", "XLA_FLAGS": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"text: BLEU = \d+\.\d+ .* on 3 pairs; nrefs:1\|case:mixed", done.stdout)
