"""Surgery on experts: identities change no logit, saliencies by hand, and a pruned model is that of fewer experts."""

import dataclasses

import jax
import numpy as np
import pytest

from moe.analysis import surgery
from moe.config import ConfigError
from moe.models.state import join
from moe.training.batches import forward
from moe.training.step import build
from tests.analysis.test_difference import _records
from tests.analysis_helpers import random_batch, tiny_program


def _parts(program, variables):
    from flax import nnx

    from moe.layers.moe_layer import SelectionBias

    model = program.model(variables)
    return [jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, kind))) for kind in (nnx.Param, SelectionBias)]


def _logits(config, mesh, batch, parameters, biases):
    program = build(config, mesh)
    with jax.set_mesh(mesh):
        return np.asarray(forward(program.model(join(parameters, biases)), batch).logits)


@pytest.mark.parametrize(
    "overrides",
    [
        {"gate": "mixtral", "num_experts": 4, "dispatch": "dropless"},
        {"gate": "switch", "num_experts": 4, "dispatch": "dropless", "bias": "all"},
        {"gate": "deepseek_v4", "num_experts": 8, "experts_per_token": 2, "dispatch": "dropless"},
    ],
    ids=lambda overrides: overrides["gate"],
)
def test_split_and_merged_again_no_logit_changes(rng, overrides):
    program, variables = tiny_program(**overrides)
    config, mesh = program.config, program.mesh
    parameters, biases = _parts(program, variables)
    batch = random_batch(rng, config.model.vocab_size)
    before = _logits(config, mesh, batch, parameters, biases)
    finer, split, split_biases = surgery.split(config.model, parameters, biases, 2)
    assert finer.moe.num_experts == 2 * config.model.moe.num_experts
    assert finer.moe.experts_per_token == 2 * config.model.moe.experts_per_token
    after = _logits(dataclasses.replace(config, model=finer), mesh, batch, split, split_biases)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    again, merged, merged_biases = surgery.merge(finer, split, split_biases, 2)
    assert again == config.model
    same = _logits(config, mesh, batch, merged, merged_biases)
    np.testing.assert_allclose(same, before, rtol=1e-6, atol=1e-6)


def test_a_pruned_model_routes_among_the_experts_that_are_left(rng):
    """Where the router never chooses expert 1, leaving it out changes no renormalised weight."""
    program, variables = tiny_program(gate="mixtral", num_experts=4, dispatch="dropless", bias="router")
    config, mesh = program.config, program.mesh
    parameters, biases = _parts(program, variables)
    names = [path for _, path in surgery.unstack_layers(config.model, parameters)]
    assert ("moe", "router", "logit_bias") in names
    parameters = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf - 100.0 * (np.arange(4) == 1) if "logit_bias" in str(path) else leaf, parameters
    )
    batch = random_batch(rng, config.model.vocab_size)
    before = _logits(config, mesh, batch, parameters, biases)
    layers = len(surgery._moe_layers(config.model))
    kept = np.tile([0, 2, 3], (layers, 1))
    fewer, pruned, left = surgery.prune(config.model, parameters, biases, kept)
    assert fewer.moe.num_experts == 3
    after = _logits(dataclasses.replace(config, model=fewer), mesh, batch, pruned, left)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    whole = surgery.prune(config.model, parameters, biases, np.tile(np.arange(4), (layers, 1)))
    jax.tree.map(np.testing.assert_array_equal, whole[1], parameters)
    assert whole[0] == config.model


def test_saliencies_by_hand(rng):
    """Tokens 0, 0, 1, 2 with weights 1, 1, 4, 2: shares 2/4, 1/4, 1/4, 0 and 2/8, 4/8, 2/8, 0."""
    records = _records(np.array([0, 0, 1, 2]), row=np.zeros(4, int))
    records = dataclasses.replace(records, combine_weights=np.array([1, 1, 4, 2.0]).reshape(1, 4, 1))
    assert surgery.frequency(records).tolist() == [[0.5, 0.25, 0.25, 0]]
    assert surgery.weight(records).tolist() == [[0.25, 0.5, 0.25, 0]]
    assert surgery.most_salient(surgery.weight(records), 2).tolist() == [[0, 1]]
    program, variables = tiny_program(gate="switch", num_experts=4)
    parameters, _ = _parts(program, variables)

    def norm(tree):
        flat = surgery.unstack_layers(program.config.model, tree)
        return -float(sum(np.abs(array).sum() for (_, path), array in flat.items() if path[-1] == "down"))

    rises = surgery.ablation(program.config.model, parameters, norm)
    down = [
        np.abs(array).sum((1, 2))
        for (_, path), array in surgery.unstack_layers(program.config.model, parameters).items()
        if path[-2:] == ("experts", "down")
    ]
    np.testing.assert_allclose(rises, np.stack(down), rtol=1e-3)


@pytest.mark.parametrize(
    ("overrides", "parts", "message"),
    [
        ({"gate": "none"}, 2, "surgery needs one gate with a router"),
        ({"gate": "hash"}, 2, "surgery needs one gate with a router"),
        ({"gate": "gshard"}, 2, "needs tokens that choose K of all experts"),
        ({"gate": "mixtral"}, 11, "model.moe.d_ff=.*: must be divisible by 11"),
    ],
)
def test_what_cannot_be_split_is_refused(overrides, parts, message):
    program, variables = tiny_program(**overrides)
    parameters, biases = _parts(program, variables)
    with pytest.raises(ConfigError, match=message):
        surgery.split(program.config.model, parameters, biases, parts)
