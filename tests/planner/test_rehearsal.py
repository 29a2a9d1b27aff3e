"""A pod's run at toy width: what is kept of the config, which mesh, and how two runs are compared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe.config import ConfigError, command_line
from moe.planner import rehearsal
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
