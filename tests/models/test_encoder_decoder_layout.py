"""Encoder-decoders: layer numbering, counts and FLOPs by hand, embeddings, refusals."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import Config, ConfigError, DataConfig, TrainConfig, layer_kinds, validate_mesh
from moe.models.encoder_decoder import ENCODER_SCOPE, EncoderDecoder
from moe.models.factory import create_model
from moe.models.flops import count_parameters, train_flops_per_token
from moe.models.segments import restack_layers, selection_biases, unstack_layers
from tests.helpers import random_parameters, tiny_encoder_decoder, tiny_model


def test_layers_are_numbered_through_both_stacks():
    config = tiny_encoder_decoder(every=1, layers=(1, 3, 4))
    assert [kind.sparse for kind in layer_kinds(config)] == [False, True, False, True, True]
    assert [kind.role for kind in layer_kinds(config)] == ["encoder"] * 3 + ["cross"] * 2
    _, parameters = random_parameters(config)
    flat = unstack_layers(config, parameters)
    assert {layer for layer, path in flat if path[:2] == ("moe", "experts")} == {1, 3, 4}
    assert {layer for layer, path in flat if path[0] == "cross"} == {3, 4}
    jax.tree.map(np.testing.assert_array_equal, restack_layers(config, parameters, flat), parameters)

    biased = tiny_encoder_decoder(every=1, layers=(1, 3, 4), gate="quantile_balancing", experts_per_token=2)
    biases = selection_biases(biased, jnp.arange(12.0).reshape(3, 4))
    encoder, decoder = biases["encoder"]["segment_1"], biases["decoder"]["segment_0"]
    np.testing.assert_array_equal(encoder["block_0"]["moe"]["router"]["bias"], [[0, 1, 2, 3]])
    np.testing.assert_array_equal(decoder["block_0"]["moe"]["router"]["bias"], [[4, 5, 6, 7], [8, 9, 10, 11]])


def test_counts_and_flops_by_hand():
    """D 16, F 28, V 48, N 4, M 2, H 6, 4 experts of F 20, ReLU. Attention 16·6·(4+2+2) + 4·6·16 = 1152, an FFN 896, an
    expert 640, a router 64, norms 16 each. Encoder: dense, MoE, dense; decoder: dense, MoE, each with cross-attention.
    """
    config = tiny_encoder_decoder()
    attention, dense, expert, router, norm = 1152, 896, 640, 64, 16
    encoder = 3 * (attention + 2 * norm) + 2 * dense + router + norm + 8 * 4
    decoder = 2 * (2 * attention + 3 * norm) + dense + router + norm + 8 * 4
    assert count_parameters(config) == (
        encoder + decoder + 48 * 16 + 8 * expert,
        encoder + decoder + 48 * 16 + 2 * expert,
    )
    # Per decoder token, with U/T = 2: the encoder and the cross-attention's keys and values (2·16·2·6 a layer) twice.
    moved = 2 * 2 * 16 * 2 * 6
    multiplied = 2 * (encoder + expert + moved) + decoder + expert - moved + 48 * 16
    keys = 3 * 8 * 2 + 2 * (4 + 1) / 2 + 2 * 8  # U² a layer over T; (T+1)/2; U
    assert train_flops_per_token(config, 4, 8) == pytest.approx(6 * multiplied + 12 * 4 * 6 * keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 4}, "model.sliding_window=4: must be 0 where model.encoder_layers is set"),
        ({"kv_lora_rank": 8}, "model.kv_lora_rank=8: must be 0 where model.encoder_layers is set"),
        ({"relative_buckets": 3}, "model.relative_buckets=3: must be 0 for rotary positions, or from 4"),
        ({"relative_max_distance": 4}, "model.relative_max_distance=4: must be above half of relative_buckets=8"),
        ({"dropout": 1.0}, r"model.dropout=1.0: must be in \[0, 1\)"),
        ({"encoder_layers": 0, "encoder_vocab_size": 8}, "model.encoder_vocab_size=8: needs model.encoder_layers"),
        ({"layers": (5,), "every": 1}, "must be increasing layer numbers from 0 to 4"),
        (
            {"expert_capacity": 3, "dispatch": "dropless"},
            "model.moe.capacity.fixed=3: needs a dispatch with a capacity",
        ),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        Config(model=tiny_encoder_decoder(**changes))


def test_an_encoder_with_a_separate_embedding():
    """It takes ids beyond the decoder's vocabulary, and only its rows add to the parameter count."""
    config = tiny_encoder_decoder(encoder_vocab_size=60, gate="none", encoder_layers=1, num_layers=1)
    graphdef, parameters = random_parameters(config)
    tables = parameters["embedding"]["table"], parameters["encoder"]["embedding"]["table"]
    assert [table.shape for table in tables] == [(48, 16), (60, 16)]
    shared = dataclasses.replace(config, encoder_vocab_size=0)
    assert count_parameters(config)[0] - count_parameters(shared)[0] == 60 * 16
    assert train_flops_per_token(config, 4, 8) == pytest.approx(train_flops_per_token(shared, 4, 8))
    run = jax.jit(lambda source: nnx.merge(graphdef, parameters)(np.full((1, 3), 7), encoder_tokens=source).logits)
    first, second = (run(np.full((1, 4), token)) for token in (50, 59))
    assert np.abs(first - second).max() > 0.01


def test_create_model_builds_the_architecture_of_its_config():
    assert isinstance(nnx.eval_shape(lambda: create_model(tiny_encoder_decoder(), rngs=nnx.Rngs(0))), EncoderDecoder)
    with pytest.raises(ConfigError, match=r"model\.encoder_layers=0: must be at least 1"):
        EncoderDecoder(tiny_model(), rngs=nnx.Rngs(0))


def test_a_program_names_the_encoders_operations():
    """Plans give its grouped matmuls the rows of the input."""
    graphdef, parameters = random_parameters(tiny_encoder_decoder(dispatch="dropless"))

    def run(parameters, source):
        return nnx.merge(graphdef, parameters)(np.full((1, 3), 7), encoder_tokens=source).logits.sum()

    program = jax.jit(jax.grad(run)).lower(parameters, np.full((1, 4), 7)).as_text(debug_info=True)
    products = [set(re.findall(r"\w+", name)) for name in re.findall(r'"(jit\(run\)/.*?dot_general)"', program)]
    # Of a layer's matmuls with the experts, and of those of attention.
    for part in ("moe", "attention"):
        assert {ENCODER_SCOPE in words for words in products if part in words} == {True, False}


def test_groups_of_both_stacks_are_spread_over_the_mesh():
    """8 rows of 8 and of 32 tokens in groups of 32: 2 groups of targets and 8 of inputs; 4 devices cannot split the
    2."""
    data, train = DataConfig(sequence_length=8, input_length=32, objective="pairs"), TrainConfig(batch_size=8)
    model = tiny_encoder_decoder(group_size=32)
    config = Config(model=model, data=data, train=train)
    validate_mesh(config, {"data": 2, "fsdp": 1, "expert": 1, "tensor": 1})
    with pytest.raises(ConfigError, match=r"number of groups=2: must be divisible by .* = 4"):
        validate_mesh(config, {"data": 4, "fsdp": 1, "expert": 1, "tensor": 1})
    config = dataclasses.replace(config, data=dataclasses.replace(data, sequence_length=32, input_length=8))
    with pytest.raises(ConfigError, match=r"number of groups=2: must be divisible by .* = 4"):
        validate_mesh(config, {"data": 4, "fsdp": 1, "expert": 1, "tensor": 1})
