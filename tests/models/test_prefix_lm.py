"""Prefix LM in a decoder: visibility within a prefix, training, generation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.layers.attention.attend import attend
from moe.layers.attention.scoring import Scoring
from moe.models import sampling, speculation
from moe.models.decoder import Transformer
from moe.training.train import train
from tests.helpers import random_parameters, tiny_model
from tests.run_helpers import ONE, rows, tiny


@pytest.mark.parametrize("kind", ["full", "blocked"])
def test_attention_by_hand(kind):
    """Documents of 5 tokens with a prefix of 3 and of 3 tokens with a prefix of 1, against softmax under a mask."""
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2]])
    prefix = np.array([[1, 1, 1, 0, 0, 1, 0, 0]])
    visible = np.zeros((8, 8), bool)
    visible[:5, :3] = True  # every token of the first document sees its prefix
    visible[3, 3] = visible[4, 3:5] = True
    visible[5:, 5] = visible[6, 6] = visible[7, 6:] = True
    query, key, value = np.random.default_rng(0).normal(size=(3, 1, 8, 2, 4)).astype(np.float32)
    scores = np.where(visible, np.einsum("tnh,unh->ntu", query[0], key[0]) / 2, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    arrays = map(jnp.asarray, (query, key, value, segments))
    found = attend(*arrays, kind=kind, scoring=Scoring(prefix=jnp.asarray(prefix)))
    np.testing.assert_allclose(found[0], np.einsum("ntu,unh->tnh", weights, value[0]), atol=1e-6)


@pytest.fixture(scope="module")
def model():
    config = tiny_model(gate="none")
    graphdef, variables = random_parameters(config)
    return config, variables, nnx.merge(graphdef, variables)


def test_attention_within_a_prefix_is_bidirectional(model):
    config, _, transformer = model
    assert isinstance(transformer, Transformer)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 8))
    prefix = np.array([[1, 1, 1, 1, 0, 0, 0, 0]])
    run = jax.jit(lambda ids: transformer(ids, prefix=prefix).logits)

    def changed(position):
        other = tokens.copy()
        other[0, position] = (other[0, position] + 1) % config.vocab_size
        return np.flatnonzero(np.abs(run(tokens) - run(other)).max(-1)[0] > 1e-6).tolist()

    assert changed(3) == list(range(8))  # the last token of the prefix changes all
    assert changed(5) == [5, 6, 7]


def test_generation_sees_the_prompt_as_training_does(model):
    """Greedy tokens after prompts of unequal lengths are those of whole forward passes with the prompt as prefix."""
    config, variables, transformer = model
    prompts = [[3, 9, 4, 7], [5, 6]]
    greedy = sampling.Sampling(temperature=0, prefix=True)
    written = sampling.sample(config, variables, prompts, 4, greedy)
    run = jax.jit(lambda ids, prefix: transformer(ids, prefix=prefix).logits)
    for prompt, found in zip(prompts, written, strict=True):
        text = list(prompt)
        for _ in range(4):
            ids = np.pad(text, (0, 8 - len(text)))[None]
            prefix = (np.arange(8) < len(prompt)).astype(np.int32)[None]
            text.append(int(run(ids, prefix)[0, len(text) - 1].argmax()))
        assert text[len(prompt) :] == found.tolist()
    causal = sampling.sample(config, variables, prompts, 4, dataclasses.replace(greedy, prefix=False))
    assert any(a.tolist() != b.tolist() for a, b in zip(written, causal, strict=True))


def test_speculated_text_is_the_greedy_text_of_a_prefix_lm():
    config = tiny_model(gate="none", prediction_layers=1)
    _, variables = random_parameters(config)
    prompts = [[3, 9, 4, 7], [5, 6]]
    greedy = sampling.sample(config, variables, prompts, 4, sampling.Sampling(temperature=0, prefix=True))
    found = speculation.sample(config, variables, prompts, 4, prefix=True)
    np.testing.assert_array_equal(found.texts, greedy)
    causal = sampling.sample(config, variables, prompts, 4, sampling.Sampling(temperature=0))
    assert np.any(np.stack(greedy) != np.stack(causal))


@pytest.mark.slow
def test_a_prefix_lm_trains(directory, tmp_path):
    train(tiny(directory, **{"data.objective": "prefix_lm"}), str(tmp_path / "run"), ONE)
    final = rows(tmp_path / "run", "heldout/all")[-1]
    assert 0 < final["loss"] < np.log(400) + 1
    assert "a continuation, tiny_text/split" in (tmp_path / "run" / "report.txt").read_text()
