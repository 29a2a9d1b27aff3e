"""Surgery on experts: identities change no logit, saliencies by hand, a pruned model equals one of fewer experts."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moe.analysis import measures, merging, saliency, surgery
from moe.config import Config, ConfigError, Losses, MeshConfig, ModelConfig, MoEConfig
from moe.interop import export_checkpoint
from moe.models.state import join
from moe.parallel.mesh import make_mesh
from moe.playground import supported
from moe.routing.gates import TopK
from moe.routing.interface import Gate
from moe.training.batches import forward
from moe.training.open_workdir import on_devices
from moe.training.step import build
from tests.analysis.test_difference import _records
from tests.analysis_helpers import random_batch, tiny_program
from tests.helpers import random_parameters, slow_case, tiny_model
from tests.run_helpers import write_run

#: Capacity for every token with the dispatch that compiles fastest.
ROOM = {"dispatch": "einsum", "eval_capacity_factor": 8.0}


def _parts(program, variables):
    from flax import nnx

    from moe.layers.router import SelectionBias

    model = program.model(variables)
    return [jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, kind))) for kind in (nnx.Param, SelectionBias)]


@functools.cache
def _compiled(config, mesh):
    program = build(config, mesh)
    return jax.jit(lambda variables, batch: forward(program.model(variables), batch).logits)


def _logits(config, mesh, batch, parameters, biases):
    with jax.set_mesh(mesh):
        return np.asarray(_compiled(config, mesh)(join(parameters, biases), batch))


@pytest.mark.parametrize(
    "overrides",
    [
        slow_case({"gate": "mixtral", "num_experts": 4, **ROOM}),
        {"gate": "switch", "num_experts": 4, **ROOM, "bias": "all"},
        slow_case({"gate": "deepseek_v4", "num_experts": 8, "experts_per_token": 2, **ROOM}),
        {"gate": "deepseek_moe", "num_experts": 4, "experts_per_token": 2, "bias_update": "sign", **ROOM},
        slow_case({"gate": "sinkhorn", "num_experts": 4, "accept_future_leak": True, **ROOM}),
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


def test_a_model_of_one_pool_computes_what_its_document_gets(rng):
    """A quarter of eight experts, two, is the pool of a document whose copies are the rows. Without the others the
    model is a plain top-K one, with the same logits, which runs on the page."""
    program, variables = tiny_program(gate="emo", num_experts=8, experts_per_token=2, accept_future_leak=True, **ROOM)
    config, mesh = program.config, program.mesh
    parameters, biases = _parts(program, variables)
    batch = random_batch(rng, config.model.vocab_size)
    batch = {name: np.stack([values[0]] * len(values)) for name, values in batch.items()}
    batch["segment_ids"] = np.ones_like(batch["segment_ids"])
    count = surgery.experts_left(config.model, 0.75)
    kept = saliency.most_salient(saliency.PoolSums(program)(variables, {"text": [batch]}), count, 1)
    cut, pruned, left = surgery.prune(config.model, parameters, biases, kept)
    fewer = surgery.as_one_pool(cut)
    after = _logits(dataclasses.replace(config, model=fewer), mesh, batch, pruned, left)
    np.testing.assert_allclose(after, _logits(config, mesh, batch, parameters, biases), rtol=1e-5, atol=1e-6)
    assert isinstance(supported.check(dataclasses.replace(fewer, moe=fewer.moe.with_dispatch("dropless"))), TopK)
    other, _ = tiny_program(gate="mixtral", num_experts=4, **ROOM)
    with pytest.raises(ConfigError, match="gate='mixtral': must be emo, whose documents have pools"):
        saliency.PoolSums(other)
    with pytest.raises(ConfigError, match=r"--prune=0.875: must leave the K=2 experts of a token, the smallest pool"):
        surgery.experts_left(config.model, 0.875)


def test_an_edited_model_is_measured_in_shards():
    """A program puts experts that are NumPy's whole on every device."""
    model = tiny_model(gate="mixtral", num_experts=4, num_layers=1)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    with jax.set_mesh(mesh):
        program = build(Config(model=model), mesh)
    variables = jax.tree.map(np.asarray, random_parameters(model)[1])
    placed = on_devices(program, variables)
    jax.tree.map(np.testing.assert_array_equal, placed, variables)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
    assert shardings == jax.tree.map(lambda leaf: leaf.sharding, program.state.variables)


def test_experts_chosen_together_stand_together_and_no_logit_changes(rng):
    """Two tokens choose experts 0 and 2, one 1 and 3, one only 0: two groups, {0, 2} and {1, 3}. In the original
    order each of the first three has experts in both groups: (2 + 2 + 2 + 1)/4 against 1."""
    index = np.array([[0, 2], [2, 0], [1, 3], [0, 1]])
    chosen = np.array([[True, True], [True, True], [True, True], [True, False]])
    counts = measures.coactivation(index[None], chosen[None], 4)[0]
    np.testing.assert_array_equal(counts, [[3, 0, 2, 0], [0, 1, 0, 1], [2, 0, 2, 0], [0, 1, 0, 1]])
    assert surgery.order_together(counts, 2).tolist() == [0, 2, 1, 3]
    member = measures.membership(index, chosen, 4)
    assert surgery.groups_of_tokens(member, np.arange(4), 2) == 7 / 4
    assert surgery.groups_of_tokens(member, np.array([0, 2, 1, 3]), 2) == 1
    program, variables = tiny_program(gate="mixtral", num_experts=4, **ROOM)
    config, mesh = program.config, program.mesh
    parameters, biases = _parts(program, variables)
    batch = random_batch(rng, config.model.vocab_size)
    orders = np.stack([rng.permutation(4) for _ in surgery.moe_layers(config.model)])
    same, moved, moved_biases = surgery.prune(config.model, parameters, biases, orders)
    assert same == config.model
    before = _logits(config, mesh, batch, parameters, biases)
    np.testing.assert_allclose(_logits(config, mesh, batch, moved, moved_biases), before, rtol=1e-6, atol=1e-6)
    with pytest.raises(ConfigError, match="--regroup=3: must divide"):
        surgery.check_groups(config.model, 3)


def test_a_pruned_model_routes_among_the_experts_that_are_left(rng):
    """If the router never chooses expert 1, pruning it changes no renormalised weight."""
    program, variables = tiny_program(gate="mixtral", num_experts=4, **ROOM, bias="router")
    config, mesh = program.config, program.mesh
    parameters, biases = _parts(program, variables)
    names = [path for _, path in surgery.unstack_layers(config.model, parameters)]
    assert ("moe", "router", "logit_bias") in names
    parameters = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf - 100.0 * (np.arange(4) == 1) if "logit_bias" in str(path) else leaf, parameters
    )
    batch = random_batch(rng, config.model.vocab_size)
    before = _logits(config, mesh, batch, parameters, biases)
    layers = len(surgery.moe_layers(config.model))
    kept = np.tile([0, 2, 3], (layers, 1))
    fewer, pruned, left = surgery.prune(config.model, parameters, biases, kept)
    assert fewer.moe.num_experts == 3
    after = _logits(dataclasses.replace(config, model=fewer), mesh, batch, pruned, left)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    whole = surgery.prune(config.model, parameters, biases, np.tile(np.arange(4), (layers, 1)))
    jax.tree.map(np.testing.assert_array_equal, whole[1], parameters)
    assert whole[0] == config.model


def test_experts_replaced_by_zero_return_nothing(rng):
    """Tokens still choose them, with the same weights: a model whose down matrices of these experts are zero."""
    program, variables = tiny_program(gate="deepseek_v4", num_experts=4, experts_per_token=2, **ROOM)
    config, mesh = program.config, program.mesh
    parameters, biases = _parts(program, variables)
    batch = random_batch(rng, config.model.vocab_size)
    kept = np.array([[0, 3], [1, 2]])
    fewer, changed, left = surgery.prune(config.model, parameters, biases, kept, null=True)
    assert (fewer.moe.num_experts, fewer.moe.zero_experts) == (2, 2)
    flat = surgery.unstack_layers(config.model, parameters)
    for layer, experts in enumerate(kept):
        path = layer, ("moe", "experts", "down")
        flat[path] = np.where(np.isin(np.arange(4), experts)[:, None, None], flat[path], 0)
    silent = surgery.restack_layers(config.model, parameters, flat)
    expected = _logits(config, mesh, batch, silent, biases)
    after = _logits(dataclasses.replace(config, model=fewer), mesh, batch, changed, left)
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(after - _logits(config, mesh, batch, parameters, biases)).max() > 0.01


def test_novices_return_the_mean_output_of_the_tokens_that_chose_the_expert(rng):
    """MoNE: equal to a model whose pruned experts are only down biases, which are their mean outputs before pruning."""
    program, variables = tiny_program(gate="mixtral", num_experts=4, **ROOM, bias="all")
    config, mesh, model = program.config, program.mesh, program.config.model
    parameters, biases = _parts(program, variables)
    parameters = jax.tree.map(lambda array: array + 0.1 * rng.normal(size=array.shape).astype(np.float32), parameters)
    batch, kept = random_batch(rng, model.vocab_size, real=13), np.array([[0, 3], [1, 2]])
    means = saliency.mean_output(saliency.OutputMoments(program)(join(parameters, biases), {"text": [batch]}))
    fewer, changed, left = surgery.prune(model, parameters, biases, kept, novices=means)
    assert (fewer.moe.num_experts, fewer.moe.zero_experts, fewer.moe.novice_experts) == (2, 0, 2)
    flat = surgery.unstack_layers(model, parameters)
    for layer, experts in enumerate(kept):
        gone = ~np.isin(np.arange(4), experts)
        for name, constant in (("down", np.zeros(())), ("down_bias", means[layer])):
            path = layer, ("moe", "experts", name)
            flat[path] = np.where(gone.reshape(-1, *[1] * (flat[path].ndim - 1)), constant, flat[path])
    expected = _logits(config, mesh, batch, surgery.restack_layers(model, parameters, flat), biases)
    after = _logits(dataclasses.replace(config, model=fewer), mesh, batch, changed, left)
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-5)
    # A second pruning puts its novice after that of the first, in the router's columns and in the vectors.
    first = surgery.prune(model, parameters, biases, np.tile([0, 1, 3], (2, 1)), novices=means)
    second, twice, _ = surgery.prune(*first, np.tile([0, 2], (2, 1)), novices=0 * means[:, :3] + 3)
    flat = surgery.unstack_layers(second, twice)
    vectors, columns = (flat[0, ("moe", *path)] for path in (("null", "novices"), ("router", "kernel")))
    np.testing.assert_allclose(vectors, [means[0, 2], 0 * means[0, 0] + 3], rtol=1e-6)
    whole = surgery.unstack_layers(model, parameters)[0, ("moe", "router", "kernel")]
    np.testing.assert_array_equal(columns, whole[:, [0, 3, 2, 1]])
    nothing = surgery.prune(model, parameters, biases, np.tile(np.arange(4), (2, 1)), novices=means)
    assert nothing[0] == model
    jax.tree.map(np.testing.assert_array_equal, nothing[1], parameters)


def test_mean_and_deviation_of_outputs_by_hand(rng):
    """Moments of the first layer, whose input is the embedding since attention returns 0; padding does not count."""
    program, variables = tiny_program(gate="switch", num_experts=3, **ROOM, activation="relu")
    model = program.config.model
    parameters, biases = _parts(program, variables)
    flat = surgery.unstack_layers(model, parameters)
    flat[0, ("attention", "out")] = np.zeros_like(flat[0, ("attention", "out")])
    parameters = surgery.restack_layers(model, parameters, flat)
    batch = random_batch(rng, model.vocab_size, real=13)
    moments = saliency.OutputMoments(program)(join(parameters, biases), {"text": [batch]})
    x = flat[-1, ("embedding", "table")][batch["tokens"][batch["segment_ids"] > 0]]
    h = x / np.sqrt((x**2).mean(1, keepdims=True) + model.norm_eps) * flat[0, ("ffn_norm", "scale")]
    chosen = np.argmax(h @ flat[0, ("moe", "router", "kernel")], axis=1)
    up, down = (flat[0, ("moe", "experts", name)] for name in ("up", "down"))
    for expert in range(3):
        outputs = np.maximum(h[chosen == expert] @ up[expert], 0) @ down[expert]
        mean = outputs.mean(0) if len(outputs) else np.zeros(model.d_model)
        np.testing.assert_allclose(saliency.mean_output(moments)[0, expert], mean, rtol=1e-4, atol=1e-6)
        variance = ((outputs - mean) ** 2).sum(1).mean() if len(outputs) else 0.0
        np.testing.assert_allclose(saliency.deviation(moments)[0, expert], variance**0.5, rtol=1e-3, atol=1e-5)


def test_an_expert_merged_with_its_permuted_copy_is_itself(rng):
    """Expert 2 is expert 0 with its hidden units in another order: merging it into expert 0 leaves 0 unchanged."""
    program, variables = tiny_program(gate="switch", num_experts=3, **ROOM, bias="all")
    model = program.config.model
    parameters, biases = _parts(program, variables)
    flat = surgery.unstack_layers(model, parameters)
    order = rng.permutation(model.moe.d_ff)
    for layer in surgery.moe_layers(model):
        for name, axis in {"up": 1, "gate": 1, "up_bias": 0, "gate_bias": 0, "down": 0, "down_bias": None}.items():
            array = np.array(flat[layer, ("moe", "experts", name)])
            array[2] = array[0] if axis is None else np.take(array[0], order, axis=axis)
            flat[layer, ("moe", "experts", name)] = array
        router = np.array(flat[layer, ("moe", "router", "kernel")])
        router[:, 2] = 1.5 * router[:, 0]
        flat[layer, ("moe", "router", "kernel")] = router
    doubled = surgery.restack_layers(model, parameters, flat)
    kept = np.tile([0, 1], (2, 1))
    fewer, merged, _ = merging.absorb(model, doubled, biases, kept, np.array([[5.0, 1, 2], [1, 1, 9]]))
    pruned = surgery.prune(model, doubled, biases, kept)
    assert fewer == pruned[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), merged, pruned[1])
    arrays = {name: flat[0, ("moe", "experts", name)] for name in ("up", "gate", "down")}
    assert merging.match_units(arrays, 0, 2).tolist() == np.argsort(order).tolist()


def test_merged_weights_are_averages_by_usage():
    """One hidden unit: expert 1 (usage 1) joins expert 0 (usage 3): 3/4 of 4 and 1/4 of 8 is 5."""
    arrays = {"up": np.array([[[4.0]], [[8.0]]]), "down": np.array([[[1.0]], [[1.0]]])}
    merged = merging._average(arrays, 0, [0, 1], np.array([0.75, 0.25]))
    assert (merged["up"].item(), merged["down"].item()) == (5.0, 1.0)


def test_reap_by_hand(rng):
    """Without attention a layer's input is known, so that NumPy can recompute weights and outputs of its experts."""
    program, variables = tiny_program(gate="mixtral", num_experts=4, **ROOM, activation="relu")
    model = program.config.model
    parameters, biases = _parts(program, variables)
    flat = surgery.unstack_layers(model, parameters)
    for layer in surgery.moe_layers(model):
        flat[layer, ("attention", "out")] = np.zeros_like(flat[layer, ("attention", "out")])
    parameters = surgery.restack_layers(model, parameters, flat)
    batch = random_batch(rng, model.vocab_size, real=13)
    found = saliency.Reap(program)(join(parameters, biases), {"text": [batch]})

    x = flat[-1, ("embedding", "table")][batch["tokens"][batch["segment_ids"] > 0]]
    for layer in surgery.moe_layers(model):
        h = x / np.sqrt((x**2).mean(1, keepdims=True) + model.norm_eps) * flat[layer, ("ffn_norm", "scale")]
        logits = h @ flat[layer, ("moe", "router", "kernel")]
        order = np.argsort(-logits, axis=1)[:, :2]
        chosen = np.exp(np.take_along_axis(logits, order, axis=1))
        weights = chosen / chosen.sum(1, keepdims=True)
        up, down = (flat[layer, ("moe", "experts", name)] for name in ("up", "down"))
        outputs = np.stack([np.maximum(h @ up[e], 0) @ down[e] for e in range(4)], axis=1)  # [n,E,D]
        for expert in range(4):
            terms = [
                weights[token, place] * np.linalg.norm(outputs[token, expert])
                for token, place in np.argwhere(order == expert)
            ]
            np.testing.assert_allclose(found[layer, expert], np.mean(terms) if terms else 0, rtol=1e-4)
        x = x + np.einsum("nk,nkd->nd", weights, np.take_along_axis(outputs, order[..., None], axis=1))


def test_saliencies_by_hand(rng):
    """Tokens 0, 0, 1, 2 with weights 1, 1, 4, 2: shares 2/4, 1/4, 1/4, 0 and 2/8, 4/8, 2/8, 0."""
    records = _records(np.array([0, 0, 1, 2]), row=np.zeros(4, int))
    records = dataclasses.replace(records, combine_weights=np.array([1, 1, 4, 2.0]).reshape(1, 4, 1))
    assert saliency.frequency(records).tolist() == [[0.5, 0.25, 0.25, 0]]
    assert saliency.weight(records).tolist() == [[0.25, 0.5, 0.25, 0]]
    assert saliency.most_salient(saliency.weight(records), 2).tolist() == [[0, 1]]
    declined = dataclasses.replace(records, chosen=np.array([True, True, False, True]).reshape(1, 4, 1))
    np.testing.assert_allclose(saliency.frequency(declined), [[2 / 3, 0, 1 / 3, 0]])
    assert saliency.weight(declined).tolist() == [[0.5, 0, 0.5, 0]]
    unused = dataclasses.replace(records, chosen=np.zeros((1, 4, 1), bool))
    assert saliency.frequency(unused).tolist() == [[0, 0, 0, 0]]
    in_groups = saliency.most_salient(np.array([[0, 0.1, 0.5, 0.6, 0.7, 0.8, 0.9, 1]]), 6, groups=2)
    assert in_groups.tolist() == [[1, 2, 3, 5, 6, 7]]  # without 0 of the first four and 4 of the others
    program, variables = tiny_program(gate="switch", num_experts=4)
    parameters, _ = _parts(program, variables)

    def norm(tree):
        flat = surgery.unstack_layers(program.config.model, tree)
        return -float(sum(np.abs(array).sum() for (_, path), array in flat.items() if path[-1] == "down"))

    rises = saliency.ablation(program.config.model, parameters, norm)
    down = [
        np.abs(array).sum((1, 2))
        for (_, path), array in surgery.unstack_layers(program.config.model, parameters).items()
        if path[-2:] == ("experts", "down")
    ]
    np.testing.assert_allclose(rises, np.stack(down), rtol=1e-3)


@pytest.mark.parametrize(
    ("overrides", "parts", "message"),
    [
        ({"gate": "none"}, 2, "surgery needs one gate in all layers, whose router chooses"),
        ({"gate": "hash"}, 2, "surgery needs one gate in all layers, whose router chooses"),
        ({"gate": "balanced"}, 2, "surgery needs one gate in all layers, whose router chooses"),
        (
            {"gate": "deepseek_v4_hash", "num_experts": 8},
            2,
            "surgery needs one gate in all layers, whose router chooses",
        ),
        ({"gate": "gshard"}, 2, "needs tokens that choose K of all experts"),
        ({"gate": "mixtral"}, 11, "model.moe.d_ff=.*: must be divisible by 11"),
    ],
)
def test_what_cannot_be_split_is_refused(overrides, parts, message):
    program, variables = tiny_program(**overrides)
    parameters, biases = _parts(program, variables)
    with pytest.raises(ConfigError, match=message):
        surgery.split(program.config.model, parameters, biases, parts)


def test_a_users_gate_without_a_router_is_refused():
    class Unrouted(Gate):
        router, k = "none", 1

    model = ModelConfig(moe=MoEConfig(gate=Unrouted(), num_experts=8, losses=Losses(balance=0.0)))
    with pytest.raises(ConfigError, match="surgery needs one gate in all layers, whose router chooses"):
        surgery.check(model)


def test_a_users_gate_is_not_split():
    class Sharp(Gate):
        k = 2

    model = ModelConfig(moe=MoEConfig(gate=Sharp(name="my_gates:Sharp"), num_experts=8))
    surgery.check(model)
    with pytest.raises(ConfigError, match=r"model\.moe\.gate='my_gates:Sharp': a gate of your own"):
        surgery.split(model, {}, {}, 2)


@pytest.mark.transformers
@pytest.mark.parametrize("merged", [False, True])
def test_a_pruned_export_loads_elsewhere_with_equal_logits(tmp_path, rng, merged):
    """The export is a Mixtral of three experts. Needs torch and transformers 5: python -m pytest -m transformers."""
    import torch
    import transformers

    program, variables = tiny_program(gate="mixtral", num_experts=4, **ROOM)
    parameters, biases = _parts(program, variables)
    kept = np.array([[0, 1, 3], [1, 2, 3]])
    model = program.config.model
    if merged:
        fewer, pruned, _ = merging.absorb(model, parameters, biases, kept, np.ones((2, 4)))
    else:
        fewer, pruned, _ = surgery.prune(model, parameters, biases, kept)
    config = dataclasses.replace(program.config, model=fewer)
    write_run(tmp_path / "run", config, pruned)
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    elsewhere, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values())
    assert elsewhere.config.num_local_experts == 3
    token_ids = rng.integers(0, model.vocab_size, (2, 8)).astype(np.int32)
    shape = np.ones_like(token_ids), np.broadcast_to(np.arange(8, dtype=np.int32), token_ids.shape)
    batch = dict(zip(("tokens", "segment_ids", "positions"), (token_ids, *shape), strict=True))
    ours = _logits(config, program.mesh, batch, pruned, {})
    with torch.no_grad():
        theirs = elsewhere(torch.tensor(token_ids.astype(np.int64))).logits.numpy()
    assert np.abs(ours).max() > 1
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)
