"""The whole loop on tiny text: files, bit-for-bit resumption, and equal curves on every mesh."""

import contextlib
import dataclasses
import importlib
import math
import re
import shutil
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from moe import NextToken
from moe.config import Config, ConfigError, DataConfig, MeshConfig, TrainConfig
from moe.config.objectives import find_objective
from moe.data.preparation import Prepared
from moe.models import flops
from moe.parallel import target
from moe.parallel.mesh import make_mesh
from moe.routing.balancing import BalanceSums, LayerReport
from moe.system.metrics_files import read_rows
from moe.training import agreement, evaluation, metrics, open_run, profiling
from moe.training import train as train_module
from moe.training.evaluation import Heldout, _summary, check_domains, evaluate, sum_variance
from moe.training.metrics import Throughput
from moe.training.train import train
from moe.training.update import EvalMetrics
from tests.helpers import slow_case, tiny_model
from tests.run_helpers import ONE, SETTINGS, Interrupted, interrupted, state_of, tiny

# Most runs of this file share one program.
pytestmark = pytest.mark.usefixtures("compilation_cache")


def train_rows(workdir):
    return [row for row in read_rows(workdir / "metrics.jsonl") if row["kind"] == "train"]


def test_a_run_writes_its_documented_files_and_says_when_it_is_done(directory, tmp_path, capsys, pictures):
    config = tiny(directory, **{"model.num_layers": 1})
    with profiling.profiled(profiling.Steps(4, 5), str(tmp_path / "run")) as make_program:
        train(config, str(tmp_path / "run"), ONE, make_program=make_program)
    out = capsys.readouterr().out
    for word in ("unigram loss", "tiny_text", "dropped, %", "a continuation, tiny_text/split"):
        assert word in out
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {
        ".lock",
        "config.json",
        "tokenizer.model",
        "metrics.jsonl",
        "timing.jsonl",
        "tensorboard",
        "checkpoints",
        "profile",
        "report.txt",
        "training.png",
    }
    (trace,) = (tmp_path / "run" / "profile" / "plugins" / "profile" / "steps_4-5").glob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    names = {event.name for plane in planes for line in plane.lines for event in line.events}
    assert "train" in names
    assert any("train_step" in name for name in names)  # and XLA's execution of it
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [(row["step"], row["kind"]) for row in rows] == [
        (2, "train"),
        (3, "heldout/all"),
        (3, "heldout/tiny_text/split"),
        (4, "train"),
        (6, "train"),
        (6, "heldout/all"),
        (6, "heldout/tiny_text/split"),
    ]
    timing = read_rows(tmp_path / "run" / "timing.jsonl")
    assert [row["step"] for row in timing] == [2, 4, 6]
    assert all(0 <= row["data_wait_share"] <= 1 and row["tokens_per_second"] > 0 for row in timing)
    assert rows[-2]["loss"] < rows[1]["loss"]  # three more steps reduce the loss
    assert np.shape(rows[0]["expert_load"]) == (1, 8)  # per layer and expert
    np.testing.assert_allclose(np.sum(rows[0]["expert_load"], axis=1), 1, rtol=1e-6)
    assert (tmp_path / "run" / "training.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    train(config, str(tmp_path / "run"), ONE)
    assert "is done: 6 steps were trained" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_without_a_terminal_every_logged_step_is_a_line(whole, programs, tmp_path, capsys):
    config, workdir = whole
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    (tmp_path / "run" / "report.txt").unlink()
    train(config, str(tmp_path / "run"), ONE, make_program=programs)
    lines = capsys.readouterr().err.splitlines()
    heldout = r" heldout \d\.\d{3} ± \d\.\d{3} \([\d,]+ tokens\)"
    speed = r"( tokens/s [\d,]+)?"
    rest = r" dropped \d+\.\d % lr [\d.e-]+ epoch [\d.]+( MFU \d+ %)?"
    pattern = rf"step (\d)/6 \([^)]*\) loss \d\.\d{{3}}({heldout})?{speed}{rest}"
    matches = [re.fullmatch(pattern, line) for line in lines if line.startswith("step")]
    # Step 4 is the first one after this start: its speed would include the compilation.
    assert [(match[1], bool(match[2]), bool(match[3])) for match in matches] == [("4", False, False), ("6", True, True)]
    assert re.search(r"\] preparing the data\n.*\] compiling the train step", "\n".join(lines), re.DOTALL)
    report = (tmp_path / "run" / "report.txt").read_text()
    assert "dropped, %: held-out, training (first and last logged row)" in report
    last = 100 * train_rows(tmp_path / "run")[-1]["fraction_tokens_dropped"][0]
    assert report.split("MoE layer 0")[1].splitlines()[0].endswith(f" {last:5.2f}")


def test_the_standard_error_of_a_heldout_loss_by_hand():
    """Rows of 6 nats in 2 targets and of 2 nats in 2: loss 2, residuals 2 and -2, variance of the sum 2/1 x 8 = 16."""
    nll, targets = np.asarray([6.0, 2.0, 0.0]), np.asarray([2.0, 2.0, 0.0])  # the last row is padding
    assert sum_variance(nll, targets) == 16
    summary = _summary(np.asarray([8.0, 4.0, 16.0]), 16.0, [])
    assert (summary["loss"], summary["standard_error"]) == (2, 1)  # sqrt(16) / 4
    assert summary["bits_per_byte"] == pytest.approx(8 / math.log(2) / 16)  # 8 nats in 16 bytes
    assert sum_variance(nll[1:], targets[1:]) is None
    assert "standard_error" not in _summary(np.asarray([2.0, 2.0, 8.0]), None, [])


@pytest.mark.parametrize(("objective", "sentinels"), [("span_corruption", 0), ("causal", 12)])
def test_sentinels_that_are_pieces_of_a_tokenizer_have_no_bytes(objective, sentinels):
    tokenizer = types.SimpleNamespace(
        vocab_size=102, token_bytes=np.asarray([0, 5] + 100 * [12]), piece_id=lambda piece: 2 + int(piece[10:-1])
    )
    settings = types.SimpleNamespace(model=types.SimpleNamespace(vocab_size=103), objective=find_objective(objective))
    sizes = evaluation.token_bytes(types.SimpleNamespace(config=settings), types.SimpleNamespace(tokenizer=tokenizer))
    assert sizes.tolist() == [0, 5, *100 * [sentinels], 0]


def test_the_error_over_domains_adds_their_variances(monkeypatch):
    """Two domains of the rows above: variances of 16 each, 8 targets."""
    monkeypatch.setattr(evaluation, "place", lambda batch, mesh: batch)
    rows = EvalMetrics(np.asarray([6.0, 2.0]), np.asarray([2, 2]), np.asarray(16), None)
    program = types.SimpleNamespace(eval_step=lambda variables, batch, sizes: rows, mesh=None)
    found = evaluate(program, {}, Heldout({"a": [{}], "b": [{}]}, np.zeros(3)))
    assert found["a"]["standard_error"] == 1
    assert found["all"]["standard_error"] == pytest.approx(math.sqrt(16 + 16) / 8)
    # Without the variance of one domain, which has a single row, there is none of the total.
    one = EvalMetrics(np.asarray([6.0]), np.asarray([2]), np.asarray(8), None)
    program.eval_step = lambda variables, batch, sizes: batch["rows"]
    found = evaluate(program, {}, Heldout({"a": [{"rows": rows}], "b": [{"rows": one}]}, np.zeros(3)))
    assert found["a"]["standard_error"] == 1
    assert found["all"]["loss"] == 14 / 6
    assert "standard_error" not in found["all"]
    assert "standard_error" not in found["b"]


def test_a_domain_of_only_padding_has_no_routing_to_report(monkeypatch):
    monkeypatch.setattr(evaluation, "place", lambda batch, mesh: batch)
    zeros = {field.name: jnp.zeros(1) for field in dataclasses.fields(LayerReport)}
    layers = LayerReport(**zeros | {"sums": BalanceSums(*[jnp.zeros(1)] * len(dataclasses.fields(BalanceSums)))})
    real, padding = (EvalMetrics(np.ones(1), np.asarray([n]), np.asarray(8), layers) for n in (2, 0))
    program = types.SimpleNamespace(eval_step=lambda variables, batch, sizes: batch, mesh=None)
    found = evaluate(program, {}, Heldout({"a": [real, padding], "b": [padding]}, np.zeros(3)))
    assert ["router_entropy" in found[domain] for domain in ("all", "a", "b")] == [True, True, False]


def test_mfu_is_relative_to_the_rate_of_all_devices(monkeypatch):
    config = Config(model=tiny_model())
    monkeypatch.setattr(profiling, "measured_matmul_rate", lambda dtype: 1e6)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=4))):
        row = Throughput(config).row(2.0, 0.5)
    assert row["mfu"] == pytest.approx(flops.train_flops(config) / 2.0 / 8e6)
    assert row["tokens_per_second"] == config.train.batch_size * config.data.sequence_length / 2.0
    assert row["data_wait_share"] == 0.5 / 2.0
    assert "mfu_datasheet" not in row  # of a CPU no peak is known
    monkeypatch.setattr(target, "current", lambda: types.SimpleNamespace(peak_flops=5e5))
    with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=4))):
        row = Throughput(config).row(2.0, 0.5)
    assert row["mfu_datasheet"] == pytest.approx(flops.train_flops(config) / 2.0 / 4e6)


def test_seconds_of_a_step_and_of_its_wait_for_data(monkeypatch):
    """Two steps in eight seconds, which wait from 1 to 2 and from 4 to 6; the next interval begins at 8."""
    times = iter([0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 8.0, 9.0, 11.0, 12.0, 12.0])
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(perf_counter=lambda: next(times)))
    clock = metrics.StepClock()
    for _ in range(2):
        with clock:
            pass
    assert clock.lap() == (8 / 2, (1 + 2) / 2)
    with clock:
        pass
    assert clock.lap() == (4, 2)


def test_a_domain_called_all_does_not_replace_the_total():
    prepared = types.SimpleNamespace(domains=("all",))
    with pytest.raises(ConfigError, match="no domain may be called 'all'"):
        check_domains(prepared)


# log_every=4 does not divide save_every=3: the metrics of steps 1..3 must survive in the checkpoint.
WHOLE = SETTINGS | {"train.log_every": 4, "train.eval_every": 3, "train.save_every": 3, "train.sample_tokens": 4}


@pytest.fixture(scope="module")
def whole(directory, programs, tmp_path_factory):
    """(config, workdir) of an uninterrupted run."""
    config = tiny(directory, **WHOLE)
    workdir = tmp_path_factory.mktemp("whole")
    train(config, str(workdir), ONE, make_program=programs)
    return config, workdir


@pytest.mark.parametrize("stop_at", [slow_case(1), 4, slow_case(5)])
def test_resume_is_exact(whole, programs, tmp_path, stop_at):
    config, whole = whole
    broken = tmp_path / "broken"
    with interrupted(stop_at + 1), pytest.raises(Interrupted):
        train(config, str(broken), ONE, make_program=programs)
    train(config, str(broken), ONE, make_program=programs)
    assert (whole / "metrics.jsonl").read_bytes() == (broken / "metrics.jsonl").read_bytes()
    assert (whole / "report.txt").read_bytes() == (broken / "report.txt").read_bytes()
    program = programs(config, make_mesh(config.mesh, ONE))
    jax.tree.map(np.testing.assert_array_equal, *(state_of(program, workdir, 6) for workdir in (whole, broken)))


MESHES = [
    (1, {}),
    (4, {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2}),
    (8, {"mesh.expert": 8, "mesh.data": 1}),
    (8, {"mesh.data": 1, "mesh.fsdp": 2, "mesh.expert": 2, "mesh.tensor": 2}),
]


@pytest.mark.slow
def test_one_curve_on_every_mesh(directory, tmp_path):
    # One layer and only steps, since compiling takes most of the time. tests/parallel/test_sharding.py has more layers.
    settings = {"train.log_every": 1, "model.moe.gate": "gshard", "train.sample_tokens": 0, "model.num_layers": 1}
    settings |= {"train.eval_every": 6, "train.save_every": 6, "model.moe.dispatch": "gather"}
    curves = []
    for index, (count, mesh) in enumerate(MESHES):
        config = tiny(directory, **settings, **mesh)
        train(config, str(tmp_path / str(index)), devices=jax.devices()[:count])
        curves.append(train_rows(tmp_path / str(index)))
    for curve in curves[1:]:
        for name in ("cross_entropy", "loss", "fraction_tokens_dropped", "load_balancing_loss"):
            ours, first = ([row[name] for row in rows] for rows in (curve, curves[0]))
            np.testing.assert_allclose(ours, first, rtol=2e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_run_moves_to_another_mesh(directory, tmp_path):
    settings = {"train.sample_tokens": 0, "model.moe.dispatch": "gather"}
    config = tiny(directory, **settings)
    train(config, str(tmp_path / "still"), ONE)
    moved = tiny(directory, **settings, **{"mesh.data": 1, "mesh.expert": 4})
    with interrupted(6), pytest.raises(Interrupted):
        train(config, str(tmp_path / "moved"), ONE)
    train(moved, str(tmp_path / "moved"), devices=jax.devices()[:4])
    still, moved_rows = train_rows(tmp_path / "still"), train_rows(tmp_path / "moved")
    assert [row["step"] for row in moved_rows] == [2, 4, 6]
    np.testing.assert_allclose(moved_rows[-1]["loss"], still[-1]["loss"], rtol=1e-4)


@pytest.mark.slow
def test_accumulated_microbatches_are_the_batch(directory, tmp_path):
    # A dense model: with experts, the balancing loss is a mean of products, which microbatches change.
    for name, steps in (("one", 1), ("four", 4)):
        overrides = {"model.moe.gate": "none", "train.accumulation_steps": steps, "train.batch_size": 8}
        config = tiny(directory, **overrides, **{"train.log_every": 1, "train.sample_tokens": 0})
        train(config, str(tmp_path / name), ONE)
    one, four = train_rows(tmp_path / "one"), train_rows(tmp_path / "four")
    for name in ("cross_entropy", "gradient_norm"):
        np.testing.assert_allclose([r[name] for r in four], [r[name] for r in one], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "switch", "gshard", "mixtral"])
def test_every_layer_trains_from_its_config_file(directory, tmp_path, name):
    tree = importlib.import_module(f"configs.{name}").get_config()
    config = tiny(directory, tree, **{"train.num_steps": 4, "train.sample_tokens": 0, "model.dtype": "bfloat16"})
    train(config, str(tmp_path), ONE)
    losses = [row["cross_entropy"] for row in train_rows(tmp_path)]
    assert losses[-1] < losses[0]


def test_a_new_run_gets_the_streams_that_its_hosts_need_and_keeps_them(monkeypatch):
    config, said = Config(train=TrainConfig(batch_size=64)), []
    mesh = make_mesh(config.mesh, ONE)
    assert open_run._with_streams(config, mesh, None, said.append) == config
    hosts = {i: np.arange(4 * i, 4 * i + 4) for i in range(16)}
    monkeypatch.setattr(open_run, "rows_by_process", lambda mesh, rows: hosts)
    monkeypatch.setattr(jax, "process_count", lambda: 16)
    begun = open_run._with_streams(config, mesh, None, said.append)
    assert begun.data.streams == 16
    assert said == ["data.streams: 16, so that each process has whole streams"]
    for own in (config, begun):  # on any hosts, both the default and the chosen number belong to the run
        assert open_run._with_streams(own, mesh, begun, said.append) == begun
    assert open_run._with_streams(config, mesh, config, said.append) == config


def test_a_pipeline_without_microbatches_is_refused_on_several_hosts(directory, tmp_path, monkeypatch):
    """The refusal comes before rows are assigned to processes, among which they could not be divided."""
    config = tiny(directory, **{"mesh.pipeline": 2, "mesh.data": 2, "train.batch_size": 6})
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"train\.accumulation_steps=1: must be a multiple of mesh\.pipeline=2"):
        train(config, str(tmp_path / "run"), jax.devices()[:4], quiet=True)


class Own(NextToken):
    """An objective of a user's module."""


@pytest.fixture
def gathered(monkeypatch):
    """This process as one of two: (digests of process 0, whether this is process 1, which gathers both)."""
    digests, is_second = [], [False]

    def gather(digest):
        if is_second[0]:
            return np.stack([digests.pop(0), digest])
        digests.append(digest)
        return np.stack([digest, digest])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(agreement.multihost_utils, "process_allgather", gather)
    return digests, is_second


def test_processes_with_another_config_or_other_documents_are_refused(gathered):
    digests, is_second = gathered
    config = Config()
    prepared = Prepared(types.SimpleNamespace(files={"tokenizer.model": b"t"}), ("a",), {"a": ["x"]}, {}, {"a": "1"})
    agreement.refuse_other_inputs(config, prepared)
    kept, is_second[0] = list(digests), True
    local = dataclasses.replace(config, data=dataclasses.replace(config.data, directory="/local"))
    agreement.refuse_other_inputs(local, prepared)
    for own, documents, words in (
        (dataclasses.replace(config, seed=1), prepared, "--config: process 1 has another config than process 0"),
        (config, dataclasses.replace(prepared, versions={"a": "2"}), "data.dataset='embedded': process 1 has other"),
        (config, dataclasses.replace(prepared, train={"a": ["x", "y"]}), "process 1 has other documents"),
    ):
        digests[:] = kept
        with pytest.raises(ConfigError, match=words):
            agreement.refuse_other_inputs(own, documents)


def test_processes_whose_own_code_computes_something_else_are_refused(gathered):
    digests, is_second = gathered
    config = Config(data=DataConfig(objective=f"{__name__}:Own"))
    agreement.refuse_other_code(config, {"computed": "1", "under": "2"})
    agreement.refuse_other_code(config, {})  # without own code
    (kept,), is_second[0] = list(digests), True
    agreement.refuse_other_code(config, {"computed": "1", "under": "2"})
    digests[:] = [kept]
    with pytest.raises(ConfigError, match=r"tests\.training\.test_train: the code computes something else in pro"):
        agreement.refuse_other_code(config, {"computed": "3", "under": "2"})


@pytest.mark.parametrize("name", ["config.json", "report.txt"])
@pytest.mark.parametrize(("appears_after", "pauses"), [(3, [1, 2]), (1000, [1, 2, 4, 8, 16, 32, 64, 0])])
def test_a_workdir_that_another_process_does_not_see_is_refused_after_a_while(
    gathered, tmp_path, monkeypatch, appears_after, pauses, name
):
    """A network file system may show the files of process 0 late; on a local disk they never appear."""
    digests, is_second = gathered
    here, there, slept = epath.Path(tmp_path / "0"), epath.Path(tmp_path / "1"), []
    for workdir in (here, there):
        workdir.mkdir()
    (here / name).write_text("{}")
    agreement.refuse_other_workdir(here)
    digests *= 10
    is_second[0] = True

    def pause(seconds):
        slept.append(seconds)
        if sum(slept) >= appears_after:
            (there / name).write_text("{}")

    monkeypatch.setattr(agreement.time, "sleep", pause)
    with contextlib.nullcontext() if appears_after == 3 else pytest.raises(ConfigError, match="process 1 finds other"):
        agreement.refuse_other_workdir(there)
    assert slept == pauses


def test_processes_wait_for_the_report(directory, whole, tmp_path, monkeypatch):
    """JAX aborts all of them five minutes after the first has left."""
    shutil.copytree(whole[1], tmp_path / "run")
    (tmp_path / "run" / "report.txt").unlink()
    order = []
    monkeypatch.setattr(train_module, "finish", lambda *_: order.append("report"))
    monkeypatch.setattr(train_module.multihost_utils, "sync_global_devices", order.append)
    train(tiny(directory, **WHOLE), str(tmp_path / "run"), ONE, quiet=True)
    assert order == ["report", "report written"]


def test_a_workdir_belongs_to_one_config(directory, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole[1], workdir)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"set back .*model\.moe\.gate \(there 'mixtral', here 'switch'\)"):
        train(tiny(directory, **WHOLE | {"model.moe.gate": "switch"}), str(workdir), ONE)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_a_refused_run_ends_its_reader(directory, whole, programs, tmp_path):
    """A thread that is still making a batch when Python ends would abort the process, whatever its exit code."""
    before = set(threading.enumerate())
    config = tiny(directory, **SETTINGS, **{"start.checkpoint": str(whole[1]), "start.expert_noise": 0.1})
    with pytest.raises(ConfigError, match=r"start.expert_noise=0.1: is read only where experts") as refused:
        train(config, str(tmp_path / "run"), ONE, make_program=programs)
    assert refused.tb  # as at the end of a program, the error holds what the run has opened
    assert not [thread.name for thread in set(threading.enumerate()) - before if "prefetch" in thread.name]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"mesh.expert": 3}, "must multiply to the number of devices, 8"),
        ({"data.sequence_length": 8192}, "has only"),
        ({"data.dataset": "nowhere"}, "data.dataset"),
        ({"model.vocab_size": 300_000}, "vocab"),
    ],
)
def test_nothing_is_written_for_an_impossible_run(directory, tmp_path, overrides, words):
    with pytest.raises(ConfigError, match=words):
        train(tiny(directory, **overrides), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
