"""Files that a crash, an edit or another program changed: refused in one sentence that names file and field."""

import gzip
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from moe.checkpoints import pinned, workdir
from moe.config import Config, ConfigError, inherited, to_dict
from moe.config.parse import Changes
from moe.lab.loading import load_suite
from moe.planner import calibration, differences, kept_plans, scaling
from moe.planner.arithmetic import Flops
from moe.planner.compiled import CompiledStep, Memory
from moe.system.fields import whole_number
from moe.system.metrics_files import read_rows
from moe.system.npz_files import read_arrays
from tests.fuzz_helpers import is_one_sentence

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
def test_a_wrong_row_of_metrics_is_refused_by_line_and_field(tmp_path, fields, says):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{json.dumps(ROW | fields)}\n{json.dumps(ROW)[:20]}")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2: not a row of metrics") as caught:
        read_rows(path)
    assert says in str(caught.value)
    path.write_text(f"{json.dumps(ROW | {'loss': float('nan'), 'mine': 'x'})}\n{json.dumps(ROW)[:20]}")
    assert [row["mine"] for row in read_rows(path)] == ["x"]  # kept unchanged; the unfinished line is dropped


def _bomb(path):
    """Write a zip bomb: a gigabyte of zeros in a few megabytes."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("x.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (1 << 30,)})
        for _ in range(64):
            file.write(bytes(1 << 24))


def _one_array(path):
    with path.open("wb") as file:
        np.save(file, np.ones(3))


def _twice(path):
    np.savez(path, x=np.ones(1))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("x.npy", archive.read("x.npy"))


def _larger_than_it_is(path):
    with zipfile.ZipFile(path, "w") as archive, archive.open("x.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (1 << 50,)})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "no such file"),
        (os.mkfifo, "is not a regular file"),
        (os.mkdir, "is not a regular file"),
        (lambda path: path.symlink_to(path), "is not a regular file"),
        (lambda path: path.write_bytes(b""), "not a readable npz file"),
        (lambda path: path.write_bytes(b"PK\x03\x04"), "not a readable npz file"),
        (_one_array, "not a readable npz file"),
        (lambda path: np.savez(path, x=np.array([{}])), "not a readable npz file.*allow_pickle"),
        (lambda path: zipfile.ZipFile(path, "w").writestr("x", "text"), "x is of type bytes, must be real numbers"),
        (_bomb, "would unpack to 1,073,741,"),
        (_twice, "two arrays have one name"),
        (_larger_than_it_is, "does not fit into memory|not a readable npz file"),
        (lambda path: np.savez(path, x=np.array(["1"])), "x is of type <U1, must be real numbers"),
        (lambda path: np.savez(path, x=np.ones(1) * 1j), "x is of type complex128"),
    ],
)
def test_files_that_hold_no_arrays_are_refused(tmp_path, make, says):
    path = tmp_path / "x.npz"
    make(path)
    with pytest.raises(ConfigError, match=says) as caught:
        read_arrays(path)
    is_one_sentence(caught.value)


def test_metrics_that_are_not_a_regular_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")  # reading it would block for ever
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
def test_a_wrong_base_note_or_change_is_refused(tmp_path, content, says):
    (tmp_path / "base.json").write_text(content)
    (tmp_path / "changes.jsonl").write_text(content)
    folder = epath.Path(tmp_path)
    for read in (lambda: pinned.read_note(folder / pinned.BASE_FILE), lambda: workdir.latest_change(folder)):
        with pytest.raises(ConfigError) as caught:
            read()
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
        (("model", "moe", "layer_gates"), 3, "model.moe.layer_gates=3: must be a tuple"),
    ],
)
def test_a_wrong_config_of_a_start_checkpoint_is_refused_by_field(tmp_path, path, value, says):
    tree = json.loads(json.dumps(to_dict(Config())))
    if path:
        node = tree
        for name in path[:-1]:
            node = node[name]
        node[path[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(tree if path else value))
    started = Changes()
    started.start.checkpoint = str(tmp_path)
    with pytest.raises(ConfigError, match=r"start\.checkpoint=") as caught:
        inherited(started.settings)
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
def test_a_suite_that_does_not_load_is_refused_in_one_sentence(tmp_path, text, says):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match="--suite=") as caught:
        load_suite(str(path), "laptop")
    assert says in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000, '{"config": 3}', '{"config": {}, "topology": 1}'])
def test_a_file_that_is_not_a_plan_is_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"a\.json: (not|must)") as caught:
        differences.read(path)
    assert len(str(caught.value)) < 300


def test_a_plan_of_nested_settings_is_compared_or_refused(tmp_path):
    good = {name: 1 for name in ("exposed_seconds", "step_seconds", "counted_seconds", "memory_total", "mfu")}
    good |= {
        "tokens_per_second_per_chip": 1,
        "step_interval": [1, 2],
        "memory": {"capacity": 1},
        "cost": "",
        "where": [],
    }
    good |= {"config": "@", "topology": "v5p:4x4x4", "platform": "tpu", "scenario": ""}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(good).replace('"@"', '{"a": ' * 30 + "1" + "}" * 30))
    assert differences.settings(differences.read(path), differences.read(path)) == []
    path.write_text(json.dumps(good).replace('"@"', '{"a": ' * 3000 + "1" + "}" * 3000))
    with pytest.raises(ConfigError, match=r"a\.json: "):
        differences.read(path)


def test_a_field_with_two_values_is_refused(tmp_path):
    config = json.dumps(to_dict(Config()))
    (tmp_path / "config.json").write_text(config[:-1] + ', "model": {}}')
    with pytest.raises(ConfigError, match=r"config\.json: two values of 'model'"):
        workdir.read_config(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROW)[:-1] + ', "loss": 2.0}\n' + json.dumps(ROW) + "\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 1: .*two values of 'loss'"):
        read_rows(tmp_path / "metrics.jsonl")


def test_an_unknown_model_field_is_not_inherited(tmp_path):
    config = to_dict(Config())
    config["model"]["moe"]["gate"] = {"name": "mixtral", "k": 2, "kk": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    started = Changes()
    started.start.checkpoint = str(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.moe\.gate\.kk: no such field"):
        inherited(started.settings)


PLAN = json.loads((Path(__file__).parents[1] / "configs" / "plans.json").read_text())[0]
POINT = {"series": "s", "topology": "v3:8x8", "devices": 128, "experts": 128}


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({}, None),
        ({"flags": []}, "flags=[]: must be a JSON object"),
        ({"step_interval": [1.0]}, "step_interval=[1.0]: List should have at least 2"),
        ({"mfu": "high"}, "mfu='high': must be a number"),
        ({"step_seconds": 0}, "step_seconds=0"),
        ({"step_interval": [3.0, 1.0]}, "step_interval=[3.0, 1.0]: must be the lower end, then the upper"),
    ],
)
def test_a_wrong_kept_plan_is_refused_by_entry_and_field(tmp_path, edit, says):
    path = tmp_path / "plans.json"
    path.write_text(json.dumps([PLAN, PLAN | edit]))
    if says is None:
        assert kept_plans.read(path) == [PLAN, PLAN]
        return
    with pytest.raises(ConfigError, match=r"plans\.json, entry 2: ") as caught:
        kept_plans.read(path)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({}, None),
        ({"residual": float("nan")}, "calibration.json, entry 1: residual=nan"),
        ({"counted": 0}, "calibration.json, entry 1: counted=0"),
        ({"platform": "abacus"}, "calibration.json, entry 1: platform='abacus'"),
    ],
)
def test_a_wrong_published_step_is_refused_by_entry_and_field(tmp_path, monkeypatch, edit, says):
    rows = json.loads(calibration.PATH.read_text())
    monkeypatch.setattr(calibration, "PATH", tmp_path / "calibration.json")
    calibration.PATH.write_text(json.dumps([rows[0] | edit, *rows[1:]]))
    if says is None:
        assert calibration.rows() == rows
        return
    with pytest.raises(ConfigError) as caught:
        calibration.rows()
    assert says in str(caught.value)


def test_names_of_kept_plans_are_escaped_in_table_cells():
    table = kept_plans.table([PLAN | {"config": "<b>a|b\n# x", "flags": {"x": "`|`"}}])
    row = table.splitlines()[2]
    assert row.startswith(r"| &lt;b&gt;a\|b # x | ")
    assert r"`x='\|'`" in row


@pytest.mark.parametrize("content", ["", "{}", "[3]", "[" * 100_000, "[{}]"])
def test_a_file_without_kept_plans_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "plans.json").write_text(content)
    with pytest.raises(ConfigError, match=r"plans\.json(: (not|must)|, entry 1: (must|has no))"):
        kept_plans.read(tmp_path / "plans.json")
    (tmp_path / "plans.json").unlink()
    os.mkfifo(tmp_path / "plans.json")
    with pytest.raises(ConfigError, match=r"plans\.json: is not a regular file"):
        kept_plans.read(tmp_path / "plans.json")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (json.dumps(POINT)[:20], "not JSON"),
        ("[]", "must be a JSON object"),
        (json.dumps(POINT), "has no all_to_all_mib, and is not refused"),
        (json.dumps(POINT | {"refused": "too large", "devices": "128"}), "devices='128': must be an integer"),
    ],
)
def test_a_wrong_row_of_scaling_is_refused_by_line(tmp_path, line, says):
    good = POINT | {"refused": "does not fit", "mine": 1}
    path = tmp_path / "scaling.jsonl"
    path.write_text(json.dumps(good) + "\n")
    assert scaling.read(path) == [good]
    path.write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(ConfigError, match=r"scaling\.jsonl, line 2: not a row of scaling") as caught:
        scaling.read(path)
    assert says in str(caught.value)


@pytest.mark.parametrize("kind", ["whole", "cut", "text", "other"])
def test_a_damaged_compiled_step_is_refused_in_one_sentence(tmp_path, kind):
    path = tmp_path / "step.json.gz"
    step = CompiledStep("HLO", Memory(1, 2, 3, 4, 5, 6, 7), Flops(1.0, 2.0, 3.0), 1.5, "abc1234")
    step.save(path)
    if kind == "whole":
        assert CompiledStep.load(path) == step
        return
    content = {"cut": path.read_bytes()[:-9], "text": b"HLO", "other": gzip.compress(b'{"text": "HLO"}')}[kind]
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"step\.json\.gz: not a compiled step"):
        CompiledStep.load(path)


def test_whole_numbers():
    assert [whole_number(text) for text in ("0", "007", "123456789")] == [0, 7, 123456789]
    assert {whole_number(text) for text in ("", "²", "٣", "-1", "+1", "1_0", "1.0", " 1", "9" * 5000)} == {None}
