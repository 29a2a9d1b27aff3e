"""A pod's run at toy width: what is kept of the config, which mesh, and how two runs are compared."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from moe.config import ConfigError, command_line
from moe.planner import make_plan, real_width, rehearsal
from moe.planner.memory_errors import DoesNotFitError
from moe.routing.interface import GateInputs
from moe.system import shipped

ROOT = Path(__file__).parents[2]


def _config(name):
    return command_line.build_layers(*command_line.layers(str(shipped.find(name)), {}))


def test_the_mesh_is_halved_and_layers_gate_and_exchange_are_kept():
    pod = _config("deepseek_v3")
    made = rehearsal.make(pod, 512, 16, Path("/text"))
    # fsdp -1 x expert 64 of 512 chips is 8 x 64; the larger axis is halved: 8 x 32, 8 x 16, 8 x 8, 4 x 8, 4 x 4.
    split = {axis: size for axis, size in made.mesh.items() if size > 1}
    assert (split, made.pod_mesh["fsdp"], made.devices) == ({"fsdp": 4, "expert": 4}, 8, 16)
    moe = made.config.model.moe
    assert (moe.gate, moe.num_experts, moe.dispatch) == (pod.model.moe.gate, 256, pod.model.moe.dispatch)
    assert (made.config.model.d_model, moe.d_ff, made.config.model.num_layers) == (64, 32, 3 + 4)
    assert made.config.train.batch_size % 16 == 0
    assert {axis: size for axis, size in made.shrunk(0.5).items() if size > 1} == {"fsdp": 2, "expert": 4}


@pytest.mark.parametrize("name", ["mixtral_8x7b", "qwen3_next_80b_a3b", "gpt_oss_20b", "deepseek_v2_lite", "switch_t5"])
def test_every_kind_of_model_can_be_made_small(name):
    assert rehearsal.make(_config(name), 64, 16, Path("/text")).devices == 16


def test_what_cannot_be_halved_is_refused():
    with pytest.raises(ConfigError, match="must multiply to the topology's 24 chips"):
        rehearsal.make(_config("deepseek_v3"), 24, 16, Path("/text"))
    with pytest.raises(ConfigError, match="--devices=2"):
        rehearsal.make(_config("deepseek_v3"), 512, 2, Path("/text"))
    made = rehearsal.make(_config("deepseek_v3"), 64, 4, Path("/text"))  # fsdp 1, expert 4
    with pytest.raises(ConfigError, match="give more --devices"):
        made.shrunk(0.5)


def test_losses_are_compared_step_by_step(tmp_path):
    for name, losses in (("one", (4.0, 3.0, 2.0)), ("other", (4.0, 3.0, 2.5, 2.0))):
        rows = [{"kind": "train", "step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = rehearsal.compare(tmp_path / "one", tmp_path / "other")
    assert (found.steps, found.equal, found.largest) == (3, 2, 0.5 / 2.5)


def test_a_skewed_gate_sends_the_busiest_device_so_many_rows(tmp_path, monkeypatch):
    """Mixtral's 2 of 8 experts over 4 devices: at a skew of 2 a third of the tokens send both choices to the first
    device and the others a quarter of theirs, 1/3 + 2/3 · 1/4 = 1/2 of all, twice the mean."""
    made = rehearsal.make(_config("mixtral_8x7b"), 64, 4, Path("/text"))
    made = dataclasses.replace(made, mesh=dict(made.mesh) | {"expert": 4})
    (tmp_path / "own_skew.py").write_text(rehearsal.skewed_gate(made, 2.0))
    monkeypatch.syspath_prepend(tmp_path)
    gate = importlib.import_module("own_skew").Skewed(k=2)
    logits = jax.random.normal(jax.random.key(0), (2, 2048, 8))
    chosen = gate.route(logits, GateInputs(jnp.ones((2, 2048), bool))).expert_index
    assert float(jnp.mean(chosen < 2)) == pytest.approx(0.5, abs=0.01)
    for skew, says in ((4.5, "must be from 1 to 4"), (0.5, "must be from 1 to 4")):
        with pytest.raises(ConfigError, match=says):
            rehearsal.skewed_gate(made, skew)
    with pytest.raises(ConfigError, match=r"mesh\.expert above 1"):
        rehearsal.skewed_gate(dataclasses.replace(made, mesh=dict(made.mesh) | {"expert": 1}), 2.0)


def test_the_skew_of_a_recorded_run(tmp_path):
    """Four experts on two devices; in the mean of two steps the second layer's first device has 0.7 of all rows."""
    loads = [[[0.25] * 4, [0.4, 0.2, 0.2, 0.2]], [[0.25] * 4, [0.4, 0.4, 0.1, 0.1]]]
    rows = [{"kind": "train", "step": step, "loss": 1.0, "expert_load": load} for step, load in enumerate(loads, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rehearsal.recorded_skew(tmp_path, 2) == pytest.approx(2 * 0.7)
    with pytest.raises(ConfigError, match="has no loads of experts that 3 devices could hold evenly"):
        rehearsal.recorded_skew(tmp_path, 3)


def test_the_real_width_says_what_fits_in_which_round(monkeypatch):
    """A skew of 2 is two rounds of 5/4 of the mean rows; with a capacity there is one, whatever the skew."""
    made = types.SimpleNamespace(
        step_interval=(1.0, 3.0), step_seconds=2.0, memory=types.SimpleNamespace(total=7 * 2**30, capacity=16 * 2**30)
    )
    asked = []
    monkeypatch.setattr(make_plan, "make_plan", lambda *arguments: asked.append(arguments[2].skew) or made)
    dropless, dropping = _dispatched("dropless"), _dispatched("gather")
    fits = "compiled, it takes 7.0 of 16 GiB a device, in each of 2 rounds, and 2 s a step (1 to 3)", True
    assert real_width.compiled(dropless, None, 2.0) == fits
    assert real_width.compiled(dropping, None, 2.0) == (fits[0].replace(", in each of 2 rounds", ""), True)
    assert asked == [2.0, 1.0]

    def refuse(*_):
        raise DoesNotFitError("does not fit: 20 GiB a device of 16", 20 * 2**30)

    monkeypatch.setattr(make_plan, "make_plan", refuse)
    assert real_width.compiled(dropless, None, 2.0) == ("round 1 of 2: does not fit: 20 GiB a device of 16", False)


def test_rounds_of_a_skew():
    assert real_width.rounds(_dispatched("dropless"), 1.0) == ""
    assert "a skew of 2.6 takes 3 rounds" in real_width.rounds(_dispatched("dropless"), 2.6)
    assert "drops tokens" in real_width.rounds(_dispatched("gather"), 2.0)


def _dispatched(dispatch):
    config = _config("olmoe_1b_7b")
    moe = dataclasses.replace(config.model.moe, dispatch=dispatch)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))


PLANTED = """
import dataclasses
import os

from moe.routing.gates import TopK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planted(TopK):
    '''A top-k gate whose weights depend on the process that traced it.'''

    def route(self, router_logits, inputs):
        output = super().route(router_logits, inputs)
        return output._replace(weights=output.weights * (1 + 1e-3 * (os.getpid() % 97)))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("planted", [False, True])
def test_a_killed_run_is_the_undisturbed_one_unless_a_start_changes_the_program(tmp_path, planted):
    (tmp_path / "planted.py").write_text(PLANTED)
    flags = ["--topology=h100:2x2", "--devices=4", "--processes=2", "--kill=1", "--config.mesh.expert=2"]
    if planted:
        flags += ["--config.model.moe.gate=planted:Planted", "--allow_module=planted"]
    command = [sys.executable, "scripts/rehearse.py", "--config=configs/tiny.py", *flags]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == int(planted), ended.stdout + ended.stderr
    assert ("DIFFERENT" in ended.stdout) == planted
    assert "the others ended with 75" in ended.stdout
