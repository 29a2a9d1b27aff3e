"""Reading of compiled programs, and the time of grouped matmuls."""

import dataclasses

import pytest

from moe.planner import exchanges, hlo, program
from moe.planner.chips import CHIPS

MESH = {"data": 1, "fsdp": 8, "expert": 8, "tensor": 1}

# Excerpt of a compiled train step: a loop of 32 trips with an all-to-all, a gather with a fusion of 1000 cycles between
# its start and its done, a reduce-scatter hidden in a fusion, and a kernel whose metadata breaks the line.
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
    read = program.read(PROGRAM, MESH, clock=1.0)
    assert [(c.kind, c.axes, c.bytes, c.count, c.overlap_seconds) for c in read.collectives] == [
        ("all-to-all", ("expert",), 8 * 1280 * 4096 * 2, 32, -1),
        ("all-gather", ("fsdp",), 4096 * 128 * 2, 32, 1000),
        ("reduce-scatter", ("fsdp",), 4096 * 128 * 2, 32, -1),
    ]
    assert read.seconds == 500 + 32 * 1000
    assert read.parts == {("forward", "other"): 500, ("recomputation", "matmuls"): 32 * 1000}
    assert read.unpriced == 32
    assert read.unpriced_bytes == 32 * 2 * 16  # bf16[8] in and out
    assert read.unknown_loops == 0


@pytest.mark.parametrize(("scope", "runs"), [("", 32), ("taken_5_of_16/", 10)])
def test_branches_count_as_often_as_their_scope_says(scope, runs):
    """A fusion of 800 cycles and one of 7, of which the more expensive counts, in a loop of 32 trips."""
    cycles = 'backend_config={"window_config":{"estimated_cycles":"%s"}}'
    text = PROGRAM
    for name, number in (("cheap", 7), ("dear", 800)):
        branch = (
            f"%{name} (b: s32[]) -> s32[] {{\n  ROOT %{name}.1 = s32[] fusion(%b), kind=kLoop, {cycles % number}\n}}\n"
        )
        text = text.replace("%body (", branch + "%body (")
    conditional = (
        "  %c = s32[] conditional(%i, %i, %i), branch_computations={%cheap, %dear}, "
        f'metadata={{op_name="jit(train_step)/while/body/{scope}cond"}}\n'
    )
    read = program.read(text.replace("  ROOT %t =", conditional + "  ROOT %t ="), MESH, clock=1.0)
    assert read.seconds == 500 + 32 * 1000 + runs * 800
    assert [item.count for item in read.items if item.name == "dear.1"] == [runs]


@pytest.mark.parametrize(("result", "kind"), [("bf16[520,128]", "reduce-scatter"), ("bf16[4096,128]", "all-reduce")])
def test_an_all_reduce_in_a_fusion_is_classified_by_its_result(result, kind):
    """A reduce-scatter's parts may be padded; a result as large as the input is an all-reduce."""
    text = PROGRAM.replace("%fusion.2 = bf16[512,128]", f"%fusion.2 = {result}")
    assert program.read(text, MESH, clock=1.0).collectives[-1].kind == kind


# Excerpt of a compiled layer: a grouped matmul's kernel on a buffer of 8192 rows, its gradient for the matrices, a copy
# of those, and the loop of further waves that a balanced router never enters.
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
    read = program.read(GROUPED, {"expert": 8}, clock=1.0)
    assert read.grouped == (
        program.GroupedMatmul("rows", (8192, 1024, 4096, 8), (128, 1024, 1280), 2, 1),
        program.GroupedMatmul("weights", (8192, 1024, 4096, 8), (128, 1024, 512), 2, 1),
    )
    assert read.copies == ((8 * 1024 * 4096 * 2, 1, "w"), (8192 * 4096 * 2, 1, ""))
    assert (read.seconds, read.unknown_loops) == (900, 0)
    # The bytes of a balanced load, not of the whole buffer.
    (sent,) = read.collectives
    assert (sent.kind, sent.axes, sent.bytes) == ("ragged-all-to-all", ("expert",), 8192 * 1024 * 2)


def test_reads_the_kernels_of_megablox_by_their_names():
    text = GROUPED.replace('frontend_attributes={ragged_dot_tiling="128,1024,1280"}, ', "")
    text = text.replace("jit(both)/ragged_dot_general", "jit(step)/jit(gmm)/pallas_call")
    named = 'metadata={op_name="jit(step)/jit(tgmm)/pallas_call"}'
    text = text.replace('frontend_attributes={ragged_dot_tiling="128,1024,512"}', named)
    assert program.read(text, {"expert": 8}, clock=1.0).grouped == (
        program.GroupedMatmul("rows", (8192, 1024, 4096, 8), (0, 0, 0), 2, 1),
        program.GroupedMatmul("weights", (8192, 1024, 4096, 8), (0, 0, 0), 2, 1),
    )


# Excerpt of a compiled train step: a sum over two slices of four devices beside 300 cycles of other work.
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


def test_reads_exchanges_between_slices():
    mesh = {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}
    (sums,) = program.read(SLICES, mesh, clock=1.0).collectives
    assert sums == program.Collective("all-reduce", ("data",), (0, 4), 256 * 8 * 128 * 2, 1, 300, "between slices")


# Excerpt of a compiled train step with remat=offload, in which 300 cycles of other work stand beside each transfer.
OFFLOADED = """HloModule jit_train_step, is_scheduled=true
ENTRY %main (x: bf16[1,8,128], kept: bf16[4,8,128]) -> bf16[1,8,128] {
  %x = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %kept = bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)} parameter(1)
  %i = s32[] constant(2)
  %put = ((bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)}, bf16[1,8,128]{2,1,0:T(8,128)(2,1)}, s32[], s32[], s32[]), bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)}, u32[]{:S(2)}) dynamic-update-slice-start(%kept, %x, %i, %i, %i)
  %fusion = bf16[8]{0} fusion(%x), kind=kLoop, calls=%f, backend_config={"window_config":{"estimated_cycles":"300"}}
  %put-done = bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)} dynamic-update-slice-done(%put)
  %get = ((bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)}, s32[], s32[], s32[]), bf16[1,8,128]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) dynamic-slice-start(%put-done, %i, %i, %i), metadata={op_name="jvp()/rematted_computation"}
  ROOT %get-done = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} dynamic-slice-done(%get)
}
"""  # noqa: E501


def test_reads_transfers_to_and_from_the_host():
    read = program.read(OFFLOADED, {"fsdp": 4}, clock=1.0)
    to, back = read.collectives
    size = 8 * 128 * 2  # of one layer's slice, not of all four
    assert (to.kind, to.axes, to.bytes, to.overlap_seconds) == ("to", ("host",), size, 300)
    assert (back.kind, back.axes, back.overlap_seconds) == ("from", ("host",), 0)
    assert size <= back.bytes <= size + 8  # and the event of its start
    assert not any("S(5)" in array.type for array in read.arrays if array.name != "kept")
    # A link of 2 bytes/s: 1,024 s, of which 300 are beside work on the way out.
    chip = dataclasses.replace(CHIPS["v5e"], host=2.0)
    found = exchanges.summarise(read, [None] * 4, chip)
    assert {(e.kind, e.purpose): round(e.exposed_seconds) for e in found} == {
        ("to", "arrays that are kept there"): 724,
        ("from", "arrays that are kept there"): round(back.bytes / 2),
    }


def test_grouped_matmuls_are_read():
    rows, weights = program.read(GROUPED, {"expert": 8}, clock=1.0).grouped
    assert (rows.kind, weights.kind) == ("rows", "weights")
    assert rows.sizes[0] == weights.sizes[0] == 8192


GATED = """HloModule jit_both, is_scheduled=true
ENTRY %main (x: bf16[8192,1024], w: bf16[8,1024,4096], s: s32[8], d: bf16[8,1024,2048]) -> bf16[8192,2048] {
  %x = bf16[8192,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[8,1024,4096]{2,1,0:T(8,128)(2,1)} parameter(1)
  %s = s32[8]{0:T(128)} parameter(2)
  %d = bf16[8,1024,2048]{2,1,0:T(8,128)(2,1)} parameter(3)
  %scale = f32[8192,1]{1,0:T(8,128)} broadcast(%z), dimensions={}
  %up = (bf16[8192,4096]{1,0}, bf16[8192,2048]{1,0}) custom-call(%s, %s, %s, %x, %w, /*index=5*/%scale), custom_call_target="tpu_custom_call", frontend_attributes={kernel_kind="activated",ragged_dot_tiling="256,1024,1024"}
  %pairs = bf16[8192,4096]{1,0} get-tuple-element(%up), index=0
  %back = (bf16[8192,4096]{1,0}, bf16[8192,2048]{1,0}, f32[2,8192,1]{2,1,0}) custom-call(%s, %s, %s, %x, %d, /*index=5*/%pairs, %scale), custom_call_target="tpu_custom_call", frontend_attributes={kernel_kind="gradients",ragged_dot_tiling="256,1024,1024"}
  ROOT %out = bf16[8192,2048]{1,0} get-tuple-element(%back), index=1
}
"""  # noqa: E501


def test_kernels_with_the_nonlinearity_are_read():
    up, back = program.read(GATED, {"expert": 8}, clock=1.0).grouped
    assert up == program.GroupedMatmul("activated", (8192, 1024, 4096, 8), (256, 1024, 1024), 2, 1)
    assert back == program.GroupedMatmul("gradients", (8192, 1024, 2048, 8), (256, 1024, 1024), 2, 1)


_REST_OF_A_LOOP = """HloModule jit_train_step
%compare (i: s32[]) -> pred[] {
  %i = s32[] parameter(0)
  %bound = s32[] constant(63)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}
%condition (p: (f32[], s32[])) -> pred[] {
  %p = (f32[], s32[]) parameter(0)
  %counter = s32[] get-tuple-element(%p), index=1
  ROOT %fusion = pred[] fusion(%counter), kind=kLoop, calls=%compare
}
ENTRY %main (x: f32[]) -> (f32[], s32[]) {
  %x = f32[] parameter(0)
  %one = s32[] constant(1)
  %copy = s32[] copy(%one)
  %tuple = (f32[], s32[]) tuple(%x, %copy)
  ROOT %while = (f32[], s32[]) while(%tuple), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
    ("start", "trips"),
    [("constant(1)", 62), ("constant(0)", 63), ("parameter(1)", 63)],  # 1 to 62 of 64: first and last are peeled off
)
def test_trips_of_a_loop_with_peeled_iterations(start, trips):
    module = hlo.parse(_REST_OF_A_LOOP.replace("constant(1)", start))
    assert hlo.trip_count(module.computations["main"][-1], module) == trips


def test_bytes_of_types():
    assert hlo.array_bytes("(bf16[4,128]{1,0:T(8,128)(2,1)}, s32[], pred[3])") == 4 * 128 * 2 + 4 + 3
    # The second array is in a TPU's vector memory, the third in the host's.
    of_three = "(bf16[4]{0:T(8,128)}, f32[8]{0:T(8)S(1)}, s32[2]{0:S(5)})"
    assert (hlo.array_bytes(of_three), hlo.array_bytes(of_three, in_memory=True)) == (48, 8)
