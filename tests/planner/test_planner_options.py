"""Exchanges on SparseCores, waiting for the network, the choice of a remat policy, the spread of published steps."""

import dataclasses
import math
import types

import pytest

from moe.config import ConfigError, MeshConfig
from moe.config.parse import from_config_dict
from moe.configs import mixtral_8x7b
from moe.dispatch import hosts
from moe.models import flops
from moe.planner import calibration, candidates, exchanges, fit, make_plan, program
from moe.planner.chips import CHIPS
from moe.planner.memory_errors import DoesNotFitError
from moe.planner.records import Collective, Price

MESH = {"data": 1, "fsdp": 64, "expert": 1, "tensor": 1}
ONE_DEVICE = MeshConfig(data=1)

# Excerpt of a compiled train step for v5p: a gather of [8,64,32] over 4 chips on the SparseCore, whose operand is given
# to it before a fusion of 500 cycles; then a reduce-scatter of the same kind with nothing beside it.
SPARSE_CORE = """HloModule jit_train_step, is_scheduled=true
%gathering (p: bf16[8,64,32]) -> bf16[8,256,32] {
  %p = bf16[8,64,32]{2,1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,256,32]{2,1,0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}
}, execution_thread="sparsecore"
%scattering (p.1: bf16[8,256,32]) -> bf16[8,64,32] {
  %p.1 = bf16[8,256,32]{2,1,0} parameter(0)
  ROOT %reduce-scatter.2 = bf16[8,64,32]{2,1,0} reduce-scatter(%p.1), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}, to_apply=%add
}, execution_thread="sparsecore"
ENTRY %main (w: bf16[8,64,32]) -> bf16[8,64,32] {
  %w = bf16[8,64,32]{2,1,0} parameter(0)
  %gather-start = ((), (), (s32[1]{0})) call-start(), async_execution_thread="sparsecore", to_apply=%gathering, metadata={op_name="jit(train_step)/jvp()/shard_map/weights.shards/all_gather"}
  %fusion.1 = bf16[8]{0} fusion(%w), kind=kLoop, calls=%f, backend_config={"window_config":{"estimated_cycles":"70"}}
  %gather-update = ((bf16[8,64,32]{2,1,0}), bf16[8,256,32]{2,1,0}) call-update(%gather-start, %w)
  %fusion.2 = bf16[8]{0} fusion(%w), kind=kLoop, calls=%f, backend_config={"window_config":{"estimated_cycles":"500"}}
  %gather-done = bf16[8,256,32]{2,1,0} call-done(%gather-update), metadata={op_name="jit(train_step)/jvp()/shard_map/weights.shards/all_gather"}
  %scatter-start = ((), (), (s32[1]{0})) call-start(), async_execution_thread="sparsecore", to_apply=%scattering
  %scatter-update = ((bf16[8,256,32]{2,1,0}), bf16[8,64,32]{2,1,0}) call-update(%scatter-start, %gather-done)
  ROOT %scatter-done = bf16[8,64,32]{2,1,0} call-done(%scatter-update)
}
"""  # noqa: E501


def test_reads_exchanges_on_sparse_cores():
    read = program.read(SPARSE_CORE, MESH, clock=1.0)
    size = 8 * 256 * 32 * 2  # the result of the gather, the input of the reduce-scatter
    found = [(c.kind, c.axes, c.bytes, c.overlap_seconds, c.started) for c in read.collectives]
    assert found == [("all-gather", ("fsdp",), size, 500, 70), ("reduce-scatter", ("fsdp",), size, 0, 570)]
    assert (read.seconds, read.unpriced) == (570, 0)


# Excerpt of a compiled train step for v5e: a gather of [8,64,32] over 4 chips that is started, continued by a fusion of
# 500 cycles, not by one of 70, and finished; the computations of all three contain a copy of it.
CARRIED = """HloModule jit_train_step, is_scheduled=true
%start (p: bf16[8,64,32]) -> (bf16[8,64,32], bf16[8,256,32], u32[]) {
  %p = bf16[8,64,32]{2,1,0} parameter(0)
  %all-gather.1 = bf16[8,256,32]{2,1,0} all-gather(%p), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %custom-call.1 = (bf16[8,64,32]{2,1,0}, bf16[8,256,32]{2,1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}
%async_collective_fusion.1 (p.1: bf16[8,64,32], q.1: bf16[8,256,32]) -> (bf16[8], bf16[8,256,32]) {
  %p.1 = bf16[8,64,32]{2,1,0} parameter(0)
  %q.1 = bf16[8,256,32]{2,1,0} parameter(1)
  %work = bf16[8]{0} fusion(%p.1), kind=kLoop, calls=%f
  %all-gather.2 = bf16[8,256,32]{2,1,0} all-gather(%p.1), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %both = (bf16[8]{0}, bf16[8,256,32]{2,1,0}) tuple(%work, %all-gather.2)
}
%done (p.2: bf16[8,64,32], q.2: bf16[8,256,32]) -> bf16[8,256,32] {
  %p.2 = bf16[8,64,32]{2,1,0} parameter(0)
  %q.2 = bf16[8,256,32]{2,1,0} parameter(1)
  %all-gather.3 = bf16[8,256,32]{2,1,0} all-gather(%p.2), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}, metadata={op_name="jit(train_step)/jvp()/weights.shards/all_gather"}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %custom-call.2 = bf16[8,256,32]{2,1,0} custom-call(%p.2, %q.2, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}
ENTRY %main (w: bf16[8,64,32]) -> bf16[8,256,32] {
  %w = bf16[8,64,32]{2,1,0} parameter(0)
  %first = bf16[8]{0} fusion(%w), kind=kLoop, calls=%f, backend_config={"window_config":{"estimated_cycles":"30"}}
  %gather-start = (bf16[8,64,32]{2,1,0}, bf16[8,256,32]{2,1,0}, u32[]{:S(2)}) fusion(%w), kind=kCustom, calls=%start
  %a = bf16[8,64,32]{2,1,0} get-tuple-element(%gather-start), index=0
  %b = bf16[8,256,32]{2,1,0} get-tuple-element(%gather-start), index=1
  %step = (bf16[8]{0}, bf16[8,256,32]{2,1,0}) fusion(%a, %b), kind=kOutput, calls=%async_collective_fusion.1, backend_config={"window_config":{"estimated_cycles":"500"}}
  %c = bf16[8,256,32]{2,1,0} get-tuple-element(%step), index=1
  %other = bf16[8]{0} fusion(%w), kind=kLoop, calls=%f, backend_config={"window_config":{"estimated_cycles":"70"}}
  ROOT %gather-done = bf16[8,256,32]{2,1,0} fusion(%a, %c), kind=kCustom, calls=%done
}
"""  # noqa: E501


def test_an_exchange_that_fusions_continue_is_read_once():
    read = program.read(CARRIED, MESH, clock=1.0)
    (gather,) = read.collectives
    assert (gather.kind, gather.axes, gather.bytes) == ("all-gather", ("fsdp",), 8 * 256 * 32 * 2)
    assert (gather.overlap_seconds, gather.started) == (500, 30 + 70)  # as if its fusion came last
    assert exchanges.purpose(gather) == exchanges.WEIGHTS
    assert read.seconds == 30 + 500 + 70


def test_reads_the_rings_of_an_exchange():
    phase = '{"ring_type":"ICI_RING_TYPE_UNIDIR_CW","core_count":"2"}'
    ring = f'{{"phase_rings":[{phase},{phase}]}}'
    two = SPARSE_CORE.replace(
        "dimensions={1}\n", f'dimensions={{1}}, backend_config={{"color_strategies":[{ring},{ring}]}}\n'
    )
    assert [collective.rings for collective in program.read(two, MESH, clock=1.0).collectives] == [((2, 2), (2, 2)), ()]
    of_one_dimension = CARRIED.replace('"2"}', '"2"},"emitter":"1DAllGatherNonMajorDimImbalanced"')
    assert program.read(of_one_dimension, MESH, clock=1.0).collectives[0].rings == ((4,), (4,))


def test_kernels_overlap_exchanges():
    kernel = """  %y = bf16[64,32]{1,0} custom-call(%s, %x, %m), custom_call_target="tpu_custom_call", frontend_attributes={ragged_dot_tiling="8,8,8"}
  %gather-done"""  # noqa: E501
    text = SPARSE_CORE.replace("  %gather-done", kernel).replace(
        "  %w = bf16[8,64,32]{2,1,0} parameter(0)\n",
        "  %w = bf16[8,64,32]{2,1,0} parameter(0)\n  %x = bf16[64,8]{1,0} parameter(1)\n"
        "  %m = bf16[2,8,32]{2,1,0} parameter(2)\n",
    )
    read = program.read(text, MESH, clock=1.0, kernel_price=lambda matmul: Price(1000.0, 900.0, 1200.0, "measured"))
    assert read.collectives[0].overlap_seconds == 1500
    assert read.seconds == 570  # kernels are added elsewhere


def test_attention_overlaps_exchanges():
    kernel = '  %a = bf16[64,32]{1,0} custom-call(%w), custom_call_target="tpu_custom_call"\n  %gather-done'
    text = SPARSE_CORE.replace("  %gather-done", kernel)

    def prices(kernels):
        assert [(item.name, item.bytes) for item in kernels] == [("a", 2 * (8 * 64 * 32 + 64 * 32))]
        return {"a": Price(1000.0, 900.0, 1200.0, "measured", 7.0)}

    read = program.read(text, MESH, clock=1.0, attention_prices=prices)
    assert read.collectives[0].overlap_seconds == 1500
    (item,) = (item for item in read.items if item.kind == "attention")
    assert (item.seconds, item.low, item.high, item.basis, item.flops) == (1000.0, 900.0, 1200.0, "measured", 7.0)
    assert read.seconds == 570
    assert read.unpriced == 0


def test_exchanges_wait_for_each_other():
    """By hand: gathers of 3 s that start at 0 s and are awaited at 2 s and 4 s of work; then a synchronous one."""

    def collective(started, overlap, places, seconds=3.0):
        return Collective("all-gather", (), (0, 1), 0, 1, overlap, str(seconds), "body", places, started)

    def exposed(collectives, links="nnnnn"):
        return exchanges.exposed(collectives, [float(c.source) for c in collectives], links[: len(collectives)])

    work = [
        collective(0.0, 2.0, (0, 3)),  # 0 to 3 s: awaited at 2 s, 1 s exposed
        collective(0.0, 4.0, (1, 6)),  # 3 to 6 s: awaited at 4 s of work + 1 s, 1 s exposed
        collective(1.0, 1.0, (2, 4), 1e-6),  # small: does not wait for the others
        collective(5.0, -1.0, (7, 7)),  # starts at 5 + 2 s: 3 s exposed
    ]
    assert exposed(work) == pytest.approx([1.0, 1.0, 0.0, 3.0])
    other = [dataclasses.replace(c, computation="another") for c in work[:1]]
    assert exposed(work[:1] + other) == [1.0, 1.0]
    # On its own link the second finishes at 3 s, before it is awaited.
    assert exposed(work, "nvnn") == pytest.approx([1.0, 0.0, 0.0, 3.0])
    # The 1 s spent waiting for the first, at 2 s, also overlaps the fifth, of 5 s, which is awaited at 4 s of work.
    fifth = collective(0.0, 4.0, (1, 6), 5.0)
    assert exposed([*work[:1], fifth], "nv") == pytest.approx([1.0, 0.0])


def _fitting(monkeypatch, fits, memory=95 * 2**30):
    tried = []

    def made(config, topology, scenario=None, programs=None):
        tried.append(config.model.remat)
        if config.model.remat not in fits:
            raise DoesNotFitError("does not fit: the program", 0)
        return config.model.remat

    chip = dataclasses.replace(CHIPS["v5p"], memory=memory)
    monkeypatch.setattr(make_plan, "make_mesh", lambda *_: types.SimpleNamespace(shape=MESH))
    monkeypatch.setattr(make_plan, "make_plan", made)
    config = mixtral_8x7b.get_config()
    config.model.moe.dispatch = "dropless"
    config.train.batch_size = 192
    topology = types.SimpleNamespace(devices=(), capacity=chip.device_memory, platform="tpu")
    found = make_plan.make_fitting_plan(from_config_dict(config), topology)
    return found, tried


def test_fit_takes_the_least_recomputation_that_fits(monkeypatch):
    assert _fitting(monkeypatch, {"hidden", "full"}) == ("hidden", ["hidden"])
    assert _fitting(monkeypatch, {"attention", "full"}) == ("attention", ["hidden", "outputs", "attention"])
    # 40 GiB are less than the hidden activations alone: that policy is not compiled.
    assert _fitting(monkeypatch, {"full"}, 40 * 2**30) == ("full", ["outputs", "attention", "offload", "full"])
    with pytest.raises(ConfigError, match="does not fit"):
        _fitting(monkeypatch, set())


def test_kept_activations_by_hand():
    config = mixtral_8x7b.get_config()
    config.model.moe.dispatch = "dropless"
    config = from_config_dict(config)

    def kept(policy, mesh=MESH):
        tried = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=policy))
        return fit.estimate(tried, mesh, "tpu").kept

    # One row of 4096 tokens a chip, bfloat16, 32 layers: inputs of 4096; queries, heads of 4096, keys, values of 1024;
    # outputs of two experts; hidden activations of two experts, up and gate.
    row, attention = 4096 * 2, 4096 + (4096 + 2 * 1024) + 4096
    assert kept("full") == row * 32 * 4096
    assert kept("attention") == row * 32 * attention
    assert kept("offload") == kept("offload_inputs") == 0  # in the host's memory, or recomputed
    # Nothing reads the outputs of experts that are not split: weights are applied before the last matmul.
    assert kept("outputs") == kept("attention")
    assert kept("hidden") == row * 32 * (attention + 2 * 2 * 14336)
    split = {"data": 1, "fsdp": 8, "expert": 8, "tensor": 1}
    assert kept("outputs", split) == row * 32 * (attention + 2 * 4096)


@pytest.mark.parametrize(
    ("kind", "source", "purpose"),
    [
        # Gathers that XLA combined.
        ("all-gather", "state.parameters['unembedding']['kernel']", "weights"),
        (
            "all-gather",
            "(state.parameters['embedding']['table']:state.parameters['unembedding']['kernel'])",
            "weights",
        ),
        (
            "all-gather",
            "jit(train_step)/(jvp(weights.embedding.table)/a:jvp(weights.unembedding.kernel)/a)",
            "weights",
        ),
        ("all-gather", "(jit(train_step)/jvp()/transpose:jit(train_step)/jvp()/stack)", "transpose"),
        ("all-to-all", "jit(train_step)/moe/shard_map/jvp(expert_load)/all_to_all", "loads of experts"),
        ("all-to-all", "jit(train_step)/moe/shard_map/expert_load/all_to_all", "loads of experts"),
        ("all-gather", "jit(train_step)/moe/shard_map/tokens_to_experts/all_gather", "tokens to experts, back"),
        ("reduce-scatter", "transpose(jvp(tokens_to_experts))/reduce_scatter", "tokens to experts, back"),
        ("all-to-all", "jit(train_step)/moe/shard_map/jvp()/ragged_all_to_all", "tokens to experts, back"),
    ],
)
def test_purposes_of_exchanges(kind, source, purpose):
    assert exchanges.purpose(Collective(kind, ("expert",), (0, 1), 8, 1, -1.0, source)) == purpose


def test_purposes_of_sums_over_tokens_and_of_stages():
    def purpose(kind, axes, source):
        return exchanges.purpose(Collective(kind, axes, (0, 1), 8, 1, -1.0, source))

    assert purpose("all-reduce", ("data",), "jit(train_step)/jvp(loss)/reduce_sum") == "loss"
    source = "jit(train_step)/jvp()/while/body/ppermute"
    assert purpose("collective-permute", ("pipeline",), source) == "microbatches to next stage"
    assert purpose("collective-permute", ("context",), source) == "ppermute"


def test_a_device_with_more_rows_takes_longer_for_its_exchange_by_hand():
    """Three times the mean rows: 2 s become 6 s, all further 4 s of which are exposed."""
    routed = exchanges.Exchange("ragged-all-to-all", ("expert",), exchanges.ROUTED, 1, 1, 8, 2.0, 0.5)
    found = exchanges.skewed(routed, 3.0)
    assert (found.seconds, found.exposed_seconds) == (6.0, 4.5)
    weights = dataclasses.replace(routed, purpose=exchanges.WEIGHTS)
    assert exchanges.skewed(weights, 3.0) == weights


def test_rows_of_an_exchange_by_host_by_hand():
    """Four devices of the expert axis on two hosts, with a tensor axis of two: members of a group between hosts are two
    positions of the expert axis apart, those within a host one."""
    assert hosts.balanced_visits(2, 8) == pytest.approx(2 * (1 - 1 / 2**8))
    # DeepSeek-V3 keeps 4 of 8 groups. Each group is on one host of 8, or on two of 16; of 4 hosts with two groups each,
    # all but a share of C(6,4)/C(8,4) have a kept one.
    assert hosts.balanced_visits(8, 8, 8, 4) == pytest.approx(4 * (1 - (3 / 4) ** 8))
    assert hosts.balanced_visits(16, 8, 8, 4) == pytest.approx(8 * (1 - (7 / 8) ** 8))
    visited = 4 * (1 - 15 / 70)
    assert hosts.balanced_visits(4, 8, 8, 4) == pytest.approx(visited * (1 - (1 - 1 / visited) ** 8))
    moe = from_config_dict(mixtral_8x7b.get_config()).model.moe.with_dispatch("dropless")
    moe = dataclasses.replace(moe, exchange_hosts=2)
    between, within, other = (
        Collective(kind, ("expert",), group, 1000, 1, -1, "")
        for kind, group in (
            ("ragged-all-to-all", (0, 4)), ("ragged-all-to-all", (0, 2)), ("all-gather", (0, 2, 4, 6)),
        )
    )  # fmt: skip
    found = exchanges.balanced((between, within, other), moe, {"fsdp": 1, "expert": 4, "tensor": 2})
    assert [each.bytes for each in found] == [750, 800, 1000]  # two hosts of a token's two experts: 2·(1 − 1/4) of 2


def test_latent_experts_by_hand():
    """Experts of Mixtral-8x7B in a latent space of 1024: they read and return a quarter of D."""
    fields = mixtral_8x7b.get_config()
    fields.model.moe.latent_dim = 1024
    config = from_config_dict(fields)

    def tried(dispatch, remat="full"):
        moe = dataclasses.replace(config.model.moe, dispatch=dispatch)
        model = dataclasses.replace(config.model, remat=remat, moe=moe)
        return dataclasses.replace(config, model=model, mesh=ONE_DEVICE)

    # One row of 4096 tokens: two experts' outputs of 1024 numbers each in every one of 32 layers, bfloat16.
    split = {"data": 1, "fsdp": 8, "expert": 8, "tensor": 1}
    kept = [fit.estimate(tried("dropless", remat), split, "gpu").kept for remat in ("attention", "outputs")]
    assert kept[1] - kept[0] == 4096 * 2 * 32 * 2 * 1024

    def seconds(dispatch):
        return candidates.guess_seconds(tried(dispatch), CHIPS["v5p"])

    # On one chip at 0.8 of its peak: a capacity factor of 1.25 adds half an expert (3 matrices of 1024 x 14336) to each
    # of 64 x 4096 tokens, 6 FLOPs a parameter and a third more for recomputation; one-hot matmuls in and out have
    # 2.5 x 4096 rows of 1024 a token, 12 FLOPs a number.
    tokens, peak = 64 * 4096, 0.8 * CHIPS["v5p"].peak
    slots = 32 * 6 * 0.5 * 3 * 1024 * 14336 * tokens * 4 / 3 / peak
    assert seconds("gather") - seconds("dropless") == pytest.approx(slots, rel=1e-6)
    one_hot = 32 * 12 * 2.5 * 4096 * 1024 * tokens * 4 / 3 / peak
    assert seconds("einsum") - seconds("gather") == pytest.approx(one_hot, rel=1e-6)


def test_a_guess_counts_the_bubble_of_a_pipeline():
    """Four stages of 8 microbatches in 2 rounds: 3 of 8·2 + 3 turns are idle, on four devices for one."""
    config = from_config_dict({"model": {"num_layers": 8}, "train": {"accumulation_steps": 8}})
    train = dataclasses.replace(config.train, pipeline_rounds=2)
    one, four = (
        candidates.guess_seconds(dataclasses.replace(config, mesh=mesh, train=train), CHIPS["v5p"])
        for mesh in (ONE_DEVICE, dataclasses.replace(ONE_DEVICE, pipeline=4))
    )
    assert four == pytest.approx(one / 4 * 19 / 16)


def test_a_program_is_tried_if_its_estimate_is_a_tenth_above_the_memory():
    config = from_config_dict({"train": {"batch_size": 512}})
    (first, *_), _ = candidates.candidates(config, 1, CHIPS["v5p"])
    needed = first.fixed + first.activations
    for factor, tried in ((1.1, True), (1.3, False)):
        chip = dataclasses.replace(CHIPS["v5p"], memory=int(needed / factor))
        found, _ = candidates.candidates(config, 1, chip)
        assert (first.config in [each.config for each in found]) == tried


def test_a_guess_counts_the_rows_of_slots_and_of_expert_choice_once():
    """Their capacity is what they compute: the model's FLOPs have it already, without buffers for more."""
    layers = {"expert_choice": {"capacity": {"train": 2.0}}, "soft_moe": {"dispatch": "einsum"}}
    for gate, own in layers.items():
        moe = {"gate": gate, "accept_future_leak": True, **own}
        config = from_config_dict({"model": {"moe": moe, "remat": "none"}, "mesh": {"data": 1}})
        config = dataclasses.replace(config, mesh=ONE_DEVICE)
        chip = CHIPS["v5p"]
        expected = flops.train_flops(config) / (candidates._MATMUL_SHARE * chip.device_peak)
        assert candidates.guess_seconds(config, chip) == pytest.approx(expected, rel=1e-6)
        found, _ = candidates.candidates(config, 4, chip)
        assert found


def test_spread_of_published_steps_by_hand():
    # Squares of 0.1, 0.2 and -0.4 and three times the assumed 0.26 squared, over 6 degrees of freedom; Student's t
    # at 0.9 is 1.44.
    width = calibration.spread([0.1, 0.2, -0.4])
    assert width == pytest.approx(1.44 * math.sqrt((0.01 + 0.04 + 0.16 + 3 * 0.26**2) / 6))
    assert calibration.spread([]) == pytest.approx(1.638 * 0.26)


def _published(topology="v5p:2x2x1", published=2.0, **fields):
    row = {"platform": "tpu", "topology": topology, "counted": 2.0, "floor": 1.0, "low": 1.8, "high": 2.2}
    row |= {"published": published, "residual": math.log(published / 2), "memory_gib": 50.0, "versions": ["jax 1"]}
    return row | {"name": topology, "prices": calibration.prices()} | fields


def test_the_width_of_an_interval_by_hand():
    known = [_published(published=2.2), _published(published=1.9)]
    spread = calibration.spread([row["residual"] for row in known])
    kernels = math.log(2.2 / 1.8) / 2
    # The spread has errors of such kernels in it; only further ones are added. Two steps of v5p were compared.
    of_chip = math.hypot(spread, 0.25 / 9)
    assert calibration.width("v5p", kernels / 2, known) == calibration.width("v5p", kernels, known)
    assert calibration.width("v5p", kernels, known) == pytest.approx(of_chip)
    assert calibration.width("v5p", 2 * kernels, known) == pytest.approx(math.sqrt(of_chip**2 + 3 * kernels**2))
    assert calibration.width("v5p", kernels, known, pipeline=True) == pytest.approx(math.hypot(of_chip, 0.2))
    # No step of v6e was compared; of v4 no kernel was timed either.
    assert calibration.width("v6e", kernels, known) == pytest.approx(math.hypot(spread, 0.25))
    assert calibration.width("v4", kernels, known) == pytest.approx(math.hypot(spread, 0.45))
    # 10 s, of which kernels take 4, between 2 and 7: 8 to 13 s.
    assert calibration.kernel_width(10.0, 4.0, 2.0, 7.0) == pytest.approx(math.log(13 / 8) / 2)


@pytest.mark.parametrize("floor", [0.0, 1.0, 9.0, 9.999, 10.0])
@pytest.mark.parametrize("width", [0.01, 0.2, 3.0])
def test_no_interval_is_below_its_floor(floor, width):
    low, high = calibration.interval(10.0, floor, width)
    assert floor <= low <= 10.0 <= high == 10 * math.exp(width)


def test_the_lower_end_of_an_interval_by_hand():
    # Of 10 s, 4 are beyond the floor: exp(-0.2 x 10 / 4) of them remain.
    assert calibration.interval(10.0, 6.0, 0.2)[0] == pytest.approx(6 + 4 * math.exp(-0.5))
    assert calibration.interval(10.0, 0.0, 0.2)[0] == pytest.approx(10 * math.exp(-0.2))


def test_left_out_steps_are_predicted_from_the_others():
    rows = [_published(published=seconds) for seconds in (2.0, 2.2, 2.4, 9.0)]
    made = calibration.left_out(rows)
    assert [row["inside"] for row in made] == [True, True, True, False]
    width = math.hypot(calibration.spread([row["residual"] for row in rows[:3]]), 0.25 / 16)
    assert made[3]["interval"] == calibration.interval(2.0, 1.0, width)


def test_the_page_of_published_steps_names_those_whose_program_was_not_kept():
    rows = [_published(name="new", counts={"memory": 1.0}), _published(name="old", counts={"memory": 0.0})]
    page = calibration.page(rows, {"new": -0.25}, [], [])
    assert "of the compiled program at earlier prices: old." in page
    assert "Inside: 2 of 2." in page
    assert "earlier prices" not in calibration.page(rows[:1], {}, [], [])


def test_the_hash_of_prices_is_that_of_statements(tmp_path):
    path, found = tmp_path / "prices.py", set()
    for text in (
        '"""Prices."""\n\nPRICE = 1.0  # as measured\n\n\ndef price(x):\n    return {"price": x * PRICE}\n',
        "PRICE = 1.0\ndef price(x):\n    '''Of x.'''\n    return {\n        \"price\": x * PRICE}\n",
    ):
        path.write_text(text)
        found.add(calibration._statements(path))
    assert found == {'PRICE = 1.0 def price ( x ) : return { "price" : x * PRICE }'}
