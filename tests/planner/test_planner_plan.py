"""Plans, the network model, FLOPs and topologies; tests that need libtpu are marked slow."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moe.config import ConfigError
from moe.config.parse import from_config_dict
from moe.configs import gshard_translation, mixtral_8x7b, st_moe, switch_transformers, t5
from moe.dispatch.backends import gpu, row_blocks
from moe.dispatch.exchange import OVERFLOW_SCOPE
from moe.models.flops import count_parameters
from moe.planner import arithmetic, fit, network, scaling, topology
from moe.planner.chips import CHIPS
from moe.planner.exchanges import Exchange
from moe.planner.plan import Plan
from moe.planner.program import Collective
from moe.planner.records import HOST

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.mark.parametrize(
    ("kind", "purpose", "mebibytes", "slices", "flaw", "unnamed"),
    [
        ("all-gather", "dot_general", 2, 1, True, False),
        ("all-gather", "dot_general", 1, 1, False, False),  # small: a counter
        ("all-gather", "weights", 2, 1, False, False),
        ("all-gather", "loads of experts", 2, 1, False, False),
        ("all-reduce", "dot_general", 2, 1, False, False),
        ("all-gather", "unnamed", 2, 1, True, False),
        ("all-gather", "unnamed", 2, 2, False, True),  # programs of several slices carry no names
        ("all-gather", "dot_general", 2, 2, True, False),
        ("all-gather", "all_gather of keys", 2, 1, False, False),  # over mesh.context
    ],
)
def test_an_all_gather_of_tokens_is_a_flaw(kind, purpose, mebibytes, slices, flaw, unnamed):
    axes = ("context",) if purpose == "all_gather of keys" else ("fsdp",)
    exchange = Exchange(kind, axes, purpose, 1, 0, mebibytes * 2**20, 0.0, 0.0)
    fields = dict.fromkeys(field.name for field in dataclasses.fields(Plan))
    made = Plan(**fields | {"exchanges": (exchange,), "num_slices": slices})
    assert made.token_exchanges == (exchange,) * flaw
    assert made.unnamed_gathers == (exchange,) * unnamed


def _torus(*shape):
    """Devices of a torus in row-major order."""
    return [types.SimpleNamespace(coords=place, slice_index=0) for place in np.ndindex(*shape)]


def test_network_model_by_hand():
    devices = _torus(4, 4, 4)  # rings of 4 with links of 100 GB/s each way, when all of it is usable
    chip = _usable("v5p")

    def collective(kind, group, size=8e8):
        return Collective(kind, (), tuple(group), int(size), 1, -1, "")

    ring, plane = range(4), range(16)
    # 800 MB x 3/4 over both directions of a ring
    assert network.seconds(collective("all-gather", ring), devices, chip) == pytest.approx(8e8 * 3 / 4 / 2e11)
    assert network.seconds(collective("all-reduce", ring), devices, chip) == pytest.approx(2 * 8e8 * 3 / 4 / 2e11)
    # two rings at once
    assert network.seconds(collective("all-gather", plane), devices, chip) == pytest.approx(8e8 * 15 / 16 / 4e11)
    # one ring in both directions through all 16
    one = dataclasses.replace(collective("all-gather", plane), rings=((16,), (16,)))
    assert network.seconds(one, devices, chip) == pytest.approx(8e8 * 15 / 16 / 2e11)
    # half of what 4 devices send crosses the middle over 2 links each way: 4/8 of a device's bytes
    assert network.seconds(collective("all-to-all", ring), devices, chip) == pytest.approx(8e8 * 4 / 8 / 1e11)
    # members two apart share each link with another group, in both directions of the ring
    assert network.seconds(collective("all-gather", (0, 2)), devices, chip) == pytest.approx(8e8 / 2 / 1e11)
    assert network.seconds(collective("all-gather", (0,)), devices, chip) == 0.0
    # two slices: half of what is gathered arrives by DCN, and all that one stage passes to the next
    for device in devices:
        device.slice_index = device.coords[0] // 2
    assert network.seconds(collective("all-gather", range(64)), devices, chip) == pytest.approx(8e8 / 2 / chip.dcn)
    assert network.seconds(collective("collective-permute", (0, 32)), devices, chip) == pytest.approx(8e8 / chip.dcn)


def test_network_of_lines_strides_and_shared_chips_by_hand():
    """800 MB; links of 50 GB/s on v5e, whose dimensions of 4 do not wrap, and of 100 GB/s on others."""

    def seconds(kind, group, devices, chip, **fields):
        collective = Collective(kind, (), tuple(group), int(8e8), 1, -1, "", **fields)
        return network.seconds(collective, devices, _usable(chip))

    line, cube, long = _torus(4, 4), _torus(4, 4, 4), _torus(4, 4, 8)
    assert seconds("all-gather", range(4), line, "v5e") == pytest.approx(8e8 * 3 / 4 / 50e9)
    # all that two of four devices send to the other two crosses one link: 2 x 2/4 of a device's bytes
    assert seconds("all-to-all", range(4), line, "v5e") == pytest.approx(8e8 / 50e9)
    # of a ring of 4 and one of 8, the longer decides: 8/8 of a device's bytes
    assert seconds("all-to-all", range(32), long, "v5p") == pytest.approx(8e8 / 1e11)
    # members two apart: two groups share each link, also those of one ring through all four members
    assert seconds("collective-permute", (0, 2), cube, "v5p") == pytest.approx(8e8 / 5e10)
    assert seconds("all-gather", (0, 2, 8, 10), cube, "v5p") == pytest.approx(8e8 * 3 / 4 / 2e11)
    assert seconds("all-gather", (0, 2, 8, 10), cube, "v5p", rings=((4,),)) == pytest.approx(8e8 * 3 / 4 / 5e10)

    # Two devices a chip, which share its links, its way to other slices and to the host; they meet in its memory.
    pairs = [types.SimpleNamespace(coords=device.coords, slice_index=0) for device in cube for _ in range(2)]
    chip = CHIPS["tpu7x"]
    assert seconds("all-gather", (0, 1), pairs, "tpu7x") == pytest.approx(8e8 / chip.memory_bandwidth)
    assert seconds("all-reduce", (0, 1), pairs, "tpu7x") == pytest.approx(2 * 8e8 / chip.memory_bandwidth)
    assert seconds("all-gather", range(0, 8, 2), pairs, "tpu7x") == pytest.approx(8e8 * 3 / 4 / (2 * 50e9))
    # Both devices of 4 chips: what arrives at a chip serves both, at all of its links' bandwidth.
    assert seconds("all-gather", range(8), pairs, "tpu7x") == pytest.approx(8e8 * 7 / 8 / (2 * 100e9))
    # Two rings that count the 4 chips: half of the bytes each, 3/4 of them over every link.
    assert seconds("all-gather", range(8), pairs, "tpu7x", rings=((4,),)) == pytest.approx(8e8 * 3 / 4 / 100e9)
    to_host = Collective("to", (HOST,), (), int(8e8), 1, -1, "")
    assert network.seconds(to_host, pairs, chip) == pytest.approx(8e8 / (15e9 / 2))
    for device in pairs:
        device.slice_index = device.coords[0] // 2
    assert seconds("all-reduce", range(128), pairs, "tpu7x") == pytest.approx(2 * 8e8 / 2 / (chip.dcn / 2))
    ring, both = (Collective("all-gather", (), tuple(group), 8, 1, -1, "") for group in (range(0, 8, 2), range(128)))
    assert [network.link(each, pairs, chip) for each in (to_host, ring, both)] == ["to", "torus", "network"]


def _usable(name):
    """A chip whose links' bandwidth is usable as a whole."""
    return dataclasses.replace(CHIPS[name], link=CHIPS[name].link / network.USABLE)


def test_rings_work_in_phases():
    """64 devices of a torus of 4 x 8 x 8 whose members are 4 apart in the last dimension: 4 and 8 of stride 1, 2 of
    stride 4, as an algorithm of six rings with a phase for each states them. Links of 100 GB/s.

    The slowest rings take the last phase, half of their bytes, along the far neighbours: of a sixth of 800 MB the
    phases pass 3/64, 4 x 7/64 and, at a quarter of the link, 32/64.
    """
    devices = _torus(4, 8, 8)
    group = tuple(i for i, device in enumerate(devices) if device.coords[2] % 4 == 0)
    orders = ((4, 8, 2), (8, 2, 4), (2, 4, 8))
    gather = Collective("all-gather", (), group, int(8e8), 1, -1, "", rings=orders * 2)
    expected = 8e8 / 6 / 1e11 * (3 / 64 + 4 * 7 / 64 + 32 / 64 * 4)
    assert network.seconds(gather, devices, _usable("v5p")) == pytest.approx(expected)
    # A reduce-scatter's first phase passes most.
    scatter = dataclasses.replace(gather, kind="reduce-scatter", rings=tuple(order[::-1] for order in orders) * 2)
    assert network.seconds(scatter, devices, _usable("v5p")) == pytest.approx(expected)
    # No ring beats all dimensions together: two rings of 4 and of 8, and one of 2 at a quarter.
    many = dataclasses.replace(gather, rings=((64,),) * 100)
    assert network.seconds(many, devices, _usable("v5p")) == pytest.approx(8e8 * 63 / 64 / (2e11 + 2e11 + 5e10))


def test_flops_count_loops_and_kernels():
    x = jnp.ones((8, 16))

    def scanned(x, w):
        return jax.lax.scan(lambda h, _: (h @ w, None), x, None, length=5)[0]

    jaxpr = jax.make_jaxpr(scanned)(x, jnp.ones((16, 16))).jaxpr
    assert arithmetic.matmul_flops(jaxpr) == arithmetic.Flops(matmuls=5 * 2 * 8 * 16 * 16)


def test_flops_of_branches_devices_grids_and_unused_products():
    x, w = jnp.ones((8, 16)), jnp.ones((16, 16))
    one = 2 * 8 * 16 * 16

    def matmuls(function, *arguments):
        return arithmetic.matmul_flops(jax.make_jaxpr(function)(*arguments).jaxpr)

    # The most expensive branch, and only what the result needs.
    branches = matmuls(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), x, w)
    assert branches == arithmetic.Flops(matmuls=2 * one)
    assert matmuls(lambda x, w: [x @ w, x + 1][1], x, w) == arithmetic.Flops()

    # Two of the rows on each of four devices.
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    split = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert matmuls(split, x, w) == arithmetic.Flops(matmuls=one)

    # Two rows in each of four steps of a kernel's grid.
    def kernel(x_ref, w_ref, y_ref):
        y_ref[...] = x_ref[...] @ w_ref[...]

    specs = [pl.BlockSpec((2, 16), lambda i: (i, 0)), pl.BlockSpec((16, 16), lambda i: (0, 0))]
    result = jax.ShapeDtypeStruct((8, 16), x.dtype)
    blocks = pl.pallas_call(kernel, result, grid=(4,), in_specs=specs, out_specs=specs[0])
    assert matmuls(blocks, x, w) == arithmetic.Flops(kernels=one)


def test_flops_of_loops_that_depend_on_the_router_by_hand():
    """Three groups of 9 rows have two full blocks of 4 each, where the router is balanced; a loop over further rounds
    of an exchange has no trips then, one of unknown trips counts once."""
    x, w = jnp.ones((8, 16)), jnp.ones((16, 16))
    one = 2 * 8 * 16 * 16

    def looped(scope):
        def run(x, w):
            with scope:
                return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ w, x)

        return arithmetic.matmul_flops(jax.make_jaxpr(run)(x, w).jaxpr).total

    assert looped(jax.named_scope("any")) == one
    assert looped(jax.named_scope(OVERFLOW_SCOPE)) == 0
    assert looped(row_blocks._scope("further", 4, 3, 27)) == 3 * 2 * one

    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    # A kernel whose grid depends on the rows that arrive declares the FLOPs of a full buffer.
    def called(steps, x):
        cost = pl.CostEstimate(flops=42, transcendentals=0, bytes_accessed=0)
        spec = pl.BlockSpec((2, 16), lambda i: (i, 0))
        result = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, result, grid=(steps,), in_specs=[spec], out_specs=spec, cost_estimate=cost)(x)

    jaxpr = jax.make_jaxpr(called)(jnp.int32(3), x).jaxpr
    assert arithmetic.matmul_flops(jaxpr) == arithmetic.Flops(grouped=42.0)


def test_unknown_topology_lists_names(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ConfigError, match="for example v2:16x16, v3:32x32"):
        topology.get_topology("v9:2x2")

    def libtpu(name, **_):
        if "3" in name or "16" in name:
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no such layout\nand more")
        return types.SimpleNamespace(devices=[])

    monkeypatch.setattr(topology.topologies, "get_topology_desc", libtpu)
    with pytest.raises(
        ConfigError, match=r"\(INVALID_ARGUMENT: no such layout\); some that it accepts.* v5e:2x2, .*v5e:8x8$"
    ):
        topology.get_topology("v5e:3x5")
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install \"jax\[tpu\]=="):
        topology.get_topology("v5p:2x2x1")


def test_flops_of_grouped_matmuls_do_not_depend_on_the_number_of_groups():
    x, w, sizes = jnp.ones((24, 16)), jnp.ones((4, 16, 8)), jnp.full(4, 6)
    product = 2 * 24 * 16 * 8  # of all rows; the gradients of rows and of weights cost the same

    def loss(x, w):
        return jnp.sum(jax.lax.ragged_dot(x, w, sizes))

    assert arithmetic.matmul_flops(jax.make_jaxpr(loss)(x, w).jaxpr).total == product
    assert arithmetic.matmul_flops(jax.make_jaxpr(jax.value_and_grad(loss, 1))(x, w).jaxpr).total == 2 * product
    assert arithmetic.matmul_flops(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(x, w).jaxpr).total == 3 * product


def test_flops_of_grouped_kernels_for_gpus_are_those_of_their_rows():
    x, w, sizes = jnp.ones((64, 32)), jnp.ones((4, 32, 16)), jnp.full(4, 16)
    product = 2 * 64 * 32 * 16

    def loss(x, w):
        return jnp.sum(gpu.grouped_matmul(x, w, sizes, True))

    assert arithmetic.matmul_flops(jax.make_jaxpr(loss)(x, w).jaxpr).grouped == product
    both = arithmetic.matmul_flops(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(x, w).jaxpr)
    assert both == arithmetic.Flops(grouped=3 * product)


_SCALED = {
    "series": "a series", "topology": "v5p:2x2x2", "devices": 8, "experts": 4, "parameters": 1e9, "memory_gib": 1.0,
    "compile_seconds": 1.0, "all_to_alls": 2, "all_to_all_mib": 3.0, "all_to_all_ms": 4.0, "step_ms": 100.0,
}  # fmt: skip


def test_scaling_lists_refused_points_and_intervals():
    points = [scaling.Point("a series", "v5p:2x2x2", from_config_dict({"model": {"moe": {"num_experts": 4}}}))]
    with pytest.MonkeyPatch.context() as patch:

        def make_plan(*_, **__):
            raise ConfigError("does not fit: by 1 GiB; what helps, most first: more chips")

        patch.setattr(scaling.make_plan, "make_plan", make_plan)
        patch.setattr(scaling, "get_topology", lambda name: types.SimpleNamespace(devices=range(8)))
        (row,) = scaling.measure(points)
    assert row["refused"] == "does not fit: by 1 GiB"
    page = scaling.table([row, row | {"topology": "v5p:4x4x4", "parameters": 2_000_000_000}])
    assert "| a series | v5p:2x2x2 | 8 | 4 | – | refused | – |" in page
    assert "- a series on v5p:2x2x2: does not fit: by 1 GiB" in page
    (*_, line) = scaling.table([_SCALED | {"step_interval_ms": [80.4, 130.0]}]).splitlines()
    assert line.endswith("| 8 | 4 | 1.0 | 1.0 | 1.0 | 2 | 3.0 | 4.0 | 100 (80 to 130) |")
    assert scaling.table([_SCALED]).endswith("| 100.0 |")
    kept = Path(__file__).parents[2] / "docs" / "results" / "scaling.jsonl"
    assert all(row["step_interval_ms"][0] < row["step_ms"] < row["step_interval_ms"][1] for row in scaling.read(kept))


def test_a_row_of_scaling_by_hand(monkeypatch):
    """Five exchanges of two kinds, 3 MiB and 6 ms; the gather is none of them."""
    exchanges = [
        Exchange(kind, ("expert",), "", count, 0, size, seconds, 0.0)
        for kind, count, size, seconds in (
            ("all-to-all", 3, 2**20, 0.002), ("ragged-all-to-all", 2, 2**21, 0.004), ("all-gather", 7, 2**30, 1.0),
        )
    ]  # fmt: skip
    made = types.SimpleNamespace(
        exchanges=exchanges, total_parameters=10**9, memory=types.SimpleNamespace(total=3 * 2**29), compile_seconds=2.5,
        step_seconds=0.25, step_interval=(0.2, 0.3), token_exchanges=(),
    )  # fmt: skip
    monkeypatch.setattr(scaling.make_plan, "make_plan", lambda *_, **__: made)
    monkeypatch.setattr(scaling, "get_topology", lambda name: types.SimpleNamespace(devices=range(8)))
    config = from_config_dict({"model": {"moe": {"num_experts": 4}}})
    (row,) = scaling.measure([scaling.Point("a series", "v5p:2x2x2", config)])
    assert row == {
        "series": "a series", "topology": "v5p:2x2x2", "devices": 8, "experts": 4, "parameters": 10**9,
        "memory_gib": 1.5, "compile_seconds": 2.5, "all_to_alls": 5, "all_to_all_mib": 3.0,
        "all_to_all_ms": pytest.approx(6.0), "step_ms": 250.0, "step_interval_ms": [200.0, 300.0],
        "token_all_gathers": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("experts", "devices", "tensor", "data", "expert"), [(2, 8, 1, 4, 2), (16, 8, 1, 1, 8), (16, 8, 2, 1, 4)]
)
def test_meshes_of_the_scaling_experiment(experts, devices, tensor, data, expert):
    """At most as many devices hold experts as there are, in groups of ``tensor``; the others hold copies."""
    config = from_config_dict(mixtral_8x7b.get_config())
    made = scaling.at_scale(config, experts=experts, devices=devices, rows=3, dispatch="gather", tensor=tensor)
    assert (made.mesh.data, made.mesh.fsdp, made.mesh.expert, made.mesh.tensor) == (data, 1, expert, tensor)
    assert made.train.batch_size == 3 * devices
    assert (made.model.moe.num_experts, made.model.moe.dispatch) == (experts, "gather")


def test_published_sizes():
    assert count_parameters(from_config_dict(mixtral_8x7b.get_config()).model) == (46_702_792_704, 12_879_925_248)
    with pytest.raises(ConfigError, match="the sizes are base-8, base-16"):
        switch_transformers.get_config("huge")
    with pytest.raises(ConfigError, match="2048e36l"):
        gshard_translation.get_config("64e1l")
    for config in (t5, st_moe):
        with pytest.raises(ConfigError, match="huge: the sizes are"):
            config.get_config("huge")


SMALL = {
    "num_layers": 2, "vocab_size": 512, "d_model": 512, "d_ff": 1024, "num_heads": 4, "num_kv_heads": 4,
}  # fmt: skip


def _plan_pod(*flags, config="mixtral_8x7b"):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "moe", "plan", f"--config=configs/{config}.py"]
    command += [f"--config.model.{name}={value}" for name, value in SMALL.items()]
    command += ["--config.data.sequence_length=512", "--config.train.batch_size=8", *flags]
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
    made = fit.estimate(small, plan["mesh"], "tpu")
    assert made.parameters == plan["memory"]["parameters"]
    assert made.optimizer == plan["memory"]["optimizer"]
    assert made.fixed < plan["memory_total"]


@pytest.mark.slow
@needs_libtpu
@pytest.mark.timeout(900)
def test_gpt_oss_gathers_only_weights():
    """With sinks, biases and windows by layer, 4 layers in 2 repeats gather nothing but weights, however small."""
    flags = ["--config.mesh.expert=8", "--config.train.batch_size=16", "--config.model.moe.d_ff=256"]
    flags += ["--config.model.num_layers=4"]
    plan = json.loads(_plan_pod("--topology=v5p:2x2x4", *flags, "--json", config="gpt_oss_20b"))
    assert {e["purpose"] for e in plan["exchanges"] if e["kind"] == "all-gather"} == {"weights"}


@pytest.mark.slow
@needs_libtpu
def test_a_search_compiles_and_names_the_best(tmp_path):
    page = _plan_pod("--topology=v5p:2x2x1", "--search", "--limit=2", f"--cache={tmp_path}")
    assert "moe train --config=configs/mixtral_8x7b.py --config.model.num_layers=2" in page
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert _plan_pod("--topology=v5p:2x2x1", "--search", "--limit=2", f"--cache={tmp_path}") == page
