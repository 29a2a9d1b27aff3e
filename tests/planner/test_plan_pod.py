"""The program plan_pod.py around plans of a given program; nothing is compiled."""

import json
from pathlib import Path

import jax
import pytest

from moe.planner import arithmetic, compiled, kept_plans, make_plan, memory_errors, register, topology
from moe.planner.gpus import GPUS
from moe.system import shipped
from tests.planner.test_planner_details import PROGRAM
from tests.program_helpers import run_here

PLANS = shipped.PLANS

ROOT = Path(__file__).parents[2]
SMALL = {
    "num_layers": 2, "vocab_size": 512, "d_model": 64, "d_ff": 128, "moe.dispatch": "dropless",
}  # fmt: skip


@pytest.fixture(autouse=True)
def planner(tmp_path, monkeypatch):
    """One H100 and the same program for every config, of which the remat policy "hidden" does not fit; plans are kept
    below tmp_path."""

    def read_or_compile(config, where, programs):
        if config.model.remat == "hidden":
            raise memory_errors.DoesNotFitError("does not fit: the program", 0)
        memory = compiled.Memory(2**30, 2 * 2**30, 0, 3 * 2**30, 0, 5 * 2**30, 79 * 2**30)
        return compiled.CompiledStep(PROGRAM, memory, arithmetic.Flops(2e12, 0.0, 1e12), 1.0, "abc1234")

    where = topology.Topology("h100:1x1", 1, GPUS["h100"], tuple(jax.devices()[:1]))
    monkeypatch.setattr(make_plan, "read_or_compile", read_or_compile)
    monkeypatch.setattr(topology, "get_topology", lambda *_: where)
    monkeypatch.setattr(shipped, "PLANS", tmp_path / "plans.json")
    monkeypatch.setattr(shipped, "RESULTS", tmp_path)


def _plan_pod(monkeypatch, folder, *flags):
    ended = _run(monkeypatch, folder, *flags)
    assert ended.code == 0, ended.errors
    return json.loads(ended.output)


def _run(monkeypatch, folder, *flags):
    arguments = [f"--config={ROOT}/configs/mixtral_8x7b.py", "--topology=h100:1x1"]
    arguments += [f"--config.model.{name}={value}" for name, value in SMALL.items()]
    arguments += [f"--config.mesh.{axis}=1" for axis in ("data", "fsdp", "expert")]
    arguments += ["--config.train.batch_size=1", f"--cache={folder}", "--json", *flags]
    arguments += ["--config.data.sequence_length=512"]
    return run_here("moe plan", arguments, monkeypatch)


@pytest.mark.parametrize(
    ("flags", "is_read"), [((), True), (("--compile",), False), (("--config.train.batch_size=1",), False)]
)
def test_a_kept_plan_is_read_unless_settings_or_compile_ask_for_another(tmp_path, monkeypatch, flags, is_read):
    of_slice = {"config": "tiny", "slices": ["h100:1x1"], "topology": "h100:1x1"}
    kept = kept_plans.best(kept_plans.read(PLANS), "mixtral_8x7b", "h100:8x8") | of_slice
    (tmp_path / "plans.json").write_text(json.dumps([kept]))
    ended = run_here("moe plan", ["--config=tiny", "--topology=h100:1x1", *flags], monkeypatch)
    assert ended.code == 0, ended.errors
    assert ("A kept plan, read and not made" in ended.output) == is_read
    assert ("compiled in 1.0 s" in ended.output) != is_read
    assert kept_plans.sentence(kept).partition(";")[0] in ended.output  # at the end of a plan that is made, too


def test_a_plan_with_a_what_if_is_not_kept(tmp_path, monkeypatch):
    refused = _run(monkeypatch, tmp_path, "--record", "--bandwidth=2")
    assert "--bandwidth: is not read with --record" in refused.errors
    assert not (tmp_path / "plans.json").exists()


def test_a_plan_is_registered_once(tmp_path, monkeypatch):
    refused = _run(monkeypatch, tmp_path, "--register=Mine", "--bandwidth=2", "--changes=1")
    assert "--register: is not read with what-ifs" in refused.errors
    (tmp_path / "plans.md").write_text("")
    plan = _plan_pod(monkeypatch, tmp_path, "--register=Mine", "--changes=1")
    (entry,) = register.read(tmp_path / "predictions.jsonl")
    assert (entry["model"], entry["seconds"], entry["prices"]) == ("Mine", plan["step_seconds"], plan["prices"])
    assert entry["made_from"] == "compiled program"
    assert entry["settings"]["config"] == "mixtral_8x7b"
    assert "this plan was registered on" in _run(monkeypatch, tmp_path, "--register=Mine", "--changes=1").errors


def test_changes_are_counted_in_the_scenario_of_the_plan(tmp_path, monkeypatch):
    """All policies have the same program here, so that none is faster than another at any share of the peak."""
    for share in (0.01, 0.02):  # the second run finds the plans of the first
        plan = _plan_pod(monkeypatch, tmp_path, f"--matmul_share={share}", "--changes=20")
        of_policies = [each["plan"] for each in plan["changes"] if each["label"].startswith("model.remat=")]
        found = [each for each in of_policies if "error" not in each]
        assert len(found) == 3  # outputs, attention and offload; not hidden
        for each in found:
            assert each["scenario"] == plan["scenario"]
            assert each["step_seconds"] == pytest.approx(plan["step_seconds"])


def test_a_policy_chosen_by_fit_is_kept_and_not_tried_as_a_change(tmp_path, monkeypatch):
    """The policy "hidden" does not fit, so "outputs" is chosen: the kept plan sets it, and no change tries it again."""
    (tmp_path / "plans.md").write_text("<!-- plans: made by moe plan --record -->\n<!-- end of plans -->\n")
    gate = ("--config.model.moe.gate=deepseek_moe", "--config.model.moe.gate.k=2")
    plan = _plan_pod(monkeypatch, tmp_path, "--config.model.remat=fit", "--record", "--changes=20", *gate)
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
