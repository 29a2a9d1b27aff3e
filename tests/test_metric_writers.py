"""Metric writers: a user's own, TensorBoard's events, and calls to Weights & Biases."""

import contextlib
import itertools
import json
import resource
import struct
import sys
import threading
import tracemalloc
import types
from unittest import mock

import numpy as np
import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from moe.checkpoints import retention
from moe.config import Config, ConfigError, to_dict
from moe.system import metrics_files
from moe.system.metrics_files import METRICS, MetricsWriter
from moe.training import metric_writers, report
from moe.training.metric_writers import TensorBoard, Trackio, WeightsAndBiases, find_writers
from moe.training.train import train
from tests.run_helpers import ONE, SETTINGS, tiny

pytestmark = pytest.mark.usefixtures("compilation_cache")
ROW = {"loss": 2.5, "router_entropy": [0.5, 0.25], "expert_load": [[0.5, 0.5, 0.0], [0.25, 0.0, 0.75]]}
MODULE = """
import json

def lines(workdir, config, step):
    return Lines(workdir / "mine.txt", config, step)

class Lines:
    def __init__(self, path, config, step):
        self.file = path.open("a")
        self.file.write(json.dumps(["start", step, config["train"]["num_steps"]]) + chr(10))

    def write(self, step, kind, values):
        self.file.write(json.dumps([step, kind, sorted(values)[0]]) + chr(10))

    def close(self):
        self.file.write("closed" + chr(10))
        self.file.close()

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_writers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    yield
    sys.modules.pop("my_writers", None)


def records(path):
    """Events of a file; a record is length, checksum, bytes, checksum."""
    content, at = path.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
        at += 16 + length


def events(folder):
    """(step, tag, value) from the event files of a folder."""
    found = []
    for path in sorted(folder.iterdir()):
        found += [(event.step, value.tag, value) for event in records(path) for value in event.summary.value]
    return found


def test_a_users_writer_gets_every_row_and_may_change_on_resume(module, directory, programs, tmp_path):
    run = tmp_path / "run"
    config = tiny(directory, **SETTINGS | {"train.writers": ("my_writers:lines",), "train.num_steps": 6})
    train(config, str(run), ONE, make_program=programs, quiet=True)
    lines = (run / "mine.txt").read_text().splitlines()
    assert json.loads(lines[0]) == ["start", 0, 6]
    written = [json.loads(line)[:2] for line in lines[1:-1]]
    assert [row for row in written if row[1] == "train"] == [[step, "train"] for step in range(1, 7)]
    assert [6, "heldout/all"] in written
    assert [6, "timing"] in written
    assert lines[-1] == "closed"
    assert not (run / "tensorboard").exists()
    (run / "report.txt").unlink()
    other = tiny(directory, **SETTINGS | {"train.writers": (), "train.num_steps": 6})
    train(other, str(run), ONE, make_program=programs, quiet=True)  # no other config: the writers are free


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("csv", "must be one of tensorboard, wandb, trackio, or module:function"),
        ("my_writers:line", "has no 'line'; did you mean 'lines'"),
        ("my_writers:number", "must be a function"),
        ("os:getcwd", r"must be a function \(workdir, config, step\) -> writer"),
        ("nowhere:lines", "no module 'nowhere'"),
    ],
)
def test_what_cannot_be_a_writer_is_refused_before_anything_is_written(module, directory, tmp_path, name, message):
    with pytest.raises(ConfigError, match=message) as error:
        train(tiny(directory, **{"train.writers": (name,)}), str(tmp_path / "run"), ONE)
    assert str(error.value).startswith(f"train.writers={name!r}: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", r"must return a writer with write\(step, kind, values\) and close\(\), not NoneType"),
        ("return object()", "must return a writer .* not object"),
        ("raise KeyError('a')", "it raises KeyError: 'a'"),
        ("return types.SimpleNamespace(write=lambda s, k, v: v['nothing'], close=lambda: 0)", "write raises KeyError"),
        (
            "return types.SimpleNamespace(write=lambda s, k, v: 0, close=lambda: 1 / 0)",
            "close raises ZeroD",
        ),
    ],
)
def test_a_writer_that_fails_is_named(monkeypatch, tmp_path, body, message):
    module = types.ModuleType("failing_writers")
    exec(f"import types\ndef make(workdir, config, step):\n    {body}", vars(module))
    monkeypatch.setitem(sys.modules, "failing_writers", module)
    with pytest.raises(ConfigError, match=rf"^train\.writers='failing_writers:make': {message}"):  # noqa: PT012
        writer = MetricsWriter(epath.Path(tmp_path), 0, to_dict(Config()), find_writers(("failing_writers:make",)))
        with contextlib.closing(writer):
            writer.write(1, "train", {"loss": 1.0})


def test_rows_of_a_long_run_are_never_in_memory_together(monkeypatch, tmp_path):
    """60 rows of 8 x 256 loads are 2.4 MB of text; opening the file again, and what it is read for, hold a few rows."""
    path, load = epath.Path(tmp_path) / METRICS, np.random.default_rng(0).random((8, 256)).tolist()
    kinds = ["heldout/all" if step % 20 == 0 else "train" for step in range(1, 61)]
    rows = [{"step": step, "kind": kind, "loss": 1 / step, "expert_load": load} for step, kind in enumerate(kinds, 1)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert path.stat().length > 2.4e6
    tracemalloc.start()
    with contextlib.closing(MetricsWriter(path.parent, 40, to_dict(Config()))) as writer:
        assert writer.rows[METRICS] == 40
    shown = [report._shown(row, 40) for row in metrics_files.iterate_rows(path)]
    parsed = mock.Mock(wraps=metrics_files.parse)
    monkeypatch.setattr(metrics_files, "parse", parsed)
    assert retention.LowestLoss(path.parent).losses == {20: 1 / 20, 40: 1 / 40}
    assert parsed.call_count == 2  # of 40
    assert tracemalloc.get_traced_memory()[1] < 6e5
    tracemalloc.stop()
    assert path.read_text() == "".join(f"{json.dumps(row)}\n" for row in rows[:40])
    assert [row["step"] for row in shown if "expert_load" in row] == [40]


def test_rows_of_a_long_run_in_a_bucket_are_not_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(metrics_files, "in_bucket", lambda _: True)
    path = epath.Path(tmp_path) / METRICS
    (tmp_path / f"{METRICS}.rows").mkdir()
    with contextlib.closing(metrics_files._Segments(path, [b"{}\n"])) as segments:
        for number in (1, 3):
            segments.write(f'{{"step": {number}, "kind": "train"}}\n')
            segments.write(f'{{"step": {number + 1}, "kind": "train"}}\n')
            segments.sync()
            assert not [value for value in vars(segments).values() if value and isinstance(value, list)]
        assert [path.name for path in sorted((tmp_path / f"{METRICS}.rows").iterdir())] == ["000000001", "000000003"]
    assert path.read_text().count("\n") == 5


def test_tensorboard_has_scalars_histograms_over_experts_and_the_config(tmp_path):
    """Means come before layers; left out are the z-loss, whose weight is 0, and values that were never anything but 0
    or K."""
    config = Config(seed=7)
    writer = MetricsWriter(epath.Path(tmp_path), 0, to_dict(config), find_writers(config.train.writers))
    writer.write(3, "train", ROW | {"cross_entropy": 2.0, "skipped": 0, "router_z_loss": [1.0, 2.0]})
    writer.write(3, "heldout/all", {"loss": 2.25, "perplexity": 9.5, "targets": 100, "router_entropy": [1.0, 2.0]})
    writer.write(3, "heldout/a/b", {"loss": 2.0, "router_entropy": [0.5, 0.0]})
    writer.write(3, "timing", {"mfu": 0.5})
    for step, experts in ((4, [2.0, 2.0]), (5, [2.0, 2.0]), (6, [2.0, 1.0])):
        writer.write(step, "train", {"skipped": 5 - step, "active_experts": experts})
    writer.write(5, "warning", {"what": "dead", "experts": [[0, 2]], "text": "no token"})
    writer.close()
    found = {(step, tag): value for step, tag, value in events(tmp_path / "tensorboard")}
    scalars = {key: value.simple_value for key, value in found.items() if value.WhichOneof("value") == "simple_value"}
    assert scalars == {
        (3, "loss/loss"): 2.5,
        (3, "loss/cross_entropy"): 2.0,
        (3, "loss/heldout_all"): 2.25,
        (3, "loss/heldout_a_b"): 2.0,
        (3, "loss_heldout/perplexity_all"): 9.5,
        (3, "routing/router_entropy"): 0.375,
        (3, "routing/router_entropy_heldout_all"): 1.5,
        (3, "routing/router_entropy_heldout_a_b"): 0.25,
        (3, "routing_layers_router_entropy/layer_0"): 0.5,
        (3, "routing_layers_router_entropy/layer_1"): 0.25,
        (3, "routing_layers_router_entropy/heldout_layer_0"): 1.0,
        (3, "routing_layers_router_entropy/heldout_layer_1"): 2.0,
        (3, "speed/mfu"): 0.5,
        (4, "optimizer/skipped"): 1,
        (5, "optimizer/skipped"): 0,
        (6, "optimizer/skipped"): -1,
        (6, "routing/active_experts"): 1.5,
        (6, "routing_layers_active_experts/layer_0"): 2.0,
        (6, "routing_layers_active_experts/layer_1"): 1.0,
    }
    groups = {tag.partition("/")[0] for _, tag in found} - {"config", "warning"}  # texts are shown on a separate page
    assert sorted(groups)[0] == "loss"
    histogram = found[3, "routing_layers_expert_load/layer_1"].histo
    # Bins (0,1], (1,2], (2,3] of experts 0, 1 and 2; their mean is 0.25 * 0.5 + 0.75 * 2.5 = 2.
    assert (list(histogram.bucket_limit), list(histogram.bucket)) == ([1, 2, 3], [0.25, 0.0, 0.75])
    np.testing.assert_allclose(histogram.sum / histogram.num, 2.0)
    assert b'"seed": 7' in found[0, "config/text_summary"].tensor.string_val[0]
    assert (5, "warning/text/text_summary") in found


def test_a_bucket_gets_another_event_file_once_one_is_large(monkeypatch, tmp_path):
    """Each copy is of a whole file: without a limit, a minute of a long run would upload all its events again."""
    clock, copied = itertools.count(1_000_000_000), []
    monkeypatch.setattr(metric_writers, "in_bucket", lambda _: True)
    monkeypatch.setattr(metric_writers, "_LARGEST_EVENTS", 1000)
    monkeypatch.setattr(metric_writers, "write_atomic", lambda path, content: copied.append((path.name, content)))
    clocks = {"time": lambda: next(clock), "monotonic": lambda: next(clock) * 100}
    monkeypatch.setattr(metric_writers, "time", types.SimpleNamespace(**clocks))
    writer = TensorBoard(epath.Path(tmp_path), {}, 0)
    for step in range(1, 31):
        writer.write(step, "train", {"loss": float(step), "text": "x" * 100})
    writer.close()
    names = [name for name, _ in copied]
    assert names == sorted(names)  # an earlier file is not copied again
    assert len(set(names)) > 2
    for name, content in copied:
        (tmp_path / name).write_bytes(content)
    assert [value.simple_value for _, tag, value in events(tmp_path) if tag == "loss/loss"] == list(range(1, 31))
    starts = [path.name for path in tmp_path.iterdir() if any(event.session_log.status for event in records(path))]
    assert starts == names[:1]  # a start hides the events of earlier files


def test_a_clock_that_is_set_back_hides_no_events(monkeypatch, tmp_path):
    """A file of the same second was written again from its beginning; one of an earlier second was read before it."""
    for start, second in enumerate((1_000_000_000, 1_000_000_000, 999_999_000)):
        monkeypatch.setattr(metric_writers.time, "time", lambda second=second: second)
        writer = TensorBoard(epath.Path(tmp_path), {}, start)
        writer.write(start + 1, "train", {"loss": float(start + 1)})
        writer.close()
    assert [value.simple_value for _, tag, value in events(tmp_path / "tensorboard") if tag == "loss/loss"] == [1, 2, 3]


@contextlib.contextmanager
def files_of_at_most(size):
    """Within this context the kernel refuses to write beyond that many bytes of a file, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.timeout(60)
def test_tensorboard_on_a_full_disk_raises_and_leaves_nothing_running(tmp_path, capfd):
    """Its events are written by the caller: a thread that the error ended would be waited for without end."""
    threads = threading.enumerate()
    writer = TensorBoard(epath.Path(tmp_path), {}, 0)
    row = {f"value_{number}": 1.0 + number for number in range(300)}
    with files_of_at_most(2000), pytest.raises(OSError, match="File too large"), contextlib.closing(writer):
        writer.write(1, "train", row)
    del writer
    assert threading.enumerate() == threads
    assert capfd.readouterr().err == ""


def test_writers_are_closed_if_a_later_one_cannot_be_opened(monkeypatch, tmp_path):
    closed = []
    module = types.ModuleType("two_writers")
    module.first = lambda *_: types.SimpleNamespace(write=print, close=lambda: closed.append("first"))
    module.second = lambda *_: {}["missing"]
    monkeypatch.setitem(sys.modules, "two_writers", module)
    writers = find_writers(("two_writers:first", "two_writers:second"))
    with pytest.raises(ConfigError, match=r"^train\.writers='two_writers:second': it raises KeyError"):
        MetricsWriter(epath.Path(tmp_path), 0, to_dict(Config()), writers)
    assert closed == ["first"]


@pytest.mark.parametrize(("name", "kind"), [("wandb", WeightsAndBiases), ("trackio", Trackio)])
def test_a_tracker_continues_a_run_and_takes_histograms(name, kind, monkeypatch, tmp_path):
    calls = []
    stub = types.SimpleNamespace(
        init=lambda **named: calls.append(("init", named)) or run,
        Histogram=lambda np_histogram: [array.tolist() for array in np_histogram],
    )
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append(("log", step, values)), finish=lambda: calls.append(("finish",))
    )
    monkeypatch.setitem(sys.modules, name, stub)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for step in (0, 3):
        writer = kind(epath.Path(tmp_path), {"seed": 7}, step)
        writer.write(step + 1, "train", ROW)
        writer.close()
    (_, first), (_, step, values), _, (_, second), *_ = calls
    assert first == second  # the same id or name: the run is continued
    assert (first["resume"], first["config"]) == ("allow", {"seed": 7})
    assert first.get("mode") == ("offline" if name == "wandb" else None)
    assert (step, values["train/loss"], values["train/router_entropy/1"]) == (1, 2.5, 0.25)
    assert values["train/expert_load/0"] == [[0.5, 0.5, 0.0], [0, 1, 2, 3]]
    assert calls[-1] == ("finish",)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"needs the package {name}"):
        kind(epath.Path(tmp_path), {}, 0)


def test_every_name_is_a_writer():
    assert find_writers(["tensorboard"]) == [TensorBoard]
