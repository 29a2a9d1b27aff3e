"""Resuming with other settings: more steps, another rate, dispatch or mesh."""

import contextlib
import dataclasses
import json
import shutil
import types

import jax
import numpy as np
import pytest
from etils import epath

from moe.checkpoints import workdir as workdirs
from moe.checkpoints.workdir import read_config
from moe.config import Config, ConfigError, OptimizerConfig, TrainConfig, to_dict
from moe.training import start_run
from moe.training.train import train
from tests.run_helpers import ONE, SETTINGS, Interrupted, compile_once, interrupted, rows, tiny

# Most runs of a file are the same program.
pytestmark = pytest.mark.usefixtures("compilation_cache")


def test_a_shortened_run_has_no_rows_after_its_end(directory, programs, tmp_path):
    settings, run = SETTINGS | {"train.eval_every": 2, "train.save_every": 4}, str(tmp_path / "run")
    with interrupted(7), pytest.raises(Interrupted):
        train(tiny(directory, **settings | {"train.num_steps": 12}), run, ONE, make_program=programs, quiet=True)
    short = tiny(directory, **settings | {"train.num_steps": 4})
    train(short, run, ONE, make_program=programs, allow_changes=True, quiet=True)
    assert [row["step"] for row in rows(tmp_path / "run", "train")] == [1, 2, 3, 4]


def test_a_finished_run_continues_with_more_steps_and_another_rate(directory, whole, tmp_path, capsys):
    """Four more steps at a constant rate: refused without the flag, recorded with it, and exact when interrupted."""
    make = compile_once()  # another schedule needs another compiled program
    changes = {"train.num_steps": 10, "optimizer.schedule": "constant", "optimizer.learning_rate": 5e-3}
    config = tiny(directory, **SETTINGS | changes | {"train.eval_every": 5})
    for name in ("run", "stopped"):
        shutil.copytree(whole, tmp_path / name)
    with pytest.raises(ConfigError, match=r"optimizer\.schedule .*train\.num_steps .*, or add --change to go on"):
        train(config, str(tmp_path / "run"), ONE, make_program=make)
    other = dataclasses.replace(config, seed=1)
    with pytest.raises(ConfigError, match=r"set back seed \(there 0, here 1\)$"):
        train(other, str(tmp_path / "run"), ONE, make_program=make, allow_changes=True)
    train(config, str(tmp_path / "run"), ONE, make_program=make, allow_changes=True)
    assert "changed from step 6 on: optimizer.learning_rate 0.01 to 0.005" in capsys.readouterr().out
    recorded = [json.loads(line) for line in (tmp_path / "run" / "changes.jsonl").read_text().splitlines()]
    assert [row["step"] for row in recorded] == [6]
    assert recorded[0]["changes"]["train.num_steps"] == [6, 10]
    assert read_config(tmp_path / "run") == config
    logged = rows(tmp_path / "run", "train")
    assert logged[:6] == rows(whole, "train")
    assert [row["step"] for row in logged] == [*range(1, 11)]
    np.testing.assert_allclose([row["learning_rate"] for row in logged[6:]], 5e-3, rtol=1e-6)
    assert [row["step"] for row in rows(tmp_path / "run", "heldout/all")] == [6, 10]
    with interrupted(9), pytest.raises(Interrupted):
        train(config, str(tmp_path / "stopped"), ONE, make_program=make, allow_changes=True, quiet=True)
    train(config, str(tmp_path / "stopped"), ONE, make_program=make, quiet=True)
    for name in ("metrics.jsonl", "report.txt", "changes.jsonl", "config.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_hosts_that_decide_which_rows_are_rounded_are_not_free(directory, tmp_path):
    """In float8 the rows for experts on other hosts are rounded, which moved gradients by 2.7 %."""
    path = epath.Path(tmp_path)
    moe = {"model.moe.dispatch": "dropless", "mesh.expert": 4, "model.moe.num_experts": 4}
    low = {"model.low_precision": "float8"}
    for settings, is_free in ((moe, True), (moe | low, True), (moe | low | {"model.low_precision_in": "all"}, False)):
        one, two = (tiny(directory, **settings | {"model.moe.exchange_hosts": hosts}) for hosts in (1, 2))
        workdirs.write_config(one, path)
        if is_free:
            assert not workdirs.refuse_other_run(two, path)
        else:
            with pytest.raises(ConfigError, match=r"set back model\.moe\.exchange_hosts \(there 1, here 2\)$"):
                workdirs.refuse_other_run(two, path, allow_changes=True)
        for config in (one, two):  # and each start says which rows they are
            program = types.SimpleNamespace(config=config, mesh=types.SimpleNamespace(shape={"expert": 4}))
            rounded = not is_free and config is two
            assert ("exchange_hosts=2) are rounded to float8" in start_run._description(program)) == rounded


def test_a_run_may_only_end_at_an_evaluated_step(directory, programs, tmp_path):
    """Another end is refused before anything is recorded, since the report shows the last evaluation."""
    settings = SETTINGS | {"train.eval_every": 6, "train.save_every": 2}
    with interrupted(5), pytest.raises(Interrupted):
        train(tiny(directory, **settings), str(tmp_path), ONE, make_program=programs, quiet=True)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"train\.num_steps=4: this step was not evaluated; end the run at a later"):
        train(
            tiny(directory, **settings | {"train.num_steps": 4}),
            str(tmp_path), ONE, make_program=programs, allow_changes=True, quiet=True,
        )  # fmt: skip
    assert (tmp_path / "config.json").read_bytes() == before
    assert not (tmp_path / "changes.jsonl").exists()


@pytest.mark.parametrize(("kind", "words"), [("train", "evaluated"), ("heldout/all", "logged")])
def test_the_last_step_of_a_shortened_run_needs_both_rows_of_the_report(tmp_path, kind, words):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 4, "kind": kind}))
    changes = {"train.num_steps": [8, 4]}
    config = Config(train=TrainConfig(num_steps=4), optimizer=OptimizerConfig(warmup_steps=0))
    with pytest.raises(ConfigError, match=f"train.num_steps=4: this step was not {words}; end the run at a later one"):
        start_run._apply_changes(config, changes, 4, epath.Path(tmp_path), print)


@pytest.mark.slow
def test_optimizer_moments_may_move_between_device_and_host(directory, whole, tmp_path):
    with interrupted(3), pytest.raises(Interrupted):
        train(tiny(directory, **SETTINGS | {"optimizer.memory": "host"}), str(tmp_path), ONE, quiet=True)
    train(tiny(directory, **SETTINGS), str(tmp_path), ONE, quiet=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_the_dispatch_may_change_only_where_nothing_can_be_dropped(directory, tmp_path):
    """Capacity 1.25 drops; 4 = E / K does not, since C is then S."""
    for factor, refused in ((1.25, True), (4.0, False)):
        settings = {"model.moe.capacity.train": factor, "model.moe.capacity.eval": 4.0}
        theirs, ours = (tiny(directory, **settings, **{"model.moe.dispatch": mode}) for mode in ("gather", "dropless"))
        (tmp_path / "config.json").write_text(json.dumps(to_dict(theirs)))
        with pytest.raises(ConfigError, match=r"model\.moe\.dispatch") if refused else contextlib.nullcontext():
            assert workdirs.refuse_other_run(ours, epath.Path(tmp_path)) == {}


#: (devices, mesh, dispatch) of one run's starts; nothing is dropped, so that all of them compute the same.
TRAVELS = [
    (8, {"mesh.data": 2, "mesh.expert": 4}, "gather"),
    (4, {"mesh.data": 1, "mesh.expert": 2, "mesh.fsdp": 2}, "einsum"),
    (2, {"mesh.data": 1, "mesh.tensor": 2}, "dropless"),
    (1, {}, "gather"),
    (8, {"mesh.data": 1, "mesh.fsdp": 2, "mesh.expert": 2, "mesh.tensor": 2}, "dropless"),
]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_resumes_on_other_meshes_with_equal_losses(directory, tmp_path, capsys):
    """Two steps on each of 8, 4, 2, 1 and 8 devices, against ten steps on one."""
    settings = SETTINGS | {"train.num_steps": 10, "train.eval_every": 10}
    settings |= {"model.moe.capacity.train": 8.0, "model.moe.capacity.eval": 8.0}
    train(tiny(directory, **settings), str(tmp_path / "still"), ONE, quiet=True)
    for number, (count, mesh, dispatch) in enumerate(TRAVELS):
        config = tiny(directory, **settings, **mesh, **{"model.moe.dispatch": dispatch})
        with interrupted(2 * number + 3), contextlib.suppress(Interrupted):
            train(config, str(tmp_path / "moved"), jax.devices()[:count], quiet=True)
    still, moved = (rows(tmp_path / name, "train") for name in ("still", "moved"))
    with capsys.disabled():
        print(
            "\nstep  devices  mesh, dispatch                                            loss  on one device  difference"
        )
        for one, other in zip(still, moved, strict=True):
            count, mesh, dispatch = TRAVELS[(one["step"] - 1) // 2]
            sizes = " ".join(f"{axis.removeprefix('mesh.')} {size}" for axis, size in mesh.items())
            print(
                f"{one['step']:4}  {count:7}  {sizes + ', ' + dispatch:52} {other['loss']:9.6f}  {one['loss']:13.6f}  "
                f"{abs(other['loss'] - one['loss']):.1e}"
            )
    assert [row["step"] for row in moved] == [*range(1, 11)]
    np.testing.assert_allclose([row["loss"] for row in moved], [row["loss"] for row in still], rtol=1e-4)
