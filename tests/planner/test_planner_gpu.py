"""GPUs as compile targets: their programs, network and topologies; tests that need the CUDA plugin are marked slow."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from moe.config import ConfigError, MeshConfig
from moe.config.parse import from_config_dict
from moe.configs import mixtral_8x7b
from moe.parallel import target
from moe.planner import candidates, exchanges, gpus, memory_errors, network, program, topology
from moe.planner.chips import GiB
from moe.planner.gpus import GPUS
from moe.planner.program import Collective

MESH = {"data": 1, "fsdp": 8, "expert": 8, "tensor": 1}

# Excerpt of a train step for 64 H100s, shortened: a loop of 32 trips with an all-to-all beside a matmul, a
# synchronous gather, a combined reduce-scatter, an asynchronous copy, a Triton fusion, and cuDNN's attention.
PROGRAM = """HloModule jit_train_step, is_scheduled=true
%gemm (param_0.3: bf16[4096,4096], param_1.2: bf16[4096,6144]) -> bf16[4096,6144] {
  %param_0.3 = bf16[4096,4096]{1,0} parameter(0)
  %param_1.2 = bf16[4096,6144]{1,0} parameter(1)
  %dot.122 = bf16[6144,4096]{0,1} dot(%param_1.2, %param_0.3), lhs_contracting_dims={0}, rhs_contracting_dims={1}
  ROOT %bitcast.883 = bf16[4096,6144]{1,0} bitcast(%dot.122)
}
%gemm_to_float32 (param_0.1: bf16[4096,1024], param_1.3: bf16[1024,32000]) -> f32[4096,32000] {
  %param_0.1 = bf16[4096,1024]{1,0} parameter(0)
  %param_1.3 = bf16[1024,32000]{1,0} parameter(1)
  ROOT %dot.99 = f32[4096,32000]{1,0} dot(%param_0.1, %param_1.3), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%fused_dynamic_slice (param_0: f32[32,4096], param_1: s32[]) -> f32[1,4096] {
  %param_0 = f32[32,4096]{1,0} parameter(0)
  ROOT %dynamic-slice.1 = f32[1,4096]{1,0} dynamic-slice(%param_0, %param_1), dynamic_slice_sizes={1,4096}
}
%body (p: (s32[], bf16[8,1280,4096])) -> (s32[], bf16[8,1280,4096]) {
  %p = (s32[], bf16[8,1280,4096]{2,1,0}) parameter(0)
  %x = bf16[8,1280,4096]{2,1,0} get-tuple-element(%p), index=1
  %w = bf16[512,14336]{1,0} get-tuple-element(%p), index=2
  %g = bf16[4096,14336]{1,0} get-tuple-element(%p), index=3
  %h = bf16[4096,128]{1,0} get-tuple-element(%p), index=4
  %q = bf16[1,512,32,128]{3,2,1,0} get-tuple-element(%p), index=5
  %k = bf16[1,4096,8,128]{3,2,1,0} get-tuple-element(%p), index=6
  %all-to-all-start.3 = ((bf16[8,1280,4096]{2,1,0}), bf16[8,1280,4096]{2,1,0}) all-to-all-start(%x), channel_id=49, replica_groups=mesh['data'=1,'fsdp'=8,'expert'=8,'tensor'=1] {'expert'}, dimensions={0}, metadata={op_name="jit(train_step)/transpose(jvp())/while/body/checkpoint/rematted_computation/sharding_constraint"}, backend_config={"collective_backend_config":{"is_sync":false}}
  %gemm_fusion_dot.85 = bf16[4096,6144]{1,0} fusion(%w, %g), kind=kCustom, calls=%gemm, metadata={op_name="jit(train_step)/transpose(jvp())/while/body/checkpoint/rematted_computation/btd,dnh->btnh/dot_general"}, backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"},"reification_cost":[{"end_to_end_cycles":12214541.4,"exec_time_us":6168.9,"compute_time_us":6166.9,"memory_access_time_us":40.0,"name":""},{"end_to_end_cycles":31726364.4,"exec_time_us":16023.4,"compute_time_us":330.8,"memory_access_time_us":50.9,"name":"experimental-gemm-cost-model"},{"end_to_end_cycles":31726364.4,"exec_time_us":16023.4,"compute_time_us":2641.7,"memory_access_time_us":101.9,"name":"indexing-cost-model"},{"end_to_end_cycles":0,"exec_time_us":264,"compute_time_us":0,"memory_access_time_us":0,"name":"sol"}]}
  %all-to-all-done.3 = bf16[8,1280,4096]{2,1,0} all-to-all-done(%all-to-all-start.3)
  %all-gather.45 = bf16[4096,14336]{1,0} all-gather(%w), channel_id=51, replica_groups=[8,8]<=[8,8]T(1,0), dimensions={0}, metadata={op_name="jit(train_step)/jvp()/while/body/weights.experts.gate/convert_element_type"}, backend_config={"collective_backend_config":{"is_sync":true}}
  %reduce-scatter-start = ((bf16[4096,14336]{1,0}, bf16[4096,128]{1,0}), (bf16[512,14336]{1,0}, bf16[512,128]{1,0})) reduce-scatter-start(%g, %h), channel_id=104, replica_groups=mesh['axis_0'=8,'axis_1'=8] {'axis_0'}, dimensions={0}, to_apply=%add, metadata={op_name="jit(train_step)/transpose(jvp())/while/body/checkpoint/eri,eij->erj/transpose"}
  %loop_multiply_fusion.3 = bf16[10240,14336]{1,0} fusion(%x), kind=kLoop, calls=%f, metadata={op_name="jit(train_step)/transpose(jvp())/while/body/checkpoint/mul"}, backend_config={"reification_cost":[{"exec_time_us":250,"compute_time_us":0.4,"memory_access_time_us":250,"name":""},{"exec_time_us":251,"compute_time_us":0,"memory_access_time_us":0,"name":"sol"}]}
  %reduce-scatter-done = (bf16[512,14336]{1,0}, bf16[512,128]{1,0}) reduce-scatter-done(%reduce-scatter-start)
  %gemm_fusion_dot.64 = f32[4096,32000]{1,0} fusion(%h, %k), kind=kCustom, calls=%gemm_to_float32, metadata={op_name="jit(train_step)/jvp(loss)/while/body/xbpd,xbpv->xdv/dot_general"}, backend_config={"reification_cost":[{"exec_time_us":9000,"name":""},{"exec_time_us":1600,"compute_time_us":272,"memory_access_time_us":300,"name":"experimental-gemm-cost-model"},{"exec_time_us":23000,"name":"sol"}]}
  %fusion.227 = bf16[1,4096,4096]{2,1,0} fusion(%x), kind=kCustom, calls=%f, metadata={op_name="jit(train_step)/jvp()/while/body/convert_element_type"}, backend_config={"fusion_backend_config":{"kind":"__triton"},"reification_cost":[{"exec_time_us":17089,"name":""},{"exec_time_us":20,"name":"indexing-cost-model"},{"exec_time_us":0.01,"name":"sol"}]}
  %fusion-start.11 = ((f32[32,4096]{1,0}, s32[]), f32[1,4096]{1,0}, u32[]) fusion-start(%scales, %i), kind=kLoop, calls=%fused_dynamic_slice, backend_config={"reification_cost":[]}
  %fusion-done.11 = f32[1,4096]{1,0} fusion-done(%fusion-start.11)
  %dot_product_attention_fwd.0 = (bf16[1,32,512,128]{3,1,2,0}, f32[1,32,512]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %k, %m), custom_call_target="__cudnn$fmhaScaleBiasSoftmax", backend_config={}
  ROOT %t = (s32[], bf16[8,1280,4096]{2,1,0}) tuple(%i, %all-to-all-done.3)
}
%condition (p.1: (s32[], bf16[8,1280,4096])) -> pred[] {
  %p.1 = (s32[], bf16[8,1280,4096]{2,1,0}) parameter(0)
  ROOT %loop_compare_fusion.2 = pred[] fusion(%p.1), kind=kLoop, calls=%c
}
ENTRY %main (arg: bf16[8,1280,4096]) -> bf16[8,1280,4096] {
  %arg = bf16[8,1280,4096]{2,1,0} parameter(0)
  %while.1 = (s32[], bf16[8,1280,4096]{2,1,0}) while(%tuple), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"32"}}
  ROOT %out = bf16[8,1280,4096]{2,1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


def test_reads_a_program_for_gpus():
    read = program.read(PROGRAM, MESH, clock=GPUS["h100"].clock)
    assert [(c.kind, c.axes, c.bytes, c.count, round(1e6 * c.overlap_seconds)) for c in read.collectives] == [
        ("all-to-all", ("expert",), 8 * 1280 * 4096 * 2, 32, 264),
        ("all-gather", ("fsdp",), 4096 * 14336 * 2, 32, -1_000_000),
        ("reduce-scatter", ("fsdp",), 4096 * (14336 + 128) * 2, 32, 250),
    ]
    assert [exchanges.purpose(c) for c in read.collectives] == [
        "tokens to experts, back", "weights", "gradients of weights",
    ]  # fmt: skip
    # The bfloat16 matmul is at its measured rate, the one with another result type at peak, the rest by XLA's models.
    assert read.parts == pytest.approx(
        {
            ("recomputation", "matmuls"): 32 * 264e-6,
            ("backward", "other"): 32 * 250e-6,
            ("forward", "matmuls"): 32 * 300e-6,
            ("forward", "other"): 32 * 20e-6,
        }
    )
    assert read.seconds == pytest.approx(32 * 834e-6)
    assert (read.unpriced, read.unpriced_bytes) == (32, 32 * 2 * 4096 * 4)
    assert _attention_flops(read) == 32 * 2 * 2 * (512 * 32 * 128) * 4096
    assert read.unknown_loops == 0
    (routed, *_) = [e for e in exchanges.summarise(read, _devices(64), GPUS["h100"]) if e.kind == "all-to-all"]
    assert (routed.count, routed.asynchronous) == (32, 32)


def _attention_flops(read):
    return sum(item.flops * item.count for item in read.items if item.kind == "attention")


def test_attention_gradients_are_five_matmuls():
    text = PROGRAM.replace("__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward")
    forward, backward = (_attention_flops(program.read(each, MESH, clock=1.0)) for each in (PROGRAM, text))
    assert backward == forward * 5 / 2


def _devices(count):
    return [types.SimpleNamespace(id=i) for i in range(count)]


def test_network_of_gpus_by_hand():
    devices, h100 = _devices(64), GPUS["h100"]  # 8 hosts; 450 GB/s by NVLink, 50 GB/s to other hosts

    def seconds(kind, group, chip=h100, size=8e8):
        # nine tenths of the links are usable
        return 0.9 * network.seconds(Collective(kind, (), tuple(group), int(size), 1, -1, ""), devices, chip)

    host, across, everyone = range(8), range(0, 64, 8), range(64)
    assert seconds("all-gather", host) == pytest.approx(8e8 * 7 / 8 / 450e9)
    assert seconds("all-reduce", host) == pytest.approx(2 * 8e8 * 7 / 8 / 450e9)
    assert seconds("all-gather", across) == pytest.approx(8e8 * 7 / 8 / 50e9)
    # the 8 GPUs of a host each fetch an eighth of what the host lacks
    assert seconds("reduce-scatter", everyone) == pytest.approx(8e8 * 7 / 8 / (8 * 50e9))
    assert seconds("all-to-all", host) == pytest.approx(8e8 * 7 / 8 / 450e9)
    assert seconds("all-to-all", everyone) == pytest.approx(8e8 * 56 / 64 / 50e9)
    assert seconds("collective-permute", (0, 1)) == pytest.approx(8e8 / 450e9)
    assert seconds("collective-permute", (0, 8)) == pytest.approx(8e8 / 50e9)
    # a rack of GB200 is one NVLink domain
    assert seconds("all-to-all", everyone, GPUS["gb200"]) == pytest.approx(8e8 * 63 / 64 / 900e9)

    def link(group, chip=h100):
        return network.link(Collective("all-gather", (), tuple(group), 1, 1, -1, ""), devices, chip)

    assert [link(group) for group in (host, across, everyone)] == ["NVLink", "network", "network"]
    assert link(everyone, GPUS["gb200"]) == "NVLink"


def test_the_guess_uses_nvlink_where_an_axis_stays_in_a_host():
    h100 = GPUS["h100"]
    assert h100.axis_bandwidth(1, 8) == h100.nvlink
    assert h100.axis_bandwidth(8, 8) == h100.axis_bandwidth(2, 8) == h100.network
    config = from_config_dict(mixtral_8x7b.get_config())
    inside = dataclasses.replace(config, mesh=MeshConfig(1, 8, 8, 1))
    across = dataclasses.replace(config, mesh=MeshConfig(1, 4, 8, 2))
    assert candidates.guess_seconds(inside, h100) < candidates.guess_seconds(across, h100)


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("v5p-8", "v5p:2x2x1"), ("v5p-16", "v5p:2x2x2"), ("v5p-32", "v5p:2x2x4"), ("v5p-128", "v5p:4x4x4"),
        ("v4-4096", "v4:8x16x16"), ("v5litepod-8", "v5e:2x4"), ("v5e-256", "v5e:16x16"), ("v6e-32", "v6e:4x8"),
        ("v3-128", "v3:8x8"), ("tpu7x-128", "tpu7x:4x4x4"), ("v5p:4x4x4", "v5p:4x4x4"), ("h100:8x8", "h100:8x8"),
    ],
)  # fmt: skip
def test_cloud_names_of_slices(name, meaning):
    assert topology.tpu_name(name) == meaning
    assert {name, meaning} <= topology.all_names(meaning)


@pytest.mark.parametrize("name", ["v5p:2x4x8", "v5p:4x4x12", "v5e:1x8", "v5p:1x1x1", "h100:8x8"])
def test_other_shapes_have_no_cloud_name(name):
    assert topology.all_names(name) == {name}


@pytest.mark.parametrize("name", ["v5p-100", "v5p-1", "v5p-2", "v6e-12", "v5e-0"])
def test_slices_that_do_not_exist_are_refused(name):
    with pytest.raises(ConfigError, match=f"--topology={name}: must"):
        topology.tpu_name(name)


def _absent_plugin(monkeypatch):
    asked = []

    def get_topology_desc(**arguments):
        asked.append(arguments)
        _, hosts, each = map(int, arguments["topology"].split("x"))
        return types.SimpleNamespace(devices=_devices(hosts * each))

    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(topology.topologies, "get_topology_desc", get_topology_desc)
    return asked


def test_gpu_topologies(monkeypatch):
    asked = _absent_plugin(monkeypatch)
    hosts = topology.get_topology("h100:8x4")
    assert (len(hosts.devices), hosts.num_chips, hosts.platform, hosts.chip.domain) == (32, 32, "gpu", 4)
    cloud = topology.get_topology("a3-megagpu-8g:8")
    assert (cloud.name, len(cloud.devices), cloud.chip.network) == ("h100:8x8", 64, 25e9)
    rack = topology.get_topology("gb200:16x4")
    assert rack.chip.domain == 72
    assert [arguments["topology"] for arguments in asked] == ["1x8x4", "1x8x8", "1x16x4"]
    assert "NVIDIA H100" in asked[0]["target_config"]
    for name, words in {
        "h100:8": "must be GPU:HOSTSxDEVICES, for example h100:8x8",
        "h100:0x8": "must be GPU:HOSTSxDEVICES",
        "h100:2x16": "at most 8 devices a host",
        "a3-megagpu-8g": "must be MACHINE:HOSTS, for example a3-megagpu-8g:8",
        "mi300x:8x8": "for example .*h100:8x8",
    }.items():
        with pytest.raises(ConfigError, match=words):
            topology.get_topology(name)
    with pytest.raises(ConfigError, match="--num_slices=2: must be 1 for GPUs"):
        topology.get_topology("h100:8x8", 2)
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "jax\[cuda13\]=='):
        topology.get_topology("h100:8x8")


def test_every_gpu_agrees_with_its_compile_target():
    for name, gpu in GPUS.items():
        text = gpus.target_config(name)
        assert f"device_memory_size: {gpu.memory}\n" in text
        assert f"memory_bandwidth: {int(gpu.memory_bandwidth)}\n" in text
    for path in gpus.compiler_options("a100").values():
        assert path is True or Path(str(path)).exists()
    assert {machine.gpu for machine in gpus.MACHINES.values()} <= set(GPUS)


def test_exchanges_on_gpus_are_scheduled_early():
    for name in GPUS:
        kind = re.search(r'device_description_str: "([^"]+)"', gpus.target_config(name))[1]
        options = target.compiler_options(kind)
        assert options["xla_gpu_enable_latency_hiding_scheduler"] is True
        assert options["optimization_level"] == "O1"
        early = "xla_gpu_experimental_collective_start_as_early_as_possible"
        assert [early in target.compiler_options(kind, stages=stages) for stages in (1, 2)] == [False, True]
    assert target.compiler_options("cpu") == target.compiler_options("AMD Instinct MI300X") == {}


def test_a_program_for_gpus_that_does_not_fit_is_refused():
    config = from_config_dict({"model": {"remat": "none"}})
    memory_errors.refuse_program_that_does_not_fit(config, 79 * GiB, 80 * GiB)
    with pytest.raises(ConfigError, match=r"90.00 GiB a device of 80.00, 10.00 GiB too much; .*model.remat=full"):
        memory_errors.refuse_program_that_does_not_fit(config, 90 * GiB, 80 * GiB)


needs_cuda_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason=f'JAX\'s CUDA plugin is not installed: pip install "jax[cuda13]=={jax.__version__}"',
)

SMALL = {
    "num_layers": 2, "vocab_size": 512, "d_model": 512, "d_ff": 1024, "num_heads": 4, "num_kv_heads": 4,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)  # half a minute on an idle core
@needs_cuda_plugin
@pytest.mark.parametrize("name", ["a100:2x4", "h100:2x4", "h200:2x4", "b200:2x4", "gb200:2x4"])
def test_a_plan_for_gpus_has_two_exchanges_forward_four_backward_and_gathers_no_tokens(name):
    command = [
        sys.executable,
        "-m",
        "moe",
        "plan",
        "--config=configs/mixtral_8x7b.py",
        f"--topology={name}",
        "--json",
    ]
    command += [f"--config.model.{field}={value}" for field, value in SMALL.items()]
    command += ["--config.data.sequence_length=512", "--config.train.batch_size=8", "--config.mesh.expert=4"]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root, env=os.environ.copy())
    plan = json.loads(run.stdout)
    assert plan["token_all_gathers"] == 0
    routed = [exchange for exchange in plan["exchanges"] if exchange["kind"] == "all-to-all"]
    assert sum(exchange["count"] for exchange in routed) == 2 * (2 + 4)
    weights = [each for each in plan["exchanges"] if (each["kind"], each["purpose"]) == ("all-gather", "weights")]
    assert sum(each["asynchronous"] for each in weights) > sum(each["count"] for each in weights) / 2
    assert 0 < plan["step_seconds"] < 1
    assert plan["parts"]["forward matmuls"] > 0
