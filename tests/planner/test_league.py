"""Another codebase's program beside this project's plan, by the same prices."""

import dataclasses
from pathlib import Path

import pytest

from moe.planner import counts, kept_plans, kernels, league
from moe.planner.kinds import KINDS
from moe.planner.topology import Place, get_topology
from moe.system import shipped

RESULTS = Path(__file__).parents[2] / "docs" / "results"

PROGRAM = """HloModule jit_train_step, is_scheduled=true
%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}
ENTRY %main (x: bf16[1024,512], w: bf16[512,256]) -> bf16[1024,256] {
  %x = bf16[1024,512]{1,0} parameter(0)
  %w = bf16[512,256]{1,0} parameter(1)
  %y = bf16[1024,256]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(train_step)/jvp(mlp)/dot_general"}, backend_config={"estimated_cycles":"175000"}
  %e = bf16[8,512,256]{2,1,0} constant({...})
  %gmm.4 = bf16[1024,256]{1,0} custom-call(%x, %e), custom_call_target="tpu_custom_call"
  ROOT %z = bf16[1024,256]{1,0} all-reduce(%y), channel_id=1, replica_groups={{0,1}}, use_global_device_ids=true, to_apply=%add
}
"""  # noqa: E501


@dataclasses.dataclass(frozen=True)
class Device(Place):
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


def _row(second=1):
    """The row of a program in which the first two devices of a mesh add; the second is at that place of the torus."""
    entry = league.ENTRIES[0]
    topology = get_topology(entry.topology, compiles=False)
    devices = tuple(Device(each.id, each.coords) for each in topology.devices)
    places = [0, second, *(place for place in range(1, len(devices)) if place != second)]
    record = {
        "text": PROGRAM,
        "memory": {"argument": 40, "output": 30, "alias": 20, "temp": 5, "generated_code": 1}
        | {"host_temp": 0, "host_argument": 0},
        "peak": 50,
        "coords": [list(devices[place].coords) for place in places],
        "seconds": 1.0,
        "versions": ["maxtext 0.2.5"],
    }
    plan = league.plan_of(entry, kept_plans.read(shipped.PLANS))
    return league.row(entry, plan, dataclasses.replace(topology, devices=devices), record), plan


def test_a_program_of_another_codebase_is_read_and_priced_as_a_plan_is():
    row, plan = _row()
    assert row["settings"][2:] == ["per_device_batch_size=10", "max_target_length=4096"]  # the plan's rows and tokens
    assert row["memory"] == 40 + 30 - 20 + 5 + 1
    assert row["exchanged"] == {"all-reduce": 1024 * 256 * 2}
    step, (low, high), exposed = league.priced(row)
    # 175,000 cycles at about 1.75 GHz; twice half a megabyte between neighbours at nine tenths of 100 GB/s.
    assert exposed == pytest.approx(2 * (1024 * 256 * 2) / 2 / 90e9)
    (kernel,) = row["counts"]["matmuls"]  # of as many rows as a balanced router fills: 10 x 4096 tokens, 2 choices
    assert kernel == "rows tpu 81920 512 256 8 2"
    chip = KINDS["v5p"]
    of_kernel = kernels.price(counts.matmul_of(kernel), 81920, chip).seconds
    assert step == pytest.approx(1e-4 + of_kernel + exposed, rel=1e-3)
    assert low < step < high
    # Model FLOPs at peak are the kept plan's.
    assert row["model_flops_seconds"] == pytest.approx(plan["mfu"] * plan["step_seconds"])


def test_groups_are_at_the_places_of_the_other_mesh():
    """Two devices that are three places apart share each link on their way with two other pairs."""
    near, far = (league.priced(_row(second)[0])[2] for second in (1, 3))
    assert far == pytest.approx(3 * near)


def test_the_page_is_the_files_by_todays_prices():
    rows = league.read(RESULTS / "league.json")
    page = league.page(rows, kept_plans.read(shipped.PLANS))
    assert page == (RESULTS / "league.md").read_text()
    assert len(rows) == page.count("| MaxText |")
