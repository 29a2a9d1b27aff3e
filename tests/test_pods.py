"""Reading compiled programs, the network model, the search and the errors; what needs libtpu is marked slow."""

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs import gshard_twin, mixtral_8x7b, switch_twin
from moe.config import ConfigError, MoEConfig
from moe.models.flops import count_parameters
from moe.planner import arithmetic, fit, hlo, kernels, network, scaling, search
from moe.planner.chips import CHIPS
from moe.planner.plan import Exchange, Plan
from moe.routing.resolve import from_config_dict, resolve

MESH = {"data": 1, "fsdp": 8, "expert": 8, "tensor": 1}

# Cut from a compiled train step: a loop of 32 trips with an all-to-all, a gather whose start and done enclose a fusion
# of 1000 cycles, a reduce-scatter hidden in a fusion, and a kernel whose metadata breaks the line.
PROGRAM = """HloModule jit_train_step, is_scheduled=true
%all-reduce-scatter.1 (input.1: bf16[4096,128]) -> bf16[512,128] {
  %input.1 = bf16[4096,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-reduce.1 = bf16[4096,128]{1,0} all-reduce(%input.1), replica_groups={{0,8,16,24,32,40,48,56}}, to_apply=%a
}
%product (a: bf16[8,1280,4096]) -> bf16[8,1280,4096] {
  %a = bf16[8,1280,4096]{2,1,0} parameter(0)
  ROOT %dot.1 = bf16[8,1280,4096]{2,1,0} convolution(%a, %a), dim_labels=bf_io->bf
}
%body (p: (s32[], bf16[8,1280,4096])) -> (s32[], bf16[8,1280,4096]) {
  %p = (s32[]{:T(128)}, bf16[8,1280,4096]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,1280,4096]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %w = bf16[512,128]{1,0} broadcast(%c), dimensions={}
  %all-to-all.1 = bf16[8,1280,4096]{2,1,0} all-to-all(%x), channel_id=5, replica_groups=mesh['data'=1,'fsdp'=8,'expert'=8,'tensor'=1] {'expert'}, dimensions={0}, metadata={op_name="jit(train_step)/sharding_constraint"}
  %all-gather-start.1 = (bf16[512,128]{1,0}, bf16[4096,128]{1,0}) all-gather-start(%w), replica_groups=[8,8]<=[8,8]T(1,0), dimensions={0}, metadata={op_name="jit(train_step)/weights.experts.up/convert_element_type"}
  %fusion.1 = bf16[8,1280,4096]{2,1,0} fusion(%all-to-all.1), kind=kLoop, calls=%product, metadata={op_name="jit(train_step)/transpose(jvp())/checkpoint/rematted_computation/dot_general"}, backend_config={"window_config":{"estimated_cycles":"1000"}}
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
    assert read.parts == {("forward", "other"): 500, ("recomputation", "matmuls"): 32 * 1000}
    assert read.unpriced == 32
    assert read.unpriced_bytes == 32 * 2 * 16  # bf16[8] in and out
    assert read.unknown_loops == 0


@pytest.mark.parametrize(("result", "kind"), [("bf16[520,128]", "reduce-scatter"), ("bf16[4096,128]", "all-reduce")])
def test_an_all_reduce_in_a_fusion_is_what_comes_out_of_it(result, kind):
    """A reduce-scatter's parts may be padded; what is as large as its input is no part."""
    text = PROGRAM.replace("%fusion.2 = bf16[512,128]", f"%fusion.2 = {result}")
    assert hlo.read(text, MESH).collectives[-1].kind == kind


@pytest.mark.parametrize(
    ("kind", "purpose", "mebibytes", "slices", "flaw", "unnamed"),
    [
        ("all-gather", "dot_general", 2, 1, True, False),
        ("all-gather", "dot_general", 1, 1, False, False),  # small: some counter
        ("all-gather", "weights", 2, 1, False, False),
        ("all-gather", "loads of experts", 2, 1, False, False),
        ("all-reduce", "dot_general", 2, 1, False, False),
        ("all-gather", "unnamed", 2, 1, True, False),
        ("all-gather", "unnamed", 2, 2, False, True),  # programs of several slices name nothing
        ("all-gather", "dot_general", 2, 2, True, False),
    ],
)
def test_an_all_gather_of_tokens_is_a_flaw(kind, purpose, mebibytes, slices, flaw, unnamed):
    exchange = Exchange(kind, ("fsdp",), purpose, 1, mebibytes * 2**20, 0.0, 0.0)
    fields = dict.fromkeys(field.name for field in dataclasses.fields(Plan))
    made = Plan(**fields | {"exchanges": (exchange,), "num_slices": slices})
    assert made.token_exchanges == (exchange,) * flaw
    assert made.unnamed_gathers == (exchange,) * unnamed


# A grouped matmul's kernel on rows with room for 8192, its gradient for the matrices, a copy of those, and the loop of
# waves that a balanced router never enters; cut from a compiled layer.
GROUPED = """HloModule jit_both, is_scheduled=true
%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[], bf16[8,16]{1,0}) parameter(0)
  %fusion.7 = bf16[8,16]{1,0} fusion(%p), kind=kLoop, calls=%f, backend_config={"window_config":{"estimated_cycles":"700"}}
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%i, %fusion.7)
}
%condition (p.1: (s32[], bf16[8,16])) -> pred[] {
  %p.1 = (s32[], bf16[8,16]{1,0}) parameter(0)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
ENTRY %main (x: bf16[8192,1024], w: bf16[8,1024,4096], s: s32[8]) -> bf16[8192,4096] {
  %x = bf16[8192,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[8,1024,4096]{2,1,0:T(8,128)(2,1)} parameter(1)
  %s = s32[8]{0:T(128)} parameter(2)
  %y = bf16[8192,4096]{1,0} custom-call(%s, %s, %x, /*index=3*/%w), custom_call_target="tpu_custom_call", frontend_attributes={ragged_dot_tiling="128,1024,1280"}, metadata={op_name="jit(both)/ragged_dot_general"}
  %copy = bf16[8,1024,4096]{1,2,0} copy(%w), metadata={op_name="w"}, backend_config={"window_config":{"estimated_cycles":"900"}}
  %d = bf16[8,1024,4096]{2,1,0} custom-call(%s, %x, %y), custom_call_target="tpu_custom_call", frontend_attributes={ragged_dot_tiling="128,1024,512"}
  %room = bf16[10240,1024]{1,0} broadcast(%z), dimensions={}
  %sent = bf16[10240,1024]{1,0} ragged-all-to-all(%x, %room, %s, %s, /*index=4*/%s, %s), replica_groups={{0,1,2,3,4,5,6,7}}
  %while = (s32[], bf16[8,16]{1,0}) while(%y), condition=%condition, body=%body, metadata={op_name="jit(both)/overflow/while"}
  ROOT %out = bf16[8192,4096]{1,0} copy(%y)
}
"""  # noqa: E501


def test_reads_grouped_matmuls_and_copies():
    read = hlo.read(GROUPED, {"expert": 8})
    assert read.grouped == (
        hlo.GroupedMatmul("rows", (8192, 1024, 4096, 8), (128, 1024, 1280), 2, 1),
        hlo.GroupedMatmul("weights", (8192, 1024, 4096, 8), (128, 1024, 512), 2, 1),
    )
    assert read.copies == ((8 * 1024 * 4096 * 2, 1, "w"), (8192 * 4096 * 2, 1, ""))
    assert (read.cycles, read.unknown_loops) == (900, 0)
    # What a balanced load sends, not what there is room for.
    (sent,) = read.collectives
    assert (sent.kind, sent.axes, sent.bytes) == ("ragged-all-to-all", ("expert",), 8192 * 1024 * 2)


# A sum over two slices of four devices, 300 cycles of other work beside it; cut from a compiled train step.
SLICES = """HloModule jit_train_step, is_scheduled=true
ENTRY %main (g: bf16[256,8,128]) -> bf16[256,8,128] {
  %g = bf16[256,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %after-all = token[] after-all(), frontend_attributes={MegascaleRendezvousKeyName="all-reduce.1_0"}
  %send = (bf16[256,8,128]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}, token[]) send(%g, %after-all), channel_id=7, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (bf16[256,8,128]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}, token[]) recv(%after-all), channel_id=6, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=7, is_host_transfer=true
  %fusion = bf16[8]{0} fusion(%g), kind=kLoop, calls=%f, backend_config={"window_config":{"estimated_cycles":"300"}}
  %recv-done = (bf16[256,8,128]{2,1,0:T(8,128)(2,1)}, token[]) recv-done(%recv), channel_id=6, is_host_transfer=true
  ROOT %out = bf16[256,8,128]{2,1,0} get-tuple-element(%recv-done), index=0
}
"""  # noqa: E501


def test_reads_what_slices_exchange():
    mesh = {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}
    (sums,) = hlo.read(SLICES, mesh).collectives
    assert sums == hlo.Collective("all-reduce", ("data",), (0, 4), 256 * 8 * 128 * 2, 1, 300, "between slices")


def test_time_of_a_grouped_matmul_by_hand():
    chip = dataclasses.replace(CHIPS["v5p"], peak=1e12, memory_bandwidth=1e15)
    rows, weights = hlo.read(GROUPED, {"expert": 8}).grouped
    # 4 columns of tiles, the last partly empty; 8192/128 + 7 tiles of rows; 2·128·1024·1280 FLOPs a step.
    assert kernels.seconds(rows, 8192, chip) == pytest.approx(4 * 71 * 2 * 128 * 1024 * 1280 / 1e12)
    # Half of the rows: the room does not count, the 7 tiles that two groups share stay.
    assert kernels.seconds(rows, 4096, chip) == pytest.approx(4 * 39 * 2 * 128 * 1024 * 1280 / 1e12)
    chip = dataclasses.replace(chip, memory_bandwidth=1e9)
    # Each step moves its rows in and out; a group's matrix moves once a column.
    moved = 4 * 71 * (128 * 1024 + 128 * 1280) + 8 * 4 * 1024 * 1280
    assert kernels.seconds(rows, 8192, chip) == pytest.approx(2 * moved / 1e9)
    moved = 8 * 71 * 128 * (1024 + 512) + 8 * 8 * 1024 * 512
    assert kernels.seconds(weights, 8192, chip) == pytest.approx(2 * moved / 1e9)


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


def test_scaling_says_what_is_refused():
    config = tiny_config()
    points = [scaling.Point("a series", "v5p:2x2x2", config)]
    with pytest.MonkeyPatch.context() as patch:

        def make_plan(*_):
            raise ConfigError("does not fit: by 1 GiB; what helps, most first: more chips")

        patch.setattr(scaling.plan, "make_plan", make_plan)
        patch.setattr(scaling, "get_topology", lambda name: types.SimpleNamespace(devices=range(8)))
        (row,) = scaling.measure(points)
    assert row["refused"] == "does not fit: by 1 GiB"
    page = scaling.table([row, row | {"topology": "v5p:4x4x4", "parameters": 2_000_000_000}])
    assert "| a series | v5p:2x2x2 | 8 | 4 | – | refused | – |" in page
    assert "- a series on v5p:2x2x2: does not fit: by 1 GiB" in page


def test_published_sizes():
    assert count_parameters(from_config_dict(mixtral_8x7b.get_config()).model) == (46_702_792_704, 12_879_925_248)
    with pytest.raises(ConfigError, match="the sizes are base, large, xxl, c"):
        switch_twin.get_config("huge")
    with pytest.raises(ConfigError, match="2048e36l"):
        gshard_twin.get_config("64e1l")


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def test_unknown_topology_lists_names(monkeypatch):
    from moe.planner import topology

    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ConfigError, match="for example v2:16x16, v3:32x32"):
        topology.get_topology("v9:2x2")

    def libtpu(name, **_):
        if "3" in name or "16" in name:
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no such layout\nand more")
        return types.SimpleNamespace(devices=[])

    monkeypatch.setattr(topology.topologies, "get_topology_desc", libtpu)
    with pytest.raises(ConfigError, match=r"\(INVALID_ARGUMENT: no such layout\); it knows.* v5e:2x2, .*v5e:8x8$"):
        topology.get_topology("v5e:3x5")
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install \"jax\[tpu\]=="):
        topology.get_topology("v5p:2x2x1")


# What libtpu says, each text recorded: the first from libtpu 0.0.50.1 here; the second from an older version
# (github.com/erfanzar/EasyDeL/issues/166); the third for work on the SparseCore (openxla.org/xla/errors/error_1000).
OUT_OF_MEMORY = [
    (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (24.15G) exceeds available HBM (15.75G). HLO module: jit_train_step.",
        "temporaries alone: 24.15 GiB a device of 15.75, 8.40 GiB too much",
    ),
    (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 63.80G of "
        "30.75G hbm. Exceeded hbm capacity by 33.05G.\n\nTotal hbm usage >= 65.05G:\n    reserved          1.25G",
        "the program: 63.80 GiB a device of 30.75, 33.05 GiB too much",
    ),
    (
        "RESOURCE_EXHAUSTED: TPU TensorCore Hbm usage: 34.82G, SparseCore Hbm usage 174.10G, exceeding available "
        "bytes: 95.74G",
        "TensorCore and SparseCore together: 208.92 GiB a device of 95.74, 113.18 GiB too much",
    ),
    ("RESOURCE_EXHAUSTED: something new", "the compiled program exceeds a device's memory"),
]


@pytest.mark.parametrize(("message", "words"), OUT_OF_MEMORY)
def test_a_program_too_large_says_by_how_much_and_what_helps(message, words):
    config = from_config_dict({"model": {"remat": "dots", "moe": {"dispatch": "einsum"}}})
    told = fit.explained(config, jax.errors.JaxRuntimeError(message))
    assert isinstance(told, ConfigError)
    assert words in str(told)
    assert "model.remat=full (now dots)" in str(told)
    assert "dispatch=gather" in str(told)


def test_other_errors_of_the_compiler_stay_what_they_are():
    config = from_config_dict({})
    for message in (
        "INTERNAL: Mosaic failed",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack for %fusion",
    ):
        error = jax.errors.JaxRuntimeError(message)
        assert fit.explained(config, error) is error


def test_lower_bound_by_hand():
    config = from_config_dict(mixtral_8x7b.get_config())
    bound = fit.lower_bound(config, MESH)
    experts, router, norms = 32 * 8 * 3 * 4096 * 14336, 32 * 4096 * 8, 65 * 4096
    others = 46_702_792_704 - experts - router - norms
    # experts are split over fsdp and expert, and so is D of every other matrix; routers and norms are everywhere
    assert bound.parameters == 4 * ((experts + others) // 64 + router + norms)
    assert bound.optimizer == pytest.approx(2 * bound.parameters, rel=1e-6)  # and two counters
    assert bound.gradients == bound.parameters // 2  # bfloat16
    # a row of 4096 tokens a device: 32 inputs of layers; one layer's buffers of 1.25 x 2 rows a token, up and gate
    assert bound.activations == 4096 * 2 * (32 * 4096 + 2.5 * 2 * 14336)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
    assert fit.lower_bound(config, MESH).activations == 4096 * 2 * 32 * (4096 + (32 + 2 * 8) * 128 + 2.5 * 2 * 14336)


def tiny_config(**model):
    moe = {"num_experts": 4}
    sizes = {"num_layers": 2, "d_model": 128, "d_ff": 128, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 256}
    return from_config_dict(
        {"model": sizes | model | {"moe": moe}, "data": {"sequence_length": 128}, "train": {"batch_size": 8}}
    )


def test_search_tries_every_mesh_and_says_what_it_left_out():
    assert len(list(search.meshes(64))) == 84  # 2^6 over four axes: 9 choose 3
    assert {mesh.data for mesh in search.meshes(8, num_slices=2)} == {2, 4, 8}
    found, pruned = search.candidates(tiny_config(), 8, CHIPS["v5p"])
    # 20 meshes of 8 devices; tensor divides 2 key/value heads (4 and 8 do not: 3 + 1 meshes), expert 4 (8 does not: 1),
    # rows 8: 15 meshes, with 3 policies and 3 modes
    assert len(found) == 15 * 9
    assert pruned == {
        "model.num_kv_heads=2: must be divisible by mesh.tensor": 3 * 9,
        "model.num_heads=4: must be divisible by mesh.tensor": 9,
        "model.moe.num_experts=4: must be divisible by mesh.expert": 9,
    }
    # The best guess of each pair of policy and mode comes before any second best.
    assert len({(c.config.model.remat, c.config.model.moe.dispatch) for c in found[:9]}) == 9
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(found[:9]))
    sparse = tiny_config()
    dense = dataclasses.replace(sparse, model=dataclasses.replace(sparse.model, moe=MoEConfig(gate="none")))
    assert {c.config.mesh.expert for c in search.candidates(dense, 8, CHIPS["v5p"])[0]} == {1}
    small = dataclasses.replace(CHIPS["v5p"], memory=2**20)
    found, pruned = search.candidates(tiny_config(), 8, small)
    assert not found
    assert (
        pruned["parameters and optimizer alone do not fit"]
        + pruned["with gradients and the least of activations it does not fit"]
        == 15 * 9
    )


def _fake_plan(config):
    if config.mesh.tensor > 1:
        raise ConfigError("does not fit: by 1 GiB; use more chips")
    return {
        "step_seconds": 0.1 * config.mesh.expert, "mfu": 0.5, "tokens_per_second_per_chip": 1.0, "compile_seconds": 1.0,
        "memory_total": 2**30, "bound": "matrix products",
    }  # fmt: skip


def test_search_ranks_remembers_and_shares(tmp_path, monkeypatch):
    found, pruned = search.candidates(tiny_config(), 8, CHIPS["v5p"])
    chosen, compiled = found[:2] + found[60:78], []
    best = min(c.config.mesh.expert for c in chosen if c.config.mesh.tensor == 1)

    def counting(config):
        if len(compiled) == 7 and interrupt:
            raise KeyboardInterrupt
        compiled.append(config)
        return _fake_plan(config)

    cache, interrupt = search.Cache(tmp_path, "v5p:2x2x2", 1), True
    with pytest.raises(KeyboardInterrupt):
        search.run(chosen, cache, counting)
    interrupt = False
    results = search.run(chosen, cache, counting)
    assert len(compiled) == 20  # what the first one had done was not done again
    assert len(set(compiled)) == 20
    steps = [plan.get("step_seconds", 9.0) for _, plan in results]
    assert steps == sorted(steps)
    assert steps[0] == pytest.approx(0.1 * best)
    assert steps[-1] == 9.0  # what does not fit comes last, and is said
    page = search.render(results, pruned, len(found) - 20)
    assert "model.moe.num_experts=4: must be divisible by mesh.expert" in page
    assert "does not fit: by 1 GiB" in page
    assert "180 combinations" in page
    flags = search.overrides(results[0][0].config)
    assert f"--config.mesh.expert={best} --config.mesh.tensor=1 --config.model.remat=" in flags

    # Another topology, another JAX or another program: nothing of it is known.
    config = chosen[0].config
    assert cache.get(config) is not None
    assert search.Cache(tmp_path, "v5p:2x2x2", 2).get(config) is None
    monkeypatch.setattr(search, "source_hash", lambda: "other")
    other = search.Cache(tmp_path, "v5p:2x2x2", 1)
    assert other.get(config) is None

    # What another process compiles now is left to it, and its plan is taken.
    with other.mine(config) as mine, other.mine(config) as also_mine:
        assert (mine, also_mine) == (True, False)
        naps = []
        monkeypatch.setattr(search.time, "sleep", lambda _: naps.append(other.put(config, {"step_seconds": 5.0})))
        assert search.run(chosen[:1], other, counting)[0][1] == {"step_seconds": 5.0}
        assert len(naps) == 1
    assert len(compiled) == 20


SMALL = {
    "num_layers": 2, "vocab_size": 512, "d_model": 512, "d_ff": 1024, "num_heads": 4, "num_kv_heads": 4,
}  # fmt: skip


def _plan_pod(*flags):
    root = Path(__file__).parents[1]
    command = [sys.executable, "scripts/plan_pod.py", "--config=configs/mixtral_8x7b.py", *flags]
    command += [f"--config.model.{name}={value}" for name, value in SMALL.items()]
    command += ["--config.data.sequence_length=512", "--config.train.batch_size=8"]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=root, env=os.environ.copy()).stdout


@pytest.mark.slow
@needs_libtpu
def test_a_plan_has_two_exchanges_forward_four_backward_and_gathers_no_tokens():
    plan = json.loads(_plan_pod("--topology=v5p:2x2x2", "--config.mesh.expert=4", "--json"))
    assert plan["token_all_gathers"] == 0
    assert not [e for e in plan["exchanges"] if e["kind"] == "all-reduce" and e["purpose"] == "weights"]
    assert sum(e["count"] for e in plan["exchanges"] if e["kind"] == "all-to-all") == 2 * (2 + 4)
    large = from_config_dict(mixtral_8x7b.get_config())
    small = dataclasses.replace(
        large,
        model=dataclasses.replace(large.model, **SMALL, moe=dataclasses.replace(large.model.moe, d_ff=SMALL["d_ff"])),
        data=dataclasses.replace(large.data, sequence_length=512),
        train=dataclasses.replace(large.train, batch_size=8),
    )
    bound = fit.lower_bound(small, plan["mesh"])
    assert bound.parameters == plan["memory"]["parameters"]
    assert bound.optimizer == plan["memory"]["optimizer"]
    assert bound.total < plan["memory_total"]


@pytest.mark.slow
@needs_libtpu
def test_a_search_compiles_and_names_the_best(tmp_path):
    page = _plan_pod("--topology=v5p:2x2x1", "--search", "--limit=2", f"--cache={tmp_path}")
    assert "python main.py --config=configs/mixtral_8x7b.py --config.model.num_layers=2" in page
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert _plan_pod("--topology=v5p:2x2x1", "--search", "--limit=2", f"--cache={tmp_path}") == page


@pytest.mark.parametrize(
    ("dispatch", "expert", "rows"),
    [
        ("gather", 8, 2.5),  # capacity factor 1.25 · K 2
        ("dropless", 1, 2.0),  # K 2, sorted where they are
        ("dropless", 8, 2.5),  # a wave has room for 5/4 of a device's own
    ],
)
def test_rows_of_expert_buffers(dispatch, expert, rows):
    config = mixtral_8x7b.get_config()
    config.model.moe.dispatch = dispatch
    assert fit._expert_rows(resolve(from_config_dict(config)), {**MESH, "expert": expert}) == rows
