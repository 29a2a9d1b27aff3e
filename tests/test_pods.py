"""Reading compiled programs, the network model, and the plan's errors; what needs libtpu is marked slow."""

import importlib.util
import types

import jax
import jax.numpy as jnp
import pytest

from configs import gshard_twin, mixtral_8x7b, switch_twin
from moe.config import ConfigError, from_config_dict
from moe.flops import count_parameters
from moe.pods import arithmetic, hlo, network
from moe.pods.chips import CHIPS

MESH = {"data": 1, "fsdp": 8, "expert": 8, "tensor": 1}

# Cut from a compiled train step: a loop of 32 trips with an all-to-all, a gather whose start and done enclose a fusion
# of 1000 cycles, a reduce-scatter hidden in a fusion, and a kernel whose metadata breaks the line.
PROGRAM = """HloModule jit_train_step, is_scheduled=true
%all-reduce-scatter.1 (input.1: bf16[4096,128]) -> bf16[512,128] {
  %input.1 = bf16[4096,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-reduce.1 = bf16[4096,128]{1,0} all-reduce(%input.1), replica_groups={{0,8,16,24,32,40,48,56}}, to_apply=%a
}
%body (p: (s32[], bf16[8,1280,4096])) -> (s32[], bf16[8,1280,4096]) {
  %p = (s32[]{:T(128)}, bf16[8,1280,4096]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,1280,4096]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %w = bf16[512,128]{1,0} broadcast(%c), dimensions={}
  %all-to-all.1 = bf16[8,1280,4096]{2,1,0} all-to-all(%x), channel_id=5, replica_groups=mesh['data'=1,'fsdp'=8,'expert'=8,'tensor'=1] {'expert'}, dimensions={0}, metadata={op_name="jit(train_step)/sharding_constraint"}
  %all-gather-start.1 = (bf16[512,128]{1,0}, bf16[4096,128]{1,0}) all-gather-start(%w), replica_groups=[8,8]<=[8,8]T(1,0), dimensions={0}, metadata={op_name="jit(train_step)/weights.experts.up/convert_element_type"}
  %fusion.1 = bf16[8,1280,4096]{2,1,0} fusion(%all-to-all.1), kind=kLoop, calls=%f, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %all-gather-done.1 = bf16[4096,128]{1,0} all-gather-done(%all-gather-start.1)
  %fusion.2 = bf16[512,128]{1,0} fusion(%all-gather-done.1), kind=kCustom, calls=%all-reduce-scatter.1
  %kernel = bf16[8]{0} custom-call(%w), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"name": "splash"
}}
  %fusion.3 = bf16[8]{0} fusion(%kernel), kind=kLoop, calls=%f, backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
  ROOT %t = (s32[], bf16[8,1280,4096]{2,1,0}) tuple(%i, %fusion.1)
}
%condition (p.1: (s32[], bf16[8,1280,4096])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(32)
  %p.1 = (s32[]{:T(128)}, bf16[8,1280,4096]{2,1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %constant.1), direction=LT
}
ENTRY %main (arg: bf16[8,1280,4096]) -> bf16[8,1280,4096] {
  %arg = bf16[8,1280,4096]{2,1,0} parameter(0)
  %fusion.9 = bf16[8,1280,4096]{2,1,0} fusion(%arg), kind=kLoop, calls=%f, backend_config={"window_config":{"estimated_cycles":"500"}}
  %while.1 = (s32[], bf16[8,1280,4096]{2,1,0}) while(%tuple), condition=%condition, body=%body
  ROOT %out = bf16[8,1280,4096]{2,1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


def test_reads_loops_exchanges_and_cycles():
    read = hlo.read(PROGRAM, MESH)
    assert [(c.kind, c.axes, c.bytes, c.count, c.overlap_cycles) for c in read.collectives] == [
        ("all-to-all", ("expert",), 8 * 1280 * 4096 * 2, 32, -1),
        ("all-gather", ("fsdp",), 4096 * 128 * 2, 32, 1000),
        ("reduce-scatter", ("fsdp",), 4096 * 128 * 2, 32, -1),
    ]
    assert read.cycles == 500 + 32 * 1000
    assert read.unpriced == 32
    assert read.unpriced_bytes == 32 * 2 * 16  # bf16[8] in and out
    assert read.unknown_loops == 0


def test_bytes_of_types():
    assert hlo.array_bytes("(bf16[4,128]{1,0:T(8,128)(2,1)}, s32[], pred[3])") == 4 * 128 * 2 + 4 + 3


def _torus(*shape):
    """Devices of a torus in row-major order."""
    coordinates = jnp.stack(jnp.unravel_index(jnp.arange(jnp.prod(jnp.array(shape))), shape), -1).tolist()
    return [types.SimpleNamespace(coords=tuple(place), slice_index=0) for place in coordinates]


def test_network_model_by_hand():
    devices, chip = _torus(4, 4, 4), CHIPS["v5p"]  # rings of 4 with links of 100 GB/s each way

    def collective(kind, group, size=8e8):
        return hlo.Collective(kind, (), tuple(group), int(size), 1, -1, "")

    ring, plane = range(4), range(16)
    # 800 MB x 3/4 over both directions of a ring
    assert network.seconds(collective("all-gather", ring), devices, chip) == pytest.approx(8e8 * 3 / 4 / 2e11)
    assert network.seconds(collective("all-reduce", ring), devices, chip) == pytest.approx(2 * 8e8 * 3 / 4 / 2e11)
    # two rings at once
    assert network.seconds(collective("all-gather", plane), devices, chip) == pytest.approx(8e8 * 15 / 16 / 4e11)
    # half of what 4 devices send crosses the middle over 2 links each way: 4/8 of a device's bytes
    assert network.seconds(collective("all-to-all", ring), devices, chip) == pytest.approx(8e8 * 4 / 8 / 1e11)
    # members two apart share each link with another group and have no ring
    assert network.seconds(collective("all-gather", (0, 2)), devices, chip) == pytest.approx(8e8 / 2 / 5e10)
    assert network.seconds(collective("all-gather", (0,)), devices, chip) == 0.0


def test_flops_count_loops_and_kernels():
    x = jnp.ones((8, 16))

    def scanned(x, w):
        return jax.lax.scan(lambda h, _: (h @ w, None), x, None, length=5)[0]

    jaxpr = jax.make_jaxpr(scanned)(x, jnp.ones((16, 16))).jaxpr
    assert arithmetic.matmul_flops(jaxpr) == 5 * 2 * 8 * 16 * 16
    assert arithmetic.matmul_flops(jaxpr, kernels_only=True) == 0


def test_published_sizes():
    assert count_parameters(from_config_dict(mixtral_8x7b.get_config()).model) == (46_702_792_704, 12_879_925_248)
    with pytest.raises(ConfigError, match="the sizes are base, large, xxl, c"):
        switch_twin.get_config("huge")
    with pytest.raises(ConfigError, match="2048e36l"):
        gshard_twin.get_config("64e1l")


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def test_unknown_topology_lists_names(monkeypatch):
    from moe.pods import topology

    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ConfigError, match="for example v2:16x16, v3:32x32"):
        topology.get_topology("v9:2x2")
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install \"jax\[tpu\]=="):
        topology.get_topology("v5p:2x2x1")


@pytest.mark.slow
@needs_libtpu
def test_a_plan_has_two_exchanges_forward_four_backward_and_gathers_no_tokens():
    import json
    import subprocess
    import sys
    from pathlib import Path

    overrides = {
        "model.num_layers": 2, "model.vocab_size": 512, "model.d_model": 512, "model.d_ff": 1024,
        "model.num_heads": 4, "model.num_kv_heads": 4, "data.sequence_length": 512, "train.batch_size": 8,
    }  # fmt: skip
    command = [sys.executable, "scripts/plan_pod.py", "--config=configs/mixtral_8x7b.py", "--topology=v5p:2x2x2"]
    command += ["--json", *(f"--config.{name}={value}" for name, value in overrides.items())]
    root = Path(__file__).parents[1]
    plan = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout)
    assert plan["token_all_gathers"] == 0
    assert sum(e["count"] for e in plan["exchanges"] if e["kind"] == "all-to-all") == 2 * (2 + 4)
