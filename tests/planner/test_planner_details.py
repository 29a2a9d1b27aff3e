"""Prices of kernels in programs, what-ifs, where the time goes, and arrays at the peak of memory."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest

from moe.config import ConfigError
from moe.config.parse import from_config_dict
from moe.configs import mixtral_8x7b
from moe.layers.attention.tpu import block_sizes
from moe.planner import attention, hlo, kernels, liveness, measured, program, timeline
from moe.planner.chips import CHIPS
from moe.planner.exchanges import Exchange
from moe.planner.gpus import GPUS
from moe.planner.kinds import KINDS
from moe.planner.records import Collective, GroupedMatmul, Item
from moe.planner.scenario import Scenario

# Excerpt of a train step for H100: JAX's Mosaic kernel, a Triton kernel for the matrices' gradient, a write of one
# layer into a stack of 4, and a matmul that XLA's authors' rates give 352 microseconds.
PROGRAM = """HloModule jit_train_step, is_scheduled=true
%stack (a: bf16[4,1024,512], b: bf16[1024,512], i: s32[]) -> bf16[4,1024,512] {
  %a = bf16[4,1024,512]{2,1,0} parameter(0)
  %b = bf16[1024,512]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %one = bf16[1,1024,512]{2,1,0} bitcast(%b)
  ROOT %update = bf16[4,1024,512]{2,1,0} dynamic-update-slice(%a, %one, %i)
}
%gemm (l: bf16[1024,512], r: bf16[512,256]) -> bf16[4,256,256] {
  %l = bf16[1024,512]{1,0} parameter(0)
  %r = bf16[512,256]{1,0} parameter(1)
  %dot = bf16[1024,256]{1,0} dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %cut = bf16[4,256,256]{2,1,0} bitcast(%dot)
}
ENTRY %main (x: bf16[1024,512], w: bf16[8,512,256]) -> bf16[4,256,256] {
  %x = bf16[1024,512]{1,0} parameter(0)
  %w = bf16[8,512,256]{2,1,0} parameter(1)
  %s = s32[8]{0} constant({...})
  %kept = bf16[4,1024,512]{2,1,0} broadcast(%s), dimensions={}
  %y = bf16[1024,256]{1,0} custom-call(%s, %x, %w), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(train_step)/jvp()/moe/shard_map/mpmd_map"}
  %g = bf16[8,512,256]{2,1,0} custom-call(%x, %y, %s, /*index=3*/%s), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(train_step)/transpose(jvp())/moe/pallas_call"}
  %writing = ((bf16[4,1024,512]{2,1,0}, bf16[1024,512]{1,0}, s32[]), bf16[4,1024,512]{2,1,0}, u32[]) fusion-start(%kept, %x, %n), kind=kLoop, calls=%stack
  %written = bf16[4,1024,512]{2,1,0} fusion-done(%writing)
  ROOT %z = bf16[4,256,256]{2,1,0} fusion(%x, %r), kind=kCustom, calls=%gemm, metadata={op_name="jit(train_step)/jvp(attention)/btd,dnh->btnh/dot_general"}, backend_config={"reification_cost":[{"exec_time_us":8219,"compute_time_us":8216,"memory_access_time_us":50,"name":""},{"exec_time_us":23078,"name":"indexing-cost-model"},{"exec_time_us":352,"name":"sol"}]}
}
"""  # noqa: E501

MESH = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}


def _read(rates=None, **chip):
    h100 = dataclasses.replace(GPUS["h100"], **chip)
    return program.read(PROGRAM, MESH, h100.clock, lambda matmul: kernels.price(matmul, 1024, h100), rates)


def test_reads_kernels_and_writes_in_place_of_gpus():
    read = _read(program.Rates(1e9, 1e12))
    assert read.grouped == (
        GroupedMatmul("rows", (1024, 512, 256, 8), (0, 0, 0), 2, 1, "mosaic"),
        GroupedMatmul("weights", (1024, 512, 256, 8), (0, 0, 0), 2, 1, "triton"),
    )
    assert read.unpriced_bytes == 2 * 1024 * 512 * 2  # one layer of the stack, read and written
    assert next(item.bytes for item in read.items if item.name == "writing") == 2 * 1024 * 512 * 2
    assert read.seconds == pytest.approx(352e-6)  # not the 23 ms of an untuned tile
    matmul = next(item for item in read.items if item.kind == "matmul")
    assert matmul.flops == 2 * 1024 * 512 * 256
    assert matmul.bytes == 2 * (1024 * 512 + 512 * 256 + 1024 * 256)
    assert [timeline.part(item) for item in read.items] == ["experts", "experts", "layers, the rest", "attention"]


def test_gpu_fusions_that_read_and_write_host_memory_are_transfers():
    """One layer of a stack in host memory moves over PCIe, overlapped with the work between start and done."""
    text = PROGRAM.replace("bf16[4,1024,512]{2,1,0}", "bf16[4,1024,512]{2,1,0:S(5)}").replace(
        "  ROOT %z",
        "  %reading = ((bf16[4,1024,512]{2,1,0:S(5)}, s32[]), bf16[1,1024,512]{2,1,0}, u32[]) fusion-start(%written, "
        "%n), kind=kLoop, calls=%cut\n  %read = bf16[1,1024,512]{2,1,0} fusion-done(%reading)\n  ROOT %z",
    )
    read = program.read(text, MESH, GPUS["h100"].clock)
    assert [(each.kind, each.axes) for each in read.collectives] == [("to", ("host",)), ("from", ("host",))]
    assert [each.bytes for each in read.collectives] == pytest.approx([2 * 1024 * 512] * 2, abs=8)  # and a counter
    assert read.unpriced == 0


def test_float8_matmuls_on_gpus_are_priced_at_their_own_rate():
    """Not at XLA's rate, which is for another type."""
    gemm = re.sub(r"(%[lr]|[lr])( =|:) bf16\[", r"\1\2 f8e4m3fn[", PROGRAM)
    assert gemm.count("f8e4m3fn") == 4
    read = program.read(gemm, MESH, GPUS["h100"].clock, rates=program.Rates(1e9, 1e12, float8=2e12))
    assert read.seconds == pytest.approx(2 * 1024 * 512 * 256 / 2e12)


SLICED = """HloModule sliced, is_scheduled=true, num_partitions=1
%sliced (all: bf16[4,8,512,256], rows: bf16[1024,512], groups: s32[8], layer: s32[]) -> bf16[1024,256] {
  %all = bf16[4,8,512,256]{3,2,1,0} parameter(0)
  %rows = bf16[1024,512]{1,0} parameter(1)
  %groups = s32[8]{0} parameter(2)
  %layer = s32[] parameter(3)
  %slice = bf16[1,8,512,256]{3,2,1,0} dynamic-slice(%all, %layer), dynamic_slice_sizes={1,8,512,256}
  %cast = bf16[8,512,256]{2,1,0} bitcast(%slice)
  ROOT %call = bf16[1024,256]{1,0} custom-call(%groups, %rows, %cast), custom_call_target="mosaic_gpu_v2"
}
ENTRY %main (all: bf16[4,8,512,256], x: bf16[1024,512], s: s32[8], n: s32[]) -> bf16[1024,256] {
  %w = bf16[4,8,512,256]{3,2,1,0} parameter(0)
  %x = bf16[1024,512]{1,0} parameter(1)
  %s = s32[8]{0} parameter(2)
  %n = s32[] parameter(3)
  ROOT %y = bf16[1024,256]{1,0} fusion(%w, %x, %s, %n), kind=kCustom, calls=%sliced, metadata={op_name="jit(train_step)/jvp()/moe/shard_map/mpmd_map"}
}
"""  # noqa: E501


def test_a_kernel_fused_with_a_slice_of_its_matrices_costs_no_more():
    def price(matmul):
        return kernels.price(matmul, 1024, GPUS["h100"])

    read = program.read(SLICED, MESH, GPUS["h100"].clock, price)
    alone = GroupedMatmul("rows", (1024, 512, 256, 8), (0, 0, 0), 2, 1, "mosaic")
    (item,) = read.items
    assert read.grouped == (alone,)
    assert (item.kind, item.where, item.seconds) == ("grouped matmul", "forward", price(alone).seconds)


def test_matmuls_take_the_time_of_the_given_share_of_the_peak():
    assert _read(program.Rates(1e9, 1e12, 0.5e12)).seconds == pytest.approx(2 * 1024 * 512 * 256 / 0.5e12)


def test_gpu_kernels_are_priced_as_measured():
    matmul = GroupedMatmul("rows", (131072, 2048, 768, 128), (0, 0, 0), 2, 1, "mosaic")
    made = kernels.price(matmul, 131072, GPUS["h100"])
    assert made.basis == "measured"
    prices = measured.price("h100", "pallas_mosaic_gpu_ragged_dot", "rows", 131072, 2048, 768, 128)
    assert (made.seconds, made.low, made.high) == pytest.approx(prices)
    assert made.flops == 2 * 131072 * 2048 * 768
    # Of 128 matrices, 4 rows read at most 4.
    few = kernels.price(matmul, 4, GPUS["h100"])
    prices = measured.price("h100", "pallas_mosaic_gpu_ragged_dot", "rows", 4, 2048, 768, 128)
    assert (few.seconds, few.low, few.high) == pytest.approx(prices)
    # An H200 has the FLOP/s of an H100: a compute-bound kernel takes as long, with a wider interval.
    like = kernels.price(matmul, 131072, GPUS["h200"])
    assert (like.seconds, like.basis) == (pytest.approx(made.seconds), "by analogy")
    assert like.high / like.low > made.high / made.low
    # Weight gradients were not measured on A100.
    assert kernels.price(dataclasses.replace(matmul, kind="weights", kernel="triton"), 131072, GPUS["a100"]).basis == (
        "by analogy"
    )


def test_tpu_kernels_are_priced_as_measured():
    sizes, tiles = (131072, 2048, 768, 128), (512, 1024, 1024)
    matmul = GroupedMatmul("weights", sizes, tiles, 2, 1)
    made = kernels.price(matmul, 131072, CHIPS["v6e"])
    prices = measured.price("v6e", "pallas_mosaic_tpu_ragged_dot", "wgrad", *sizes)
    assert (made.basis, made.seconds, made.low, made.high) == ("measured", *map(pytest.approx, prices))
    # v5p's timings are those of one of its two cores.
    made = kernels.price(matmul, 131072, CHIPS["v5p"])
    prices = measured.price("v5p", "pallas_mosaic_tpu_ragged_dot", "wgrad", *sizes)
    assert (made.basis, made.seconds) == ("measured", pytest.approx(prices[0] / 2))
    # v4 reaches v5p's share of its own peak: 275 of 459 TFLOP/s, with a wider interval.
    like = kernels.price(matmul, 131072, CHIPS["v4"])
    assert (like.basis, like.seconds) == ("by analogy", pytest.approx(made.seconds * 459 / 275))
    assert like.high / like.low > made.high / made.low
    # A nonlinearity in the kernel was not measured: the logits of the ends' shares are half a unit further.
    rows = GroupedMatmul("rows", (327680, 2880, 2880, 128), tiles, 2, 1)
    plain, gated = (
        kernels.price(dataclasses.replace(rows, kind=k), 327680, CHIPS["v5p"]) for k in ("rows", "activated")
    )
    limit = kernels.roofline(rows, 327680, CHIPS["v5p"])
    assert (gated.basis, gated.seconds) == ("by analogy", pytest.approx(plain.seconds))
    assert (gated.high - limit) / (plain.high - limit) == pytest.approx(math.exp(0.5))


def test_the_roofline_of_kernels_by_hand():
    """v6e: 918 TFLOP/s and 1638 GB/s; v7x: 2307 TFLOP/s and 7370 GB/s on two devices."""
    wide = GroupedMatmul("rows", (4096, 2048, 2048, 1), (1024, 2048, 2048), 2, 1)
    narrow = dataclasses.replace(wide, itemsize=1)
    flops = 2 * 4096 * 2048 * 2048
    assert kernels.roofline(wide, 4096, CHIPS["v6e"]) == pytest.approx(flops / 918e12)
    assert kernels.roofline(wide, 4096, CHIPS["tpu7x"]) == pytest.approx(flops / (2307e12 / 2))
    # Twice the rate for factors of one byte, until the bytes decide: rows and matrices of one, results of two.
    moved = 4096 * 2048 + 2048 * 2048 + 2 * 4096 * 2048
    assert kernels.roofline(narrow, 4096, CHIPS["v6e"]) == pytest.approx(max(flops / (2 * 918e12), moved / 1638e9))
    # 64 rows on 128 experts read at most 64 matrices; a weight gradient writes all.
    thin = GroupedMatmul("rows", (64, 1024, 512, 128), (64, 1024, 512), 2, 1)
    moved = 2 * (64 * (1024 + 512) + 64 * 1024 * 512)
    assert kernels.roofline(thin, 64, CHIPS["v6e"]) == pytest.approx(moved / 1638e9)
    weights = dataclasses.replace(thin, kind="weights")
    moved = 2 * (64 * (1024 + 512) + 128 * 1024 * 512)
    assert kernels.roofline(weights, 64, CHIPS["v6e"]) == pytest.approx(moved / 1638e9)
    # Beside rows and matrices: pairs and activations out; pairs in, their gradients and activations out.
    for kind, numbers in (("activated", 1.5), ("gradients", 5)):
        moved = 2 * (64 * (1024 + numbers * 512) + 64 * 1024 * 512)
        gated = dataclasses.replace(thin, kind=kind)
        assert kernels.roofline(gated, 64, CHIPS["v6e"]) == pytest.approx(moved / 1638e9)


@pytest.mark.parametrize("name", KINDS)
def test_no_kernel_is_priced_above_the_peak(name):
    """Shapes far beyond those that were measured included."""
    chip = KINDS[name]
    kernel = "mosaic" if name in GPUS and name != "a100" else "triton" if name in GPUS else "tpu"
    sizes = itertools.product((1, 4096, 2**20), (128, 2880, 16384), (128, 14336), (1, 8, 384))
    for (rows, k, n, groups), kind, item in itertools.product(sizes, ("rows", "weights", "gradients"), (1, 2)):
        matmul = GroupedMatmul(kind, (rows, k, n, groups), (128, 128, 128), item, 1, kernel)
        made = kernels.price(matmul, rows, chip)
        limit = kernels.roofline(matmul, rows, chip)
        assert made.least <= limit * (1 + 1e-9)
        assert limit <= made.low <= made.seconds <= made.high, (name, matmul)


def test_equal_instructions_share_one_row_with_their_bound():
    def item(name, seconds, flops, moved):
        return Item(
            name, "matmul", "forward", "jvp(loss)/dot", seconds, 4, flops, moved, "c", 0.0, seconds, seconds, ""
        )

    rows = timeline.dearest([item("a", 2.0, 10.0, 3), item("b", 2.0, 10.0, 3), item("c", 1.0, 5.0, 9)], 10.0, 10.0)
    assert [(row["name"], row["seconds"], row["runs"], row["bound"]) for row in rows] == [
        ("a", 16.0, 8, "FLOPs"), ("c", 4.0, 4, "HBM"),
    ]  # fmt: skip
    assert rows[0]["at_bound"] == 0.5  # 1 s of FLOPs in 2 s
    assert [(row["low"], row["high"]) for row in rows] == [(16.0, 16.0), (4.0, 4.0)]
    waited = Exchange("all-gather", ("fsdp",), "weights", 7, 0, 8, 30.0, 20.0)
    (row,) = timeline.dearest([], 1.0, 1.0, [waited, dataclasses.replace(waited, exposed_seconds=0.0)])
    assert (row["seconds"], row["runs"], row["bound"]) == (20.0, 7, "network")
    assert timeline.by_part([item("a", 2.0, 10.0, 3)]) == [
        {"part": "loss and unembedding", "kind": "matmul", "seconds": 8.0}
    ]
    update = dataclasses.replace(item("a", 2.0, 10.0, 3), where="update")
    assert timeline.part(update) == "optimizer"


def test_a_timeline_shows_waits(monkeypatch):
    """By hand: 1 s of work, an exchange of 2 s that is waited for, 1 s of work; three times, then 1 s of work."""

    def item(started, computation, count):
        return Item("a", "matmul", "forward", "", 1.0, count, 0.0, 0, computation, started, 1.0, 1.0, "")

    exchange = Collective("all-gather", (), (0, 1), 8, 3, -1.0, "state.x", "body", (1, 1), 1.0)
    items = item(0.0, "body", 3), item(1.0, "body", 3), item(6.0, "main", 1)
    read = program.CompiledProgram(
        (exchange,), 7.0, {}, 0, 0, 0, items=items, loops=(("main", "body", 3, 0.0),), entry="main"
    )
    monkeypatch.setattr(timeline.exchanges, "timed", lambda *_: ([2.0], [2.0]))
    main, body = timeline.lanes(read, (), GPUS["h100"])
    assert [entry[:3] for entry in body["work"]] == [[0.0, 1.0, "matmul"], [3.0, 1.0, "matmul"]]
    assert body["exchanges"] == [[1.0, 2.0, 2.0, "all-gather, weights"]]
    assert [entry[:3] for entry in main["work"]] == [[0.0, 12.0, "loop"], [12.0, 1.0, "matmul"]]
    assert (main["seconds"], body["seconds"]) == (13.0, 4.0)


def test_a_timeline_joins_short_neighbours_of_one_kind():
    """A 300th of 1.2 s is 4 ms: shorter events join those below four times that. The longest of all runs is first."""
    work = [
        [0.0, 0.001, "matmul", "MoE"], [0.001, 0.002, "matmul", "MoE"], [0.003, 0.003, "matmul", "attention"],
        [0.006, 0.001, "other", "MoE"], [0.007, 1.193, "other", "MoE"],
    ]  # fmt: skip
    assert timeline._merged(work) == [
        [0.0, pytest.approx(0.006), "matmul", "several"], [0.006, 0.001, "other", "MoE"], [0.007, 1.193, "other", "MoE"]
    ]  # fmt: skip

    def item(computation, seconds, count):
        return Item("a", "matmul", "forward", "", seconds, count, 0.0, 0, computation, 0.0, seconds, seconds, "")

    read = program.CompiledProgram(
        (), 8.0, {}, 0, 0, 0, items=(item("once", 2.0, 1), item("often", 1.0, 6)), entry="once"
    )
    lanes = timeline.lanes(read, (), GPUS["h100"])
    assert [(lane["name"], lane["runs"], lane["seconds"]) for lane in lanes] == [("often", 6, 1.0), ("once", 1, 2.0)]


def test_flops_of_kernels_that_state_none_are_split_by_their_bytes():
    """110 FLOPs, of which one kernel states 30; the rest by bytes, 20 and 40, at 10 a second. Half of all are computed.
    Backward takes twice the time of all at peak."""

    def kernel(count, moved, where, flops=0.0):
        return Item(f"k{moved}", "attention", where, "splash", 0.0, count, flops, moved, "c", 0.0, 0.0, 0.0, "")

    def factor(where):
        return (2.0, 1.0, 4.0, 0.5, "by analogy") if where == "backward" else (1.0, 1.0, 1.0, 0.5, "measured")

    items = [kernel(2, 100, "forward"), kernel(1, 200, "backward"), kernel(1, 9, "forward", 30.0)]
    prices = attention.prices(items, 110.0, 10.0, factor)
    assert list(prices) == ["k100", "k200", "k9"]
    assert [price.flops for price in prices.values()] == [10.0, 20.0, 15.0]
    assert [price.seconds for price in prices.values()] == [2.0, 8.0, 3.0]
    assert [price.least for price in prices.values()] == [1.0, 2.0, 1.5]
    assert (prices["k200"].low, prices["k200"].high) == (4.0, 16.0)
    assert [price.basis for price in prices.values()] == ["measured", "by analogy", "measured"]


@pytest.mark.parametrize(("device", "kind"), sorted({(t["device"], t["kind"]) for t in attention.timings()}))
def test_left_out_published_times_of_attention_are_predicted(device, kind):
    """The median error of the time is within a fifth, and at least 70 % lie inside the interval."""
    rows = [row for row in attention.timings() if (row["device"], row["kind"]) == (device, kind)]
    name = next(name for name, each in measured.DEVICES.items() if each == device)
    weights, width = attention._fit(name, kind)
    features = np.array([attention._features_of(row) for row in rows])
    if name != "tpu7x":
        assert not features[:, -1].any()  # of splash attention, from tpu7x
    shares = np.array([attention.share(row) for row in rows])
    predicted = features @ weights
    assert len(rows) >= 10
    assert np.median(np.abs(np.log((1 + np.exp(predicted)) * shares))) < 0.18
    assert np.mean(np.abs(np.log(1 / shares - 1) - predicted) <= width) >= 0.7


def test_times_of_attention_by_hand():
    """In the table, flash attention of Mixtral's heads at 4096 tokens takes 1.14 to 1.23 times all keys at peak on v5p,
    3.35 on v6e; on tpu7x, splash attention takes 2.84 and flash attention 3.18 to 3.31."""
    model = from_config_dict(mixtral_8x7b.get_config()).model
    v5p, v6e = (attention.factor(name, model, 4096, "forward") for name in ("v5p", "v6e"))
    assert v5p[0] == pytest.approx(1.19 * 0.88, rel=0.1)
    assert v6e[0] == pytest.approx(3.35 * 0.88, rel=0.1)
    assert attention.factor("tpu7x", model, 4096, "forward")[0] == pytest.approx(2.84, rel=0.05)
    assert v5p[3] == 4097 / 8192
    assert (v5p[4], v6e[4]) == ("measured", "measured")
    # Not measured: backward on v5p, all of v4, windows.
    backward = attention.factor("v5p", model, 4096, "backward")
    assert backward[4] == attention.factor("v4", model, 4096, "forward")[4] == "by analogy"
    assert 0.7 < backward[0] / v5p[0] < 0.95  # as on tpu7x: 2.42 of 3.19
    # A query of a window of 128 touches two blocks of 256 keys, as in the mean of rows of 1024.
    windowed = dataclasses.replace(model, sliding_window=128)
    assert block_sizes(4096, 128).block_q == 256
    of_window, shorter = (
        attention.factor("v5p", windowed, 4096, "forward"),
        attention.factor("v5p", model, 1024, "forward"),
    )
    assert (of_window[3], of_window[4]) == (512 / 4096, "by analogy")
    assert of_window[0] == pytest.approx(512 / 4096 * shorter[0] / shorter[3])
    assert of_window[2] / of_window[1] > shorter[2] / shorter[1]
    # The mean of the layers.
    some = dataclasses.replace(model, sliding_window=128, pattern="sliding attention")
    assert attention.factor("v5p", some, 4096, "forward")[0] == pytest.approx((of_window[0] + v5p[0]) / 2)
    # One of a TPU v7x's two devices has half of the chip's peak: 2 matmuls x 2 FLOPs x 8 heads x 256 of the half of the
    # scores that counts are 1.1 TFLOPs, .953 ms, and took 2.175 ms.
    row = {
        "device": "tpu7x", "kind": "forward", "batch": "1", "tokens": "16384", "heads": "8", "head_dim": "256",
        "value_dim": "256", "milliseconds": "2.175",
    }  # fmt: skip
    assert attention.share(row) == pytest.approx(0.953 / 2.175, rel=1e-3)


@pytest.mark.parametrize("name", KINDS)
def test_no_attention_is_priced_above_the_peak(name):
    model = from_config_dict(mixtral_8x7b.get_config()).model
    for tokens, head_dim, window, where in itertools.product(
        (1024, 4096, 131072), (64, 128, 256), (0, 128, 4096), ("forward", "backward")
    ):
        changed = dataclasses.replace(model, head_dim=head_dim, sliding_window=window)
        seconds, low, high, computed, _ = attention.factor(name, changed, tokens, where)
        assert computed <= low <= seconds <= high


def test_arrays_at_the_peak():
    """By hand: the peak is the in-place update of the stack of 4 layers, when y, g and the arguments are live too."""
    arrays = liveness.at_peak(hlo.parse(PROGRAM))
    assert [(array.name, array.bytes) for array in arrays] == [
        ("kept", 4 * 1024 * 512 * 2), ("w", 8 * 512 * 256 * 2), ("g", 8 * 512 * 256 * 2), ("x", 1024 * 512 * 2),
        ("y", 1024 * 256 * 2),
    ]  # fmt: skip


NESTED = """HloModule jit_step, is_scheduled=true
%called (q: f32[256]) -> f32[512] {
  %q = f32[256]{0} parameter(0)
  ROOT %inner = f32[512]{0} custom-call(%q)
}
%body (p: (f32[256])) -> (f32[256]) {
  %p = (f32[256]{0}) parameter(0)
  %x = f32[256]{0} get-tuple-element(%p), index=0
  %made = f32[512]{0} call(%x), to_apply=%called
  %near = f32[9999]{0:S(1)} custom-call(%x)
  %gathering = ((f32[256]{0}), f32[1024]{0}) all-gather-start(%x)
  %gathered = f32[1024]{0} all-gather-done(%gathering)
  %next = f32[256]{0} custom-call(%gathered)
  ROOT %t = (f32[256]{0}) tuple(%next)
}
ENTRY %main (a: f32[16]) -> f32[256] {
  %a = f32[16]{0} parameter(0)
  %first = f32[256]{0} custom-call(%a)
  %carried = (f32[256]{0}) tuple(%first)
  %loop = (f32[256]{0}) while(%carried), condition=%c, body=%body
  ROOT %r = f32[256]{0} get-tuple-element(%loop), index=0
}
"""


def test_arrays_of_loops_and_calls_at_the_peak():
    """By hand: what a gather receives, without its operand, and what is made of it, beside what the loop carries; the
    array in memory on the chip does not count. A call of four times the size is the peak; its result is the array that
    its computation returns, once."""

    def at_peak(text):
        return [(array.name, array.bytes) for array in liveness.at_peak(hlo.parse(text))]

    assert at_peak(NESTED) == [("gathering", 4 * 1024), ("first", 4 * 256), ("next", 4 * 256), ("a", 4 * 16)]
    assert at_peak(NESTED.replace("512", "2048")) == [("inner", 4 * 2048), ("first", 4 * 256), ("a", 4 * 16)]


def test_branches_that_need_the_same_memory():
    branch = "%b{0} (p{0}: s32[]) -> f32[256] {{\n  ROOT %e{0} = f32[256]{{0}} custom-call()\n}}\n\n"
    text = (
        "HloModule jit_step, is_scheduled=true\n\n" + branch.format(0) + branch.format(1) + "ENTRY %main (i: s32[]) "
        "-> f32[256] {\n  %i = s32[] parameter(0)\n  ROOT %c = f32[256]{0} conditional(%i, %i, %i), "
        "branch_computations={%b0, %b1}\n}\n"
    )
    assert "e0" in [array.name for array in liveness.at_peak(hlo.parse(text))]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bandwidth": 0.0}, "--bandwidth=0.0: must be a positive factor"),
        ({"matmul_share": 1.5}, "--matmul_share=1.5: must be a share of the peak, between 0 and 1"),
        ({"skew": 0.5}, "--skew=0.5: must be the busiest device's rows over the mean, at least 1"),
    ],
)
def test_scenarios_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Scenario(**settings)


def test_scenarios_scale_the_network():
    slower, faster = Scenario(bandwidth=0.5).applied(CHIPS["v5p"]), Scenario(bandwidth=2.0).applied(GPUS["h100"])
    assert slower.axis_bandwidth(1, 4) == CHIPS["v5p"].axis_bandwidth(1, 4) / 2
    assert faster.axis_bandwidth(8, 8) == 2 * GPUS["h100"].network
    assert Scenario().words() == ""
    assert Scenario(skew=2.0).words() == "2 x the mean rows on the busiest device's experts"
