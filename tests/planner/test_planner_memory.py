"""The lower bound of memory, and errors about memory."""

import dataclasses

import jax
import pytest

from configs import deepseek_v2, mixtral_8x7b, qwen3_next_80b_a3b
from moe.config import ConfigError
from moe.config.parse import from_config_dict
from moe.planner import fit, memory_errors

MESH = {"data": 1, "fsdp": 8, "expert": 8, "tensor": 1}

# Messages of libtpu: the first of version 0.0.50.1; the second of an older version
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
def test_memory_errors_name_the_excess_and_the_settings_that_help(message, words):
    config = from_config_dict({"model": {"remat": "dots", "moe": {"dispatch": "einsum"}}})
    told = memory_errors.explained(config, jax.errors.JaxRuntimeError(message))
    assert isinstance(told, ConfigError)
    assert words in str(told)
    assert "model.remat=full (now dots)" in str(told)
    assert "dispatch=gather" in str(told)


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
    """128 heads of queries of 192 and of keys and values of 128 each, split; latents of 1536, 512 and 64, whole."""
    sizes = {"data": 1, "fsdp": 4, "expert": 8, "tensor": tensor}
    config = from_config_dict(deepseek_v2.get_config())
    bytes_kept = [
        fit.lower_bound(dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat)), sizes)
        for remat in ("dots", "full")
    ]
    tokens = config.train.batch_size * config.data.sequence_length // 32
    attention = 60 * (128 * (192 + 128 + 128) / tensor + 1536 + 512 + 64)
    dense = 2 * 12288 / tensor  # of the first layer
    assert bytes_kept[0].activations - bytes_kept[1].activations == tokens * 2 * (attention + dense)


def test_kept_projections_of_a_delta_net_by_hand():
    """36 layers with 16 heads of queries and keys of 128, 32 of values and gates of 128; 12 of attention with 16 heads
    of queries and gates of 256, 2 of keys and values; all split over two devices."""
    sizes = {"data": 1, "fsdp": 4, "expert": 8, "tensor": 2}
    config = from_config_dict(qwen3_next_80b_a3b.get_config())
    kept = {
        remat: fit.lower_bound(
            dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat)), sizes
        ).activations
        for remat in ("dots", "full", "attention")
    }
    tokens = config.train.batch_size * config.data.sequence_length // 32
    projections = 36 * (2 * 16 + 2 * 32) * 128 / 2 + 12 * (2 * 16 + 2 * 2) * 256 / 2
    assert kept["dots"] - kept["full"] == tokens * 2 * projections
    assert kept["attention"] - kept["dots"] == tokens * 2 * (36 * 32 * 128 + 12 * 16 * 256) / 2


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
