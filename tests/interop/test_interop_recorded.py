"""Experts recorded by serving engines: their layouts read as choices, replayed, and compared with our router's."""

import base64
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import ConfigError
from moe.interop.recorded import EngineName, mismatch, read_choices, replay_effect
from moe.layers.call import Report
from moe.routing.routing import Choices, Routing
from tests.helpers import random_model, tiny_model

LENGTHS = (8, 5)  # of the inputs of two sequences: all their tokens but the last, which no engine records


@pytest.fixture(scope="module")
def recorded():
    """A model of a dense and two MoE layers, tokens, and the routing of their rows."""
    sizes = {"num_experts": 5, "experts_per_token": 2, "layers": (1, 2)}
    room = {"dispatch": "einsum", "eval_capacity_factor": 2.5}  # for every token
    model = random_model(tiny_model(num_layers=3, gate="mixtral", **sizes, **room))
    tokens = np.random.default_rng(0).integers(1, 48, (2, 8))
    tokens[1, LENGTHS[1] :] = 0

    @nnx.jit
    def run(model, tokens, choices):
        output = model(tokens, routing=choices, return_routing=True)
        return dataclasses.replace(output, report=Report())  # which nothing here reads

    return model, tokens, run(model, tokens, None), run


def _records(engine: str, index: np.ndarray) -> object:
    """The experts [L,B,T,K] of MoE layers 1 and 2 of three, in this engine's layout."""
    rows = [index[:, i, :length].swapaxes(0, 1) for i, length in enumerate(LENGTHS)]  # [T,L,K]
    everywhere = [np.concatenate([np.zeros_like(row[:, :1]), row], axis=1) for row in rows]  # a dense layer 0
    if engine == "vllm":
        return [row.astype(np.int16) for row in everywhere]
    if engine == "sglang":
        return [base64.b64encode(row.astype("<i4").tobytes()).decode() for row in everywhere]
    if engine == "tensorrt_llm":
        return rows
    padded = np.full((2, 3, 10, 2), -1)
    for i, row in enumerate(everywhere):
        padded[i, :, : len(row)] = row.swapaxes(0, 1)
    return padded


@pytest.mark.parametrize("engine", EngineName.__args__)
def test_every_layout_replays_exactly(engine, recorded):
    model, tokens, output, run = recorded
    index = np.asarray(output.routing.expert_index)
    choices = read_choices(engine, _records(engine, index), model.config, 8, tokens=LENGTHS)
    present = np.arange(8) < np.array(LENGTHS)[:, None]
    np.testing.assert_array_equal(choices.chosen, np.broadcast_to(present[None, :, :, None], index.shape))
    np.testing.assert_array_equal(np.where(choices.chosen, choices.expert_index, index), index)
    logits = run(model, tokens, choices).logits
    np.testing.assert_array_equal(
        np.where(present[..., None], logits, 0), np.where(present[..., None], output.logits, 0)
    )
    assert not mismatch(choices, output.routing).tokens.any()


def test_records_that_begin_at_the_completion_are_read_where_they_begin(recorded):
    """Prompts of 3 and 2 tokens, whose experts were not returned: record 0 is of positions 3 to 7, record 1 of 2 to 4.

    Without their beginnings they are refused: they would be read as the experts of positions 0 to 4 and 0 to 2.
    """
    model, _, output, _ = recorded
    index, starts = np.asarray(output.routing.expert_index), (3, 2)
    records = [record[start:] for record, start in zip(_records("vllm", index), starts, strict=True)]
    choices = read_choices("vllm", records, model.config, 8, tokens=LENGTHS, starts=starts)
    positions = np.arange(8)
    present = np.array([(positions >= 3), (positions >= 2) & (positions < 5)])
    np.testing.assert_array_equal(choices.chosen, np.broadcast_to(present[None, :, :, None], index.shape))
    np.testing.assert_array_equal(np.where(choices.chosen, choices.expert_index, index), index)
    for arguments in ({}, {"tokens": LENGTHS}, {"tokens": (8, 8), "starts": starts}):
        with pytest.raises(
            ConfigError, match=r"record [01] has \d tokens from position \d on.*routed_experts_prompt_start"
        ):
            read_choices("vllm", records, model.config, 8, **arguments)
    with pytest.raises(ConfigError, match=r"record 1 has 3 tokens from position 3 on, but its sequence has 5"):
        read_choices("vllm", records, model.config, 8, tokens=LENGTHS, starts=3)


def test_replay_of_other_experts(recorded):
    """One layer, with capacity for all tokens."""
    _, tokens, _, run = recorded
    sizes = {"num_experts": 5, "experts_per_token": 2, "dispatch": "einsum", "eval_capacity_factor": 5.0}
    model = random_model(tiny_model(num_layers=1, gate="mixtral", **sizes))
    output = run(model, tokens, None)
    present = np.arange(8) < np.array(LENGTHS)[:, None]
    own = Choices(output.routing.expert_index, output.routing.chosen & present[None, :, :, None])
    same = replay_effect(model, tokens, own)
    log_probs = np.asarray(jax.nn.log_softmax(output.logits, axis=-1))
    losses = [-log_probs[i, t, tokens[i, t + 1]] for i, length in enumerate(LENGTHS) for t in range(length - 1)]
    assert same.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert same.loss == pytest.approx(same.replayed_loss, rel=1e-6)
    assert same.gradient_cosine == pytest.approx(1, abs=1e-5)
    other = Choices((output.routing.expert_index + 1) % 5, output.routing.chosen)
    effect = replay_effect(model, tokens, other)
    assert effect.replayed_loss != pytest.approx(effect.loss, rel=1e-4)
    assert effect.gradient_cosine < 0.999
    lonely = Choices(own.expert_index, own.chosen & (np.arange(8) % 2 == 0)[None, None, :, None])
    with pytest.raises(ConfigError, match="the records hold no two consecutive tokens"):
        replay_effect(model, tokens, lonely)


def test_mismatch_by_hand():
    """E = 3, K = 1, four tokens of one layer, one of them without a record. Ours are 0, 0, 1, 2.

    Margins: 0.5 - 0.3 = 0.2, 0.9 - 0.1 = 0.8, 0.6 - 0.3 = 0.3. Recorded are 1, 0, 1: one of three differs, the token
    with the smallest margin.
    """
    probs = jnp.array([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0], [0.3, 0.6, 0.1], [0.1, 0.2, 0.7]])[None, None]
    ours = jnp.array([[[[0], [0], [1], [2]]]])
    true = jnp.ones(ours.shape, bool)
    routing = Routing(ours, jnp.ones(ours.shape), true, jnp.log(probs), probs, ~true[..., 0])
    choices = Choices(jnp.array([[[[1], [0], [1], [0]]]]), true.at[0, 0, 3].set(False))
    result = mismatch(choices, routing)
    np.testing.assert_allclose(result.decisions, [1 / 3])
    np.testing.assert_allclose(result.tokens, [1 / 3])
    np.testing.assert_allclose(result.margins, [0.2, 0.3, 0.8], atol=1e-6)
    assert result.by_margin.tolist() == [1, 0, 0]
    assert "| 0 | 33.33 | 33.33 |" in result.as_markdown()
    with pytest.raises(ConfigError, match="the records hold no experts"):
        mismatch(Choices(choices.expert_index, jnp.zeros(ours.shape, bool)), routing)


def test_refusals(recorded):
    model = recorded[0].config
    good = np.tile(np.array([0, 1]), (4, 3, 1))

    def refused(pattern, records, engine="vllm", length=4):
        with pytest.raises(ConfigError, match=pattern):
            read_choices(engine, records, model, length)

    refused("engine='vlm': must be one of vllm, sglang, tensorrt_llm, tunix", [good], "vlm")
    refused(r"record 1 has shape \[4, 4, 2\], must be \[tokens, 2 or 3 layers, 2\]", [good, np.zeros((4, 4, 2), int)])
    refused(r"record 0 has shape \[4, 3, 1\]", [good[..., :1]])
    refused(r"record 0 is of type float64, must be integers", [good * 1.0])
    refused("record 0 has 4 tokens, but rows have 3", [good], length=3)
    refused("record 0: expert 5 at token 0, MoE layer 0: must be below 5", [good + 4])
    null = dataclasses.replace(model, moe=dataclasses.replace(model.moe, copy_experts=2))
    assert np.asarray(read_choices("vllm", [good + 5], null, 4).expert_index).min() == 5  # experts without an FFN
    refused("record 0: one expert twice at token 0, MoE layer 0", [good * 0])
    refused("record 0: is not base64 of int32", ["%%"], "sglang")
    refused("record 0: 5 experts are not a multiple", [base64.b64encode(np.zeros(5, "<i4").tobytes())], "sglang")
    # Six tokens of two MoE layers are as many numbers as four tokens of three layers; base64 has no shape.
    two = base64.b64encode(np.tile(np.array([0, 1], "<i4"), (4, 2, 1)).tobytes())
    refused("record 0: 16 experts are not a multiple of 3 layers of 2", [two], "sglang")
    for wrapped in (good + 2**32, good.astype(np.uint64) + 2**63):
        refused(f"record 0 has the expert {wrapped.min()}, beyond 32 bits", [wrapped])
    refused("length=0: must be positive, and records one for each sequence", [good], length=0)
    refused("length=4: must be positive, and records one for each sequence", None)
    for wrong in ({"tokens": [4]}, {"tokens": [4, -1]}, {"starts": [0]}, {"starts": -1}):
        with pytest.raises(
            ConfigError, match=f"{next(iter(wrong))}=.*: must be numbers from 0 on, one for each of the 2"
        ):
            read_choices("vllm", [good, good], model, 4, **wrong)
    with pytest.raises(ConfigError, match="record 0 is of 5 tokens, but rows have 4"):
        read_choices("vllm", [good], model, 4, tokens=[5])
    refused(r"the record has shape \[4, 3, 2\], must be \[batch, layers, length, 2\]", good, "tunix")
