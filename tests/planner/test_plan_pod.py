"""The program plan_pod.py around plans of a given program; nothing is compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe.planner import kept_plans, register
from moe.system import shipped
from tests.helpers import slow_case

ROOT = Path(__file__).parents[2]

#: Runs plan_pod.py for one H100, with the same program for every config; the remat policy "hidden" does not fit.
SCRIPT = """
import sys
from pathlib import Path
import jax
from moe.planner import arithmetic, compiled, make_plan, memory_errors, topology
from moe.planner.gpus import GPUS
from moe.system import shipped
from moe.programs import plan_pod
from tests.planner.test_planner_details import PROGRAM

def read_or_compile(config, where, programs):
    if config.model.remat == "hidden":
        raise memory_errors.DoesNotFitError("does not fit: the program", 0)
    memory = compiled.Memory(2**30, 2 * 2**30, 0, 3 * 2**30, 0, 5 * 2**30, 79 * 2**30)
    return compiled.CompiledStep(PROGRAM, memory, arithmetic.Flops(2e12, 0.0, 1e12), 1.0, "abc1234")

make_plan.read_or_compile = read_or_compile
topology.get_topology = lambda *_: topology.Topology("h100:1x1", 1, GPUS["h100"], tuple(jax.devices()[:1]))
shipped.PLANS = Path("plans.json")
plan_pod._TABLE = Path("docs/results/plans.md")
plan_pod._PREDICTIONS = Path("predictions.jsonl")
plan_pod.run()
"""

SMALL = {
    "num_layers": 2, "vocab_size": 512, "d_model": 64, "d_ff": 128, "moe.dispatch": "dropless",
}  # fmt: skip


def _plan_pod(folder, *flags):
    done = _run(folder, *flags)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _run(folder, *flags):
    command = [sys.executable, "-c", SCRIPT, f"--config={ROOT}/configs/mixtral_8x7b.py", "--topology=h100:1x1"]
    command += [f"--config.model.{name}={value}" for name, value in SMALL.items()]
    command += [f"--config.mesh.{axis}=1" for axis in ("data", "fsdp", "expert")]
    command += ["--config.train.batch_size=1", f"--cache={folder}", "--json", *flags]
    command += ["--config.data.sequence_length=512"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder, env=environment)


@pytest.mark.parametrize(
    ("flags", "is_read"), [((), True), slow_case(("--compile",), False), (("--config.train.batch_size=1",), False)]
)
def test_a_kept_plan_is_read_unless_settings_or_compile_ask_for_another(tmp_path, flags, is_read):
    of_slice = {"config": "tiny", "slices": ["h100:1x1"], "topology": "h100:1x1"}
    kept = kept_plans.best(kept_plans.read(shipped.PLANS), "mixtral_8x7b", "h100:8x8") | of_slice
    (tmp_path / "plans.json").write_text(json.dumps([kept]))
    command = [sys.executable, "-c", SCRIPT, "--config=tiny", "--topology=h100:1x1", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ("A kept plan, read and not made" in done.stdout) == is_read
    assert ("compiled in 1.0 s" in done.stdout) != is_read
    assert kept_plans.sentence(kept).partition(";")[0] in done.stdout  # at the end of a plan that is made, too


def test_a_plan_with_a_what_if_is_not_kept(tmp_path):
    refused = _run(tmp_path, "--record", "--bandwidth=2")
    assert "--bandwidth: is not read with --record, whose plans have no what-if" in refused.stderr
    assert not (tmp_path / "plans.json").exists()


def test_a_plan_is_registered_once(tmp_path):
    refused = _run(tmp_path, "--register=Mine", "--bandwidth=2", "--changes=1")
    assert "--register: is not read with what-ifs, of which no number will be published" in refused.stderr
    page = tmp_path / "docs" / "results" / "plans.md"
    page.parent.mkdir(parents=True)
    page.write_text("")
    plan = _plan_pod(tmp_path, "--register=Mine", "--changes=1")
    (entry,) = register.read(tmp_path / "predictions.jsonl")
    assert (entry["model"], entry["seconds"], entry["prices"]) == ("Mine", plan["step_seconds"], plan["prices"])
    assert entry["made_from"] == "compiled program"
    assert entry["settings"]["config"] == "mixtral_8x7b"
    assert "this plan was registered on" in _run(tmp_path, "--register=Mine", "--changes=1").stderr


@pytest.mark.slow
def test_changes_are_counted_in_the_scenario_of_the_plan(tmp_path):
    """All policies have the same program here, so that none is faster than another at any share of the peak."""
    for share in (0.01, 0.02):  # the second run finds the plans of the first
        plan = _plan_pod(tmp_path, f"--matmul_share={share}", "--changes=20")
        of_policies = [each["plan"] for each in plan["changes"] if each["label"].startswith("model.remat=")]
        found = [each for each in of_policies if "error" not in each]
        assert len(found) == 3  # outputs, attention and offload; not hidden
        for each in found:
            assert each["scenario"] == plan["scenario"]
            assert each["step_seconds"] == pytest.approx(plan["step_seconds"])


def test_a_policy_chosen_by_fit_is_kept_and_not_tried_as_a_change(tmp_path):
    """The policy "hidden" does not fit, so "outputs" is chosen: the kept plan sets it, and no change tries it again."""
    page = tmp_path / "docs" / "results" / "plans.md"
    page.parent.mkdir(parents=True)
    page.write_text("<!-- plans: made by scripts/plan_pod.py --record -->\n<!-- end of plans -->\n")
    gate = ("--config.model.moe.gate=deepseek_moe", "--config.model.moe.gate.k=2")
    plan = _plan_pod(tmp_path, "--config.model.remat=fit", "--record", "--changes=20", *gate)
    assert plan["remat"] == "outputs"
    (kept,) = json.loads((tmp_path / "plans.json").read_text())
    assert kept["config"] == "mixtral_8x7b"
    assert kept["flags"]["model.remat"] == "outputs"
    assert (kept["flags"]["model.moe.gate"], kept["flags"]["model.moe.gate.k"]) == ("deepseek_moe", 2)
    assert {each["plan"].get("remat") for each in plan["changes"] if each["label"].startswith("model.remat=")} == {
        None, "attention", "offload", "full",
    }  # fmt: skip
    others = [each for each in plan["changes"] if not each["label"].startswith("model.remat=")]
    assert {each["plan"]["remat"] for each in others} == {"outputs"}
