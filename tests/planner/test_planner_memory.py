"""The estimate of memory, and errors about memory."""

import dataclasses
import importlib
import math
import pickle
import re
import types
from pathlib import Path

import jax
import pytest

from moe.config import ConfigError, MeshConfig, to_dict
from moe.config.parse import from_config_dict
from moe.configs import deepseek_v2, mixtral_8x7b, qwen3_next_80b_a3b, switch_t5
from moe.dispatch.buffers import layer_capacity
from moe.models import flops
from moe.planner import compiled, fit, make_plan, memory_errors, other_programs
from moe.planner.chips import CHIPS, GiB
from moe.planner.gpus import GPUS
from moe.planner.topology import Topology
from tests.planner.test_planner_search import tiny_config

MESH = {"data": 1, "fsdp": 8, "expert": 8, "tensor": 1}

# Messages of libtpu: the first of version 0.0.50.1; the second of an older version
# (github.com/erfanzar/EasyDeL/issues/166); the third for work on the SparseCore (openxla.org/xla/errors/error_1000).
OUT_OF_MEMORY = [
    (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (24.15G) exceeds available HBM (15.75G). HLO module: jit_train_step.",
        "at its peak: 24.15 GiB a device of 15.75, 8.40 GiB too much",
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
def test_memory_errors_name_the_excess_and_the_settings_that_help(message, words):
    config = from_config_dict({"model": {"remat": "dots", "moe": {"dispatch": "einsum"}}})
    told = memory_errors.explained(config, jax.errors.JaxRuntimeError(message))
    assert isinstance(told, ConfigError)
    assert words in str(told)
    assert "model.remat=full (now dots)" in str(told)
    assert "dispatch=gather" in str(told)
    needed = re.search(r"([\d.]+) GiB a device", words)
    assert told.least == pytest.approx(float(needed[1]) * GiB if needed else 0)


def test_memory_errors_do_not_advise_another_dispatch_to_soft_moe():
    moe = {"gate": "soft_moe", "dispatch": "einsum", "accept_future_leak": True}
    config = from_config_dict({"model": {"moe": moe}})
    told = memory_errors.explained(config, jax.errors.JaxRuntimeError(OUT_OF_MEMORY[-1][0]))
    assert "model.remat=full" in str(told)
    assert "dispatch" not in str(told)


def test_slices_without_a_ragged_all_to_all_are_refused_in_a_sentence():
    """The message for 16 x 16 v5e chips, whose ICI routing reaches only neighbours."""
    config = from_config_dict({"mesh": {"expert": 8}})
    message = "INTERNAL: RET_CHECK failure Ragged all-to-all is currently not supported in limited ICI routing settings"
    told = memory_errors.explained(config, jax.errors.JaxRuntimeError(message))
    assert isinstance(told, ConfigError)
    assert str(told).startswith("mesh.expert=8 with model.moe.dispatch=dropless: libtpu has no ragged all-to-all")


def test_other_compiler_errors_are_unchanged():
    config = from_config_dict({})
    for message in (
        "INTERNAL: Mosaic failed",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack for %fusion",
    ):
        error = jax.errors.JaxRuntimeError(message)
        assert memory_errors.explained(config, error) is error


@pytest.mark.parametrize("tensor", [1, 4])
def test_kept_projections_of_latent_attention_by_hand(tensor):
    """128 heads with queries of 192 and keys and values of 128 are split; latents of 1536, 512 and 64 are not."""
    sizes = {"data": 1, "fsdp": 4, "expert": 8, "tensor": tensor}
    config = from_config_dict(deepseek_v2.get_config())
    models = [dataclasses.replace(config.model, remat=remat) for remat in ("dots", "full")]
    bytes_kept = [fit.estimate(dataclasses.replace(config, model=model), sizes, "gpu").kept for model in models]
    tokens = config.train.batch_size * config.data.sequence_length // 32
    attention = 60 * (128 * (192 + 128 + 128) / tensor + 1536 + 512 + 64 + 5120)  # 5120: the output projection
    dense = 2 * 12288 / tensor  # of the first layer
    assert bytes_kept[0] - bytes_kept[1] == tokens * 2 * (attention + dense)


def test_layers_outside_the_pipeline_stages_by_hand():
    """Four stages hold 32 of 34 layers. A device gathers its shard of the two others over the other axes, and has
    its gradients: queries and outputs [4096,4096], keys and values [4096,1024] and 8 experts, split over 64 devices,
    and the router and two norms whole."""
    config = from_config_dict(mixtral_8x7b.get_config())
    train = dataclasses.replace(config.train, accumulation_steps=4)
    config = dataclasses.replace(config, train=train, model=dataclasses.replace(config.model, num_layers=34))
    made = fit.estimate(config, {"pipeline": 4, **MESH}, "gpu")
    matrices = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 8 * 3 * 4096 * 14336
    assert made.gradients - made.parameters == 2 * 2 * 4 * (matrices / 64 + 4096 * 8 + 2 * 4096)


def test_a_pipeline_stage_keeps_its_layers_of_all_microbatches():
    """A row of 4096 tokens a device in each of 8 microbatches: 8 of 8 of the 32 layers, the inputs of 64 in all."""
    config = from_config_dict(mixtral_8x7b.get_config())
    train = dataclasses.replace(config.train, batch_size=8 * 64, accumulation_steps=8)
    made = fit.estimate(dataclasses.replace(config, train=train), {"pipeline": 4, **MESH}, "gpu")
    assert made.kept == 8 * 8 * 4096 * 2 * 4096


def test_rows_that_an_exchange_receives_by_hand():
    """Three arrays [rows,D] in bfloat16 for a row of 4096 tokens: by hosts, rows from both hosts and to both, since a
    token has two experts; by gathers, rows of all 8 devices and their sums."""
    config = from_config_dict(mixtral_8x7b.get_config())

    def layer(**exchange):
        moe = dataclasses.replace(config.model.moe.with_dispatch("dropless"), **exchange)
        tried = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
        return fit.estimate(tried, MESH, "gpu").layer

    row = 3 * 4096 * 2 * 4096
    assert layer(exchange_hosts=2) - layer() == row * (2 + 2)
    assert layer(exchange="all_gather") - layer() == row * 2 * 8


def test_cross_attention_is_kept_beside_self_attention():
    """16 rows of 128 and 32 tokens in two layers each, float32: inputs of 64; queries, keys, values and heads of 64,
    twice in the decoder."""
    config = from_config_dict(switch_t5.get_config())
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="attention"))
    kept = fit.estimate(config, dict.fromkeys(MESH, 1), "gpu").kept
    assert kept == 16 * 2 * 4 * (128 * (64 + 4 * 64) + 32 * (64 + 2 * 4 * 64))


def test_the_guide_has_what_policies_keep_of_a_row():
    """4096 tokens in 32 layers of bfloat16, 2^-30 of D numbers a token is a GiB: the input; queries, heads and half of
    that for keys and values; outputs of 2 experts; up and gate of 3.5 D each of 2 experts, or of 5/4 as many rows."""
    guide = " ".join((Path(__file__).parents[2] / "docs" / "pods_reference.md").read_text().split())
    config = from_config_dict(mixtral_8x7b.get_config())

    def kept(remat, expert):
        moe = config.model.moe.with_dispatch("dropless")
        model = dataclasses.replace(config.model, remat=remat, moe=moe)
        train = dataclasses.replace(config.train, batch_size=8)
        sizes = dict.fromkeys(MESH, 1) | {"fsdp": 8 // expert, "expert": expert}
        made = fit.estimate(dataclasses.replace(config, model=model, train=train), sizes, "gpu")
        return made.kept / 2**30

    split = [kept(remat, 8) for remat in ("full", "attention", "outputs", "hidden")]
    assert split == [1, 1 + 2.5, 3.5 + 2, 5.5 + 2 * 2 * 3.5 * 5 / 4]
    full, attention, outputs, hidden = (f"{number:g}" for number in split)
    assert f"{full} GiB with `full`, {attention} with `attention`, {outputs} with `outputs` and {hidden} with" in guide
    assert (kept("outputs", 1), kept("hidden", 1)) == (3.5, 3.5 + 2 * 2 * 3.5)
    assert f"`hidden` keeps {kept('hidden', 1):g} GiB" in guide


def test_what_needs_no_memory_of_a_device():
    """An optimizer's state in the host's memory; copies of weights, where they are whole and computed as stored."""
    config = from_config_dict(mixtral_8x7b.get_config())
    optimizer = dataclasses.replace(config.optimizer, memory="host")
    model = dataclasses.replace(config.model, dtype="float32")
    made = fit.estimate(dataclasses.replace(config, optimizer=optimizer, model=model), dict.fromkeys(MESH, 1), "gpu")
    assert (made.optimizer, made.weights) == (0, 0)


def test_kept_projections_of_a_delta_net_by_hand():
    """36 gated DeltaNet layers with 16 heads of 128 for queries and keys, 32 for values and gates; 12 attention layers
    with 16 heads of 256 for queries and gates and 2 for keys and values; all split over two devices."""
    sizes = {"data": 1, "fsdp": 4, "expert": 8, "tensor": 2}
    config = from_config_dict(qwen3_next_80b_a3b.get_config())
    kept = {
        remat: fit.estimate(
            dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat)), sizes, "gpu"
        ).kept
        for remat in ("dots", "full", "attention")
    }
    tokens = config.train.batch_size * config.data.sequence_length // 32
    projections = 36 * (2 * 16 + 2 * 32) * 128 / 2 + 12 * (2 * 16 + 2 * 2) * 256 / 2
    assert kept["dots"] - kept["full"] == tokens * 2 * (projections + 48 * 2048)  # the last term: output projections
    inner = 36 * 2048  # inputs of three of the four layers of a repeat
    heads = (36 * 32 * 128 + 12 * 16 * 256) / 2
    assert kept["attention"] - kept["full"] == tokens * 2 * (projections + heads + inner)


def test_estimate_by_hand():
    """One row of 4096 tokens per device; a layer's expert arrays have 10,240 rows (1.25 x 2 experts per token)."""
    config = from_config_dict(mixtral_8x7b.get_config())
    found = fit.estimate(config, MESH, "gpu")
    experts, router, norms = 32 * 8 * 3 * 4096 * 14336, 32 * 4096 * 8, 65 * 4096
    others = 46_702_792_704 - experts - router - norms
    # experts are split over fsdp and expert, and so is D of every other matrix; routers and norms are replicated
    assert found.parameters == 4 * ((experts + others) // 64 + router + norms)
    assert found.optimizer == pytest.approx(2 * found.parameters, rel=1e-6)  # and two counters
    assert found.gradients == found.parameters
    # bfloat16: all weights as they are stored, and those of one layer, with one expert, gathered
    gathered = 3 * 4096 * 14336 + 4096 * 128 * (2 * 32 + 2 * 8)
    assert found.weights == pytest.approx(found.parameters / 2 + 2 * gathered, rel=0.01)
    assert found.kept == 4096 * 2 * 32 * 4096
    attention = (32 + 2 * 8 + 32) * 128
    assert found.layer == 4096 * 2 * (6 * 2.5 * 14336 + 3 * 2.5 * 4096 + 2 * (attention + 4096))
    on_tpu = fit.estimate(config, MESH, "tpu")
    assert on_tpu.layer == 4096 * 2 * (9 * 2.5 * 14336 + 20 * 2.5 * 4096 + 2 * (attention + 4096))
    assert on_tpu.weights == pytest.approx(found.parameters + 3 * 2 * gathered, rel=0.01)
    twice = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=128, accumulation_steps=2))
    assert fit.estimate(twice, MESH, "gpu").gradients == 2 * found.gradients
    assert fit.estimate(twice, MESH, "gpu").activations == found.activations
    in_pairs = dataclasses.replace(config, model=dataclasses.replace(config.model, scan_unroll=2))
    assert fit.estimate(in_pairs, MESH, "gpu").weights == pytest.approx(found.weights + 2 * gathered, rel=0.01)
    keeps_all = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
    assert fit.estimate(keeps_all, MESH, "gpu").weights == pytest.approx(found.weights + 32 * 2 * gathered, rel=0.01)


def test_memory_of_a_run_of_adapters_by_hand():
    """A [4096,2] and B [2,n] for q, k, v and out, with n of 4096, 1024, 1024 and 4096, in 32 layers; the matrices that
    they adapt are copied once, and the copy has a gradient."""
    lora = {"rank": 2, "parts": ("attention",)}
    tree = to_dict(from_config_dict(mixtral_8x7b.get_config())) | {"start": {"checkpoint": "/base"}}
    config = from_config_dict(tree | {"lora": lora})
    sizes = dict.fromkeys(MESH, 1)
    whole, found = fit.estimate(from_config_dict(tree), sizes, "gpu"), fit.estimate(config, sizes, "gpu")
    adapters = 32 * 2 * (4 * 4096 + 2 * 4096 + 2 * 1024)
    matrices = 32 * 4096 * 2 * (4096 + 1024)
    assert found.parameters == whole.parameters
    assert found.optimizer == pytest.approx(4 * 2 * adapters, rel=1e-4)  # and counters
    assert found.gradients == 4 * (2 * matrices + adapters)


def test_rows_split_over_devices_by_hand():
    """Each of four devices has 1024 of a row's 4096 tokens: 32 layer inputs of 4096 bfloat16 numbers and two
    assignments per token."""
    config = from_config_dict(mixtral_8x7b.get_config())
    moe = dataclasses.replace(config.model.moe.with_dispatch("dropless"), group_size=1024)
    train = dataclasses.replace(config.train, batch_size=64)
    config = dataclasses.replace(config, train=train, model=dataclasses.replace(config.model, moe=moe))
    whole, split = (fit.estimate(config, MESH | context, "gpu") for context in ({}, {"context": 4}))
    assert split.kept == 1024 * 2 * 32 * 4096
    assert split.activations == whole.activations // 4
    assert split.fixed == whole.fixed
    rows = [make_plan._assignments(config, types.SimpleNamespace(shape=MESH | axis)) for axis in ({}, {"context": 4})]
    assert rows == [4096 * 2, 1024 * 2]


def test_rows_of_an_encoder_by_hand():
    """64 rows on 4 devices: 16 · 512 tokens of the encoder and 16 · 128 of the decoder, with one expert each."""
    config = from_config_dict(switch_t5.get_config())
    data = dataclasses.replace(config.data, input_length=512, sequence_length=128)
    train = dataclasses.replace(config.train, batch_size=64)
    config = dataclasses.replace(config, data=data, train=train)
    mesh = types.SimpleNamespace(shape={"data": 2, "fsdp": 1, "expert": 2})
    names = "jit(step)/transpose(jvp(encoder))/moe/dot", "jit(step)/jvp()/moe/dot"
    assert [make_plan._assignments(config, mesh, name) for name in names] == [16 * 512, 16 * 128]


# Configs, meshes (data, fsdp, expert, tensor), rows per device, policies, and GiB of the compiled programs
# (docs/log/2026-11.md).
COMPILED = [
    ("mixtral_8x7b", "tpu", (1, 64, 1, 1), 16, "full", 80.3),
    ("mixtral_8x7b", "tpu", (1, 64, 1, 1), 24, "full", 108.2),
    ("mixtral_8x7b", "tpu", (1, 4, 8, 2), 1, "none", 72.6),
    ("mixtral_8x7b", "tpu", (1, 4, 8, 2), 24, "full", 110.6),
    ("mixtral_8x7b", "tpu", (1, 8, 8, 1), 16, "full", 96.7),
    ("mixtral_8x7b", "tpu", (4, 2, 8, 1), 2, "outputs", 82.2),
    ("qwen3_30b_a3b", "tpu", (1, 64, 1, 1), 7, "hidden", 83.0),
    ("qwen3_30b_a3b", "tpu", (1, 64, 1, 1), 12, "outputs", 79.0),
    ("deepseek_v2_lite", "tpu", (1, 64, 1, 1), 10, "outputs", 56.3),
    ("mixtral_8x7b", "gpu", (1, 8, 8, 1), 2, "hidden", 62.4),
    ("mixtral_8x7b", "gpu", (1, 8, 8, 1), 7, "outputs", 63.7),
    ("mixtral_8x7b", "gpu", (1, 8, 8, 1), 9, "outputs", 71.1),  # hidden activations in row blocks
    ("mixtral_8x7b", "gpu", (1, 8, 8, 1), 11, "attention", 62.2),  # and combine weights applied in them
    ("gpt_oss_20b", "gpu", (1, 8, 8, 1), 12, "attention", 51.8),
    ("deepseek_v2_lite", "gpu", (1, 8, 8, 1), 10, "outputs", 64.9),
]


@pytest.mark.parametrize(("name", "platform", "mesh", "rows", "remat", "needed"), COMPILED)
def test_estimates_are_within_a_tenth_of_the_memory_of_compiled_programs(name, platform, mesh, rows, remat, needed):
    sizes = dict(zip(("data", "fsdp", "expert", "tensor"), mesh, strict=True))
    fields = importlib.import_module(f"configs.{name}").get_config()
    fields.model.moe.dispatch, fields.model.remat = "dropless", remat
    fields.train.batch_size = rows * math.prod(mesh[:3])
    assert fit.estimate(from_config_dict(fields), sizes, platform).total == pytest.approx(needed * GiB, rel=0.1)


@pytest.mark.parametrize(
    ("dispatch", "expert", "rows"),
    [
        ("gather", 8, 2.5),  # capacity factor 1.25 · K 2
        ("dropless", 1, 2.0),  # K 2, sorted on their device
        ("dropless", 8, 2.5),  # a buffer of 5/4 of a device's own rows
    ],
)
def test_rows_of_expert_buffers(dispatch, expert, rows):
    config = mixtral_8x7b.get_config()
    config.model.moe.dispatch = dispatch
    assert fit._expert_rows(from_config_dict(config), {**MESH, "expert": expert}) == rows


@pytest.mark.parametrize("moe", [{"gate": "moe_plus_plus"}, {"gate": "switch", "capacity": {"fixed": 4}}])
def test_rows_of_buffers_are_those_of_the_layer(moe):
    """MoE++'s capacity excludes the share of its experts without an FFN; a fixed capacity ignores the factor."""
    config = from_config_dict({"model": {"moe": moe}})
    own, size = config.model.moe, config.data.sequence_length
    capacity = 4 if own.capacity.fixed else layer_capacity(own, size)
    assert fit._expert_rows(config, {**MESH, "expert": 1}) == own.num_experts * capacity / size
    assert own.num_experts * capacity / size < own.capacity.train * own.experts_per_token


def test_a_memory_error_survives_pickling():
    error = pickle.loads(pickle.dumps(memory_errors.DoesNotFitError("does not fit: by 3 GiB", 7.0)))
    assert (str(error), error.least) == ("does not fit: by 3 GiB", 7.0)


def test_a_plan_states_the_share_of_a_gpu_that_it_needs_and_a_total_above_a_tpu():
    def notes(platform, total):
        return compiled.Memory(total * GiB, 0, 0, 0, 0, 0, 100 * GiB).notes(platform)

    assert notes("gpu", 75) == notes("tpu", 99) == []
    assert notes("gpu", 80)[0].startswith("needs XLA_PYTHON_CLIENT_MEM_FRACTION=0.81: ")
    assert "little is left for CUDA" in notes("gpu", 97)[0]
    assert "which refuses what does not fit, accepts it" in notes("tpu", 101)[0]


def test_the_compiler_for_tpus_decides_what_fits(monkeypatch):
    """libtpu accepted programs of others whose parts add up to more than a chip has."""
    statistics = types.SimpleNamespace(
        argument_size_in_bytes=2, temp_size_in_bytes=200 * GiB, output_size_in_bytes=0, alias_size_in_bytes=0,
        generated_code_size_in_bytes=0,
    )  # fmt: skip
    program = types.SimpleNamespace(memory_analysis=lambda: statistics, as_text=lambda: "")
    traced = types.SimpleNamespace(jaxpr=jax.make_jaxpr(lambda x: x)(1.0))
    stored = {"parameters": 1, "optimizer": 1}
    monkeypatch.setattr(compiled, "_compile", lambda *_: (program, traced, stored, 1.0))
    config = from_config_dict({"mesh": {"data": 1, "fsdp": 1, "expert": 1}})
    devices = tuple(jax.devices()[:1])
    step = compiled.compile_step(config, Topology("v5p:1x1x1", 1, CHIPS["v5p"], devices))
    assert step.memory.total > step.memory.capacity
    with pytest.raises(memory_errors.DoesNotFitError, match="does not fit: the program: 200"):
        compiled.compile_step(config, Topology("h100:1x1", 1, GPUS["h100"], devices))


@pytest.mark.slow
def test_memory_of_all_programs_of_a_run():
    """The optimizer lies beside an evaluation; one that does not fit is named."""
    config = dataclasses.replace(tiny_config(), mesh=MeshConfig(1, 1, 1))
    where = Topology("h100:1x1", 1, GPUS["h100"], tuple(jax.devices()[:1]))
    found = other_programs.memory(config, where)
    parameters = 4 * flops.count_parameters(config.model)[0]
    assert found[other_programs.RESTORING] == pytest.approx(3 * parameters, rel=0.01)  # with two moments
    assert found[other_programs.INITIALISATION] >= found[other_programs.RESTORING]
    assert found[other_programs.EVALUATION] > 3 * parameters
    ordered = other_programs.words(found, 2**40)
    assert ordered.startswith("Memory by program: train step 1024.00 GiB, ")
    assert ordered.endswith("; train step needs the most")
    small = dataclasses.replace(where, chip=dataclasses.replace(where.chip, memory=parameters))
    with pytest.raises(memory_errors.DoesNotFitError, match="does not fit: evaluation takes"):
        other_programs.memory(config, small)
