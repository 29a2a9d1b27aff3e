"""Multi-token prediction against a loop over documents, and import and export of published layers."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from moe.config import ConfigError, validate_mesh
from moe.config.rope_section import RopeScalingConfig
from moe.configs import base
from moe.interop import export_checkpoint, import_checkpoint
from moe.interop.load import load_huggingface
from moe.layers.call import Call
from moe.models import sampling, speculation
from moe.models.decoder import make_rows
from moe.models.prediction import further_targets
from moe.models.segments import part_of, selection_biases, stacked_layers
from moe.objectives.text import NextToken
from moe.parallel.mesh import make_mesh
from moe.training.batches import forward, place
from moe.training.step import build
from tests.helpers import random_model, random_parameters, set_moe, slow_case
from tests.run_helpers import ONE, tiny

BIASED = {
    "gate": "deepseek_v3",
    "experts_per_token": 2,
    "expert_groups": 1,
    "kept_expert_groups": 1,
    "scores_per_group": 1,
}
V3 = Path(__file__).parents[1] / "data" / "checkpoints" / "deepseek_v3"


def config_of(tmp_path, moe=None, **changes):
    tree = base.get_config()
    nothing_dropped = {"num_experts": 4, "capacity_factor": 4.0}
    set_moe(tree, **{"gate": "mixtral"} | nothing_dropped | (moe or {}))
    return tiny(tmp_path, tree, **{"model.prediction_layers": 2, "model.prediction_weight": 0.6} | changes)


def batch_of(rng, rows=8):
    """Rows of two documents of 7 tokens and 2 tokens of padding."""
    tokens = rng.integers(3, 40, (rows, 16)).astype(np.int32)
    segments = np.repeat([1, 2, 0], [7, 7, 2])[None].repeat(rows, 0).astype(np.int32)
    positions = np.concatenate([np.arange(7), np.arange(7), [0, 0]])[None].repeat(rows, 0).astype(np.int32)
    same = np.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1))) & (segments > 0)
    targets = np.where(same, np.roll(tokens, -1, 1), -1).astype(np.int32)
    return {"tokens": tokens, "targets": targets, "segment_ids": segments, "positions": positions}


def test_targets_of_a_depth_stay_in_their_document():
    targets, segments = jnp.array([[11, 12, -1, 21, 22, 23, -1, -1]]), jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]])
    assert further_targets(targets, segments, 1)[0].tolist() == [12, -1, -1, 22, 23, -1, -1, -1]
    assert further_targets(targets, segments, 2)[0].tolist() == [-1, -1, -1, 23, -1, -1, -1, -1]
    # No row has the tokens that a depth beyond its length needs.
    assert further_targets(targets, segments, 9)[0].tolist() == [-1] * 8


def loop(model, config, batch):
    """Nats of every depth, one document at a time, each depth on the positions that have the tokens it needs (equations
    21 to 24), one target at a time."""
    c, sums = config.model, [0.0] * config.model.prediction_layers
    matrix, table = np.asarray(model.output_matrix(), np.float64), np.asarray(model.embedding.table[...])
    graphdef, stacked = nnx.split(model.prediction)
    layers = [nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], stacked)) for i in range(c.prediction_layers)]
    run_model = nnx.jit(lambda model, ids: model(ids).hidden)
    run_block = nnx.jit(lambda block, x, ids: block(x, Call(make_rows(ids, None, None)))[0])
    for row in range(len(batch["tokens"])):
        for document in (1, 2):
            ids = batch["tokens"][row][batch["segment_ids"][row] == document][None]
            hidden = run_model(model, ids)
            for depth in range(1, c.prediction_layers + 1):
                layer = layers[depth - 1]
                length = ids.shape[1] - depth

                def norm(x, module):
                    x = np.asarray(x, np.float64)
                    return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * np.asarray(module.scale[...])

                embedded = table[ids[0, depth:]]
                joined = np.concatenate(
                    [norm(embedded, layer.embedding_norm), norm(hidden[0, :length], layer.hidden_norm)], -1
                )
                x = jnp.asarray(joined @ np.asarray(layer.project[...], np.float64), jnp.float32)[None]
                hidden = run_block(layer.block, x, ids[:, depth:])
                logits = norm(hidden[0], layer.output_norm) @ matrix
                for i in range(length - 1):
                    wanted = logits[i] - logits[i].max()
                    sums[depth - 1] -= wanted[ids[0, i + depth + 1]] - np.log(np.exp(wanted).sum())
    return sums


def test_losses_equal_those_of_a_loop(tmp_path):
    config = config_of(tmp_path, **{"model.num_layers": 1})
    model = random_model(config.model)
    batch = batch_of(np.random.default_rng(0), rows=2)
    expected = loop(model, config, batch)
    mesh = make_mesh(config.mesh, ONE)
    with jax.set_mesh(mesh):
        placed = place(batch, mesh)

        @jax.jit
        def sums(variables):
            merged = nnx.merge(nnx.graphdef(model), variables)
            output = forward(merged, placed, train=True)
            assert output.layers.expert_load.shape[0] == config.model.num_layers + 2
            found = NextToken().sums(config, merged, output, placed, None)
            return found.loss, found.cross_entropy, found.terms

        loss, cross_entropy, found = sums(nnx.state(model))
    terms = [float(found[f"cross_entropy_{depth}_further"]) for depth in (1, 2)]
    np.testing.assert_allclose(terms, expected, rtol=1e-5)
    # Equation 25: the weight over the number of depths, times the sum of their losses.
    np.testing.assert_allclose(float(loss - cross_entropy), 0.6 / 2 * sum(expected), rtol=1e-4)


def test_parts_and_layer_numbers_of_prediction_layers(tmp_path):
    model = config_of(tmp_path, BIASED).model
    assert stacked_layers(model, ("prediction", "block", "attention", "query")) == (range(2, 4), ("attention", "query"))
    assert part_of(("prediction", "project")) == "dense"
    biases = selection_biases(model, jnp.arange(16.0).reshape(4, 4))
    assert biases["prediction"]["block"]["moe"]["router"]["bias"].tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    with pytest.raises(ConfigError, match=r"model\.prediction_layers=1: must be 0 with model\.encoder_layers"):
        tiny(tmp_path, **{"model.prediction_layers": 1, "model.encoder_layers": 1, "data.input_length": 16})


def test_a_mesh_that_cannot_split_the_projection_is_refused(tmp_path):
    """The projection from 2 D to D is stored in parts of its D outputs over tensor: 18 / 4 is no whole number."""
    sizes = {"data": 2, "fsdp": 1, "expert": 1, "tensor": 4}
    heads = {"model.num_heads": 4, "model.num_kv_heads": 4}
    with pytest.raises(ConfigError, match=r"model\.d_model=18: must be divisible by mesh\.tensor = 4"):
        validate_mesh(config_of(tmp_path, **heads, **{"model.d_model": 18}), sizes)
    validate_mesh(config_of(tmp_path, **heads, **{"model.d_model": 20}), sizes)
    validate_mesh(config_of(tmp_path, **heads, **{"model.d_model": 18, "model.prediction_layers": 0}), sizes)


@pytest.mark.slow
def test_a_step_trains_the_layers_on_eight_devices(tmp_path):
    """Every parameter of the prediction layers moves, and logged terms are nats per target."""
    config = config_of(tmp_path, BIASED, **{"mesh.data": 2, "mesh.expert": 2, "mesh.tensor": 2})
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        state = program.init()
        before = jax.tree.map(np.asarray, (state.parameters["prediction"], state.biases["prediction"]))
        state, metrics = program.train_step(state, place(batch_of(np.random.default_rng(1)), mesh))
    after = (state.parameters["prediction"], state.biases["prediction"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after)
    ):
        assert leaf > 0, path
    assert 2 < float(metrics.terms["cross_entropy_2_further"]) < 8  # ln 400 = 6, for 5/7 of the targets
    assert metrics.layers.expert_load.shape[0] == 4


def published(tmp_path):
    """Write DeepSeek-V3's folder with a multi-token-prediction layer and, as in published ones, copies of the
    tables."""
    shutil.copytree(V3, tmp_path / "v3")
    tensors = load_file(tmp_path / "v3" / "model.safetensors")
    rng = np.random.default_rng(0)
    extra = {name.replace("layers.2.", "layers.3."): tensor for name, tensor in tensors.items() if "layers.2." in name}
    draws = {"eh_proj": (16, 32), "enorm": (16,), "hnorm": (16,), "shared_head.norm": (16,)}
    extra |= {f"model.layers.3.{n}.weight": rng.normal(size=s).astype(np.float32) for n, s in draws.items()}
    copies = {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}
    copied = {f"model.layers.3.{name}.weight": tensors[original] for name, original in copies.items()}
    save_file(tensors | extra | copied, tmp_path / "v3" / "model.safetensors")
    return tensors | extra


def test_published_layers_are_imported_and_exported_unchanged(tmp_path):
    tensors = published(tmp_path)
    config = import_checkpoint(tmp_path / "v3", tmp_path / "run", prediction=True)
    assert config.model.prediction_layers == 1
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    # They can be left out when the model is read.
    plain, _ = load_huggingface(tmp_path / "out")
    assert not hasattr(plain, "prediction")
    changed = load_file(tmp_path / "v3" / "model.safetensors")
    changed["model.layers.3.shared_head.head.weight"] += 1
    save_file(changed, tmp_path / "v3" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"shared_head\.head\.weight: differs from lm_head\.weight"):
        import_checkpoint(tmp_path / "v3", tmp_path / "again", prediction=True)
    with pytest.raises(ConfigError, match="holds no layer of multi-token prediction"):
        import_checkpoint(V3, tmp_path / "none", prediction=True)


@pytest.mark.parametrize("changes", [{}, slow_case({"model.sliding_window": 5})], ids=["full", "window"])
def test_speculated_text_is_the_greedy_text_in_fewer_steps(tmp_path, changes):
    """An untrained model's drafts are rejected; a model whose next token depends only on the last one confirms them."""
    config = config_of(tmp_path, **{"model.num_layers": 1, "model.prediction_layers": 1} | changes).model
    _, variables = random_parameters(config)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 40, length) for length in (1, 4, 7)]
    greedy = sampling.sample(config, variables, prompts, 12, sampling.Sampling(temperature=0))
    compiled = speculation._programs.cache_info().misses
    found = speculation.sample(config, variables, prompts, 12)
    for ours, theirs in zip(found.texts, greedy, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert found.accepted < 0.5
    stop = int(greedy[2][5])
    for ours, theirs in zip(speculation.sample(config, variables, prompts, 12, (stop,)).texts, greedy, strict=True):
        end = theirs.tolist().index(stop) + 1 if stop in theirs else len(theirs)
        np.testing.assert_array_equal(ours, theirs[:end])
    # Without the outputs of attention and experts, both see only the last token; the layer copies its embedding.
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.ones_like(leaf) if path[-1].key == "scale" else leaf, variables
    )
    for path in (("segment_0", "block_0"), ("prediction", "block")):
        block = variables[path[0]][path[1]]
        block["attention"]["out"] *= 0
        block["moe"]["experts"]["down"] *= 0
    variables["prediction"]["project"] = jnp.concatenate([jnp.eye(16), jnp.zeros((16, 16))])[None]
    certain = speculation.sample(config, variables, prompts, 12)
    assert certain.accepted == 1
    assert certain.steps == 6  # one token from the prompt, then two per step
    for ours, theirs in zip(
        certain.texts, sampling.sample(config, variables, prompts, 12, sampling.Sampling(temperature=0)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    none = speculation.sample(config, variables, prompts, 0)
    assert ([text.tolist() for text in none.texts], none.steps, none.accepted) == ([[], [], []], 0, 0.0)
    assert speculation._programs.cache_info().misses == compiled + 1  # all texts have the same sizes
    scaling = RopeScalingConfig(kind="dynamic", factor=2.0, original_length=8)
    with pytest.raises(ConfigError, match="'dynamic': must be another to draft tokens"):
        speculation.sample(dataclasses.replace(config, rope_scaling=scaling), variables, prompts, 2)
    with pytest.raises(ConfigError, match=r"model\.prediction_layers=0: must be at least 1"):
        speculation.sample(config_of(tmp_path, **{"model.prediction_layers": 0}).model, variables, prompts, 2)
