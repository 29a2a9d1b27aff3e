"""Files that a crash, an edit or another program changed: one sentence that names file and field."""

import json
import os

import pytest
from etils import epath

from moe.checkpoints import adapted, workdir
from moe.config import Config, ConfigError, inherit_model, to_dict
from moe.config.parse import to_config_dict
from moe.fields import whole_number
from moe.lab.loading import load_suite
from moe.metrics_files import read_rows
from moe.planner import differences

ROW = {"step": 1, "kind": "heldout/all", "loss": 2.5, "expert_load": [[0.5, 0.5]], "fraction_tokens_dropped": [0.1]}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"step": True}, "step=True: must be an integer"),
        ({"step": -1}, "step=-1"),
        ({"kind": None}, "kind=None: must be a string"),
        ({"loss": "low"}, "loss='low': must be a number"),
        ({"expert_load": [[1.0], [0.5, 0.5]], "fraction_tokens_dropped": [0, 0]}, "different numbers of experts"),
        ({"fraction_tokens_dropped": [0.1, 0.2]}, "different numbers of MoE layers"),
        ({"fraction_tokens_dropped": 0.1}, "fraction_tokens_dropped=0.1: must be a list"),
    ],
)
def test_a_wrong_row_of_metrics_is_named(tmp_path, fields, says):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{json.dumps(ROW | fields)}\n{json.dumps(ROW)[:20]}")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2: not a row of metrics") as caught:
        read_rows(path)
    assert says in str(caught.value)
    path.write_text(f"{json.dumps(ROW | {'loss': float('nan'), 'mine': 'x'})}\n{json.dumps(ROW)[:20]}")
    assert [row["mine"] for row in read_rows(path)] == ["x"]  # as it is; the unfinished line is dropped


def test_metrics_that_are_no_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")  # reading it would wait for ever
    with pytest.raises(ConfigError, match="is not a regular file"):
        read_rows(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "must be a JSON object"),
        ('{"step": 1.5}', "step=1.5: must be an integer"),
        ('{"step": true}', "step=True"),
        ("{", "not JSON"),
        ('{"step": %s}' % ("9" * 5000), "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "has no step"),
    ],
)  # fmt: skip
def test_a_wrong_note_or_change_is_named(tmp_path, content, says):
    (tmp_path / "base.json").write_text(content)
    (tmp_path / "changes.jsonl").write_text(content)
    for read in (adapted.base_step, workdir.latest_change):
        with pytest.raises(ConfigError) as caught:
            read(epath.Path(tmp_path))
        assert says in str(caught.value)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ((), [], "has no section 'model'"),
        (("model",), "x", "has no section 'model'"),
        (("model", "moe"), None, "has no section 'moe'"),
        (("model", "d_model"), "8", "model.d_model='8': must be int"),
        (("model", "d_model"), {}, "model.d_model={}: must be int"),
        (("model", "moe", "layer_gates"), 3, "model.moe.layer_gates=3: must be tuple"),
    ],
)
def test_an_odd_config_of_a_start_is_named(tmp_path, path, value, says):
    tree = json.loads(json.dumps(to_dict(Config())))
    if path:
        node = tree
        for name in path[:-1]:
            node = node[name]
        node[path[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(tree if path else value))
    started = to_config_dict(Config())
    started.start.checkpoint = str(tmp_path)
    with pytest.raises(ConfigError, match=r"start\.checkpoint=") as caught:
        inherit_model(started)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def get_suite(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("x = 1", "has no get_suite(size)"),
        ("def get_suite(size):\n    return {}['a']", "KeyError: 'a'"),
        (
            "from moe.lab.suite import Sweep\ndef get_suite(size):\n    Sweep(learning_rates='a', seeds=(1,))",
            "Sweep: learning_rates='a': must be",
        ),
    ],
)
def test_a_suite_that_does_not_load_is_one_sentence(tmp_path, text, says):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match="--suite=") as caught:
        load_suite(str(path), "laptop")
    assert says in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000, '{"config": 3}', '{"config": {}, "topology": 1}'])
def test_a_file_that_is_no_plan_is_one_sentence(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"a\.json: (not|must)") as caught:
        differences.read(path)
    assert len(str(caught.value)) < 300


def test_whole_numbers():
    assert [whole_number(text) for text in ("0", "007", "123456789")] == [0, 7, 123456789]
    assert {whole_number(text) for text in ("", "²", "٣", "-1", "+1", "1_0", "1.0", " 1", "9" * 5000)} == {None}
