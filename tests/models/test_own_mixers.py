"""Token mixers from a user's module, docs/own_mixers.md: model.mixer=module:object."""

import dataclasses
import importlib
import json
import re
import shutil
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import (
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
    command_line,
    to_dict,
    validate_mesh,
)
from moe.config.changes import Changes, changes_of
from moe.config.files import inherited
from moe.config.mixers import GroupedQuery
from moe.config.parse import build, from_config_dict, from_workdir_dict
from moe.config.registry import find_mixer
from moe.config.user_code import user_code
from moe.interop.config_json import write_config
from moe.lab import identity
from moe.layers.inputs import Rows
from moe.layers.mixers.table import probe
from moe.models import flops, sampling, speculation
from moe.models.factory import abstract_parameters
from moe.models.segments import part_of
from moe.parallel import partition_specs
from moe.parallel.mesh import make_mesh
from moe.parallel.parameters import parameter_shardings
from moe.planner import fit
from moe.playground import supported
from moe.training.own_parts import probe_parts
from moe.training.train import train
from tests import run_helpers
from tests.helpers import random_parameters, tiny_model
from tests.models.test_generate import GREEDY, PROMPTS, _without_cache
from tests.tiny_text import build as build_text

PAGE = Path(__file__).resolve().parents[2] / "docs" / "own_mixers.md"


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """The module my_mixer of the page."""
    folder = tmp_path_factory.mktemp("mine")
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (folder / "my_mixer.py").write_text(block)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("my_mixer")
    sys.path.remove(str(folder))
    del sys.modules["my_mixer"]


@pytest.fixture
def small(guide):
    return guide.Linear(heads=2, dim=3)


def _model(mixer, **changes):
    return tiny_model(**{"mixer": mixer, "dispatch": "dropless", **changes})


def test_a_name_gives_the_mixer_and_a_section_its_fields(guide):
    assert find_mixer("my_mixer:Linear") == guide.Linear(name="my_mixer:Linear")
    assert find_mixer("my_mixer:NARROW").dim == 16
    chosen = build(ModelConfig, {"mixer": {"name": "my_mixer:NARROW", "heads": 8}}, "model.").mixer
    assert chosen == guide.Linear(heads=8, dim=16, name="my_mixer:NARROW")
    config = Config(model=ModelConfig(mixer=chosen))
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))).model == config.model
    assert build(ModelConfig, {"mixer": "none"}, "model.") == build(ModelConfig, {"mixer": None}, "model.")


def test_the_command_line_sets_a_name_and_fields(guide):
    words = ["--config.model.mixer=my_mixer:NARROW", "--config.model.mixer.heads=8", "run"]
    others, texts = command_line.split(words)
    base = str(PAGE.parents[1] / "configs" / "base.py")
    settings = command_line.layers(base, texts)
    assert others == ["run"]
    mixer = guide.Linear(heads=8, dim=16, name="my_mixer:NARROW")
    config = command_line.build_layers(*settings)
    assert config.model.mixer == mixer
    assert from_config_dict(changes_of(config)).model == config.model
    with pytest.raises(ConfigError, match=r"model.mixer.head: no such field; did you mean model.mixer.heads"):
        command_line.layers(base, command_line.split([words[0], "--config.model.mixer.head=8"])[1])
    with pytest.raises(ConfigError, match=r"model.mixer.heads='many': must be int"):
        command_line.layers(base, command_line.split([words[0], "--config.model.mixer.heads=many"])[1])


def test_a_config_file_sets_a_name_or_a_value(guide):
    changes = Changes({"model.mixer": "my_mixer:NARROW"})
    changes.model.mixer.heads = 8
    assert (changes.model.mixer.heads, changes.model.mixer.dim) == (8, 16)
    assert from_config_dict(changes).model.mixer == guide.Linear(heads=8, dim=16, name="my_mixer:NARROW")
    changes.model.mixer = guide.Linear(dim=2)
    assert from_config_dict(changes).model.mixer == guide.Linear(dim=2)


def test_a_checkpoint_gives_its_mixer_to_what_starts_from_it(guide, tmp_path):
    config = Config(model=ModelConfig(mixer=guide.Linear(heads=8, name="my_mixer:Linear")))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    settings = inherited({"start.checkpoint": str(tmp_path)})
    assert command_line.build_layers(settings).model == config.model
    # Another mixer takes none of its fields.
    narrow = {"model.mixer.dim": 2, "model.mixer": "my_mixer:NARROW"}
    assert command_line.build_layers(settings, narrow).model.mixer == guide.Linear(dim=2, name="my_mixer:NARROW")
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)).replace("my_mixer:", "their_mixer:"))
    with pytest.raises(ConfigError, match=r"model.mixer='their_mixer:Linear' is code .* --allow_module=their_mixer"):
        inherited({"start.checkpoint": str(tmp_path)})


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        ("my_mixer:Lienar", "module 'my_mixer' has no 'Lienar'; did you mean 'Linear'"),
        ("my_mixer:P", "model.mixer='my_mixer:P': must be a Mixer, not"),
        ({"name": "my_mixer:Linear", "dims": 2}, r"model.mixer.dims: no such field; did you mean model.mixer.dim"),
        ({"name": "my_mixer:Linear", "heads": 0}, "model.mixer.heads=0: must be at least 1"),
        ({"name": "none", "heads": 1}, "model.mixer.heads: no such field; model.mixer names no mixer"),
    ],
)
def test_what_is_no_mixer_is_refused(guide, mixer, message):
    with pytest.raises(ConfigError, match=message):
        build(ModelConfig, {"mixer": mixer}, "model.")


def test_a_workdir_imports_no_module_that_the_user_did_not_name(guide):
    tree = json.loads(json.dumps(to_dict(Config())))
    tree["model"]["mixer"] = {"name": "their_mixer:Linear"}
    with pytest.raises(ConfigError, match=r"model.mixer='their_mixer:Linear' is code .* --allow_module=their_mixer"):
        from_workdir_dict(tree)


def test_the_layer_is_the_recurrence_within_each_document(guide, small, rng):
    """y_t = φ(q_t)·Σ φ(k_u) v_uᵀ / φ(q_t)·Σ φ(k_u) over the tokens u ≤ t of its document, φ(z) = elu(z) + 1."""
    layer = guide.LinearLayer(ModelConfig(d_model=8), small, rngs=nnx.Rngs(0))
    x = rng.normal(size=(1, 5, 8)).astype(np.float32)
    ids = jnp.asarray([[1, 1, 1, 2, 2]])
    heads, _ = jax.jit(layer.prefill)(jnp.asarray(x), Rows(ids, ids, ids))
    query, key, value = (np.asarray(w[...], np.float64) for w in (layer.query, layer.key, layer.value))

    def phi(z):
        return np.where(z > 0, z + 1, np.exp(z))

    for n in range(2):
        for first, last in ((0, 3), (3, 5)):
            memory, total = np.zeros((3, 3)), np.zeros(3)
            for t in range(first, last):
                k = phi(x[0, t] @ key[:, n])
                memory, total, q = memory + np.outer(k, x[0, t] @ value[:, n]), total + k, phi(x[0, t] @ query[:, n])
                np.testing.assert_allclose(heads[0, t, n], q @ memory / (q @ total), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("jnp.tril(same)", "same", "depends on later tokens"),
        (
            "rows.segment_ids[:, :, None] == rows.segment_ids[:, None]",
            "jnp.ones((len(x), *2 * x.shape[1:2]), bool)",
            "doc",
        ),
        (
            "return heads.astype(x.dtype), (",
            "return (heads - heads.mean(0)).astype(x.dtype), (",
            "depends on other rows",
        ),
        ("key = jnp.where(rows.segment_ids[..., None, None] > 0, key, 0)", "pass", "prefill and step give a token"),
        ("return heads[:, None].astype", "return 2 * heads[:, None].astype", "prefill and step give a token that is"),
    ],
)
def test_a_layer_that_mixes_what_it_may_not_is_refused(guide, old, new, message):
    code = Path(guide.__file__).read_text()
    assert old in code
    module = types.ModuleType("wrong_mixer")
    sys.modules["wrong_mixer"] = module  # dataclasses look it up
    exec(code.replace(old, new), module.__dict__)
    config = Config(model=ModelConfig(vocab_size=32, d_model=8, num_layers=1, mixer=module.Linear(heads=2, dim=3)))
    with pytest.raises(ConfigError, match=f"model.mixer='wrong_mixer:Linear': .*{message}"):
        probe_parts(config)
    del sys.modules["wrong_mixer"]


def test_the_layer_of_the_guide_mixes_what_it_may(small):
    probe_parts(Config(model=ModelConfig(vocab_size=32, d_model=8, num_layers=1, mixer=small)))


def test_greedy_text_with_its_state_equals_that_without(small):
    """Layers of the mixer and of attention in one model."""
    config = _model(small, vocab_size=48, pattern="mixer attention", num_layers=2, gate="none")
    _, variables = random_parameters(config)
    variables = jax.tree.map(lambda leaf: 2 * leaf, variables)
    texts = sampling.sample(config, variables, PROMPTS, 6, GREEDY)
    np.testing.assert_array_equal(texts, _without_cache(config, variables, PROMPTS, 6))


def test_a_mesh_splits_it_and_computes_the_same(small, rng):
    config = _model(small, vocab_size=48, num_layers=1, gate="none")
    graphdef, parameters = random_parameters(config)
    tokens = jnp.asarray(rng.integers(1, 48, (4, 6)), jnp.int32)
    program = jax.jit(lambda parameters, tokens: nnx.merge(graphdef, parameters)(tokens).logits)
    want = program(parameters, tokens)
    state = nnx.state(nnx.eval_shape(lambda: nnx.merge(graphdef, parameters)))
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))):
        mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
        placed = jax.device_put(parameters, parameter_shardings(mesh, state))
        query = placed["segment_0"]["block_0"]["mixer"]["query"]
        assert query.sharding.shard_shape(query.shape) == (1, 4, 1, 3)  # [L,D,N,H]: D over fsdp, N over tensor
        rows = jax.device_put(tokens, partition_specs.shardings(mesh, partition_specs.BATCH))
        np.testing.assert_allclose(program(placed, rows), want, rtol=1e-4, atol=1e-5)


def test_it_is_counted_and_estimated(small):
    """12·N·H² beyond 6 for each parameter: 216 for 2 heads of 3, in each of two layers."""
    config = _model(small, num_layers=2, tie_embeddings=True)
    _, active = flops.count_parameters(config)
    assert flops.train_flops_per_token(config, 16) == 6 * active + 2 * 216
    one, two = (
        fit.estimate(
            Config(model=_model(dataclasses.replace(small, heads=heads), remat="attention", num_layers=2)),
            {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1},
            "gpu",
        ).kept
        for heads in (2, 4)
    )
    # 2 layers of 8 rows of 256 float32 tokens: 4 arrays (queries, keys, values, heads) of 2 further heads of 3
    assert two - one == 2 * 8 * 256 * 4 * 4 * 2 * 3


def test_it_trains_resumes_and_is_found_in_the_workdir(guide, tmp_path):
    directory = build_text(tmp_path / "data")
    named = dataclasses.replace(find_mixer("my_mixer:Linear"), heads=2, dim=4)  # names the module
    config = run_helpers.tiny(
        directory, **run_helpers.SETTINGS | {"model.moe.gate": "none", "train.num_steps": 4, "train.eval_every": 4}
    )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, mixer=named))
    workdir, programs = tmp_path / "run", run_helpers.compile_once()
    train(config, str(workdir), run_helpers.ONE, make_program=programs)
    stored = json.loads((workdir / "config.json").read_text())["model"]["mixer"]
    assert stored == {"name": "my_mixer:Linear", "heads": 2, "dim": 4}
    rows = (workdir / "metrics.jsonl").read_bytes()
    shutil.rmtree(workdir / "checkpoints" / "4")
    train(config, str(workdir), run_helpers.ONE, make_program=programs)  # from step 2
    assert (workdir / "metrics.jsonl").read_bytes() == rows


def test_records_of_a_suite_name_its_fields_and_its_code(guide):
    named = guide.Linear(heads=8, name="my_mixer:Linear")
    config = Config(model=ModelConfig(mixer=named))
    assert identity.canonical(config)["mixer"] == {"name": "my_mixer:Linear", "heads": 8, "dim": 32}
    assert identity.canonical(config)["code"] == user_code(config) != user_code(Config())


def test_its_parameters_belong_to_attention(small):
    parameters = abstract_parameters(_model(small))
    names = {
        tuple(key.key for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(parameters))
        if any(key.key == "mixer" for key in path)
    }
    assert {name[-1] for name in names} == {"query", "key", "value", "out"}
    assert set(map(part_of, names)) == {"attention"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_layers": 1}, "model.encoder_layers=1: must be 0 where model.mixer="),
        ({"relative_buckets": 8}, "model.relative_buckets=8: must be 0 where model.mixer="),
        ({"sliding_window": 4}, "model.sliding_window=4: must be 0 where model.mixer=.* is in all layers"),
        ({"pattern": "attention"}, "model.mixer=.*: is in no layer of model.pattern='attention'"),
        ({"mixer": None, "pattern": "mixer"}, "model.pattern='mixer': needs model.mixer"),
    ],
)
def test_impossible_settings(small, changes, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{"mixer": small, **changes})


def test_what_it_does_not_support_is_refused_by_name(small):
    name = re.escape(repr(small.name))
    model = _model(small)
    with pytest.raises(ConfigError, match=f"model.mixer={name}: must be None where data.objective is prefix_lm"):
        Config(model=model, data=DataConfig(objective="prefix_lm"))
    with pytest.raises(ConfigError, match=f"model.mixer={name}: must be None to draft tokens"):
        speculation.sample(_model(small, prediction_layers=1), {}, [[1]], 2)
    config = Config(model=model, train=TrainConfig(batch_size=4))
    dense = Config(model=_model(small, gate="none"), train=TrainConfig(batch_size=1))
    sizes = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
    with pytest.raises(ConfigError, match=f"model.mixer={name}: must be None with mesh.context=4"):
        validate_mesh(dense, sizes | {"context": 4})
    with pytest.raises(ConfigError, match=r"model\.mixer\.heads=2: must be divisible by mesh\.tensor = 4"):
        validate_mesh(config, sizes | {"tensor": 4})
    with pytest.raises(ConfigError, match=r"no open architecture computes this model: .* lacks .*model\.mixer"):
        write_config(config)
    with pytest.raises(ConfigError, match=r"model.mixer=.*the page supports only None"):
        supported.check(model)


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        ("join", lambda self, heads, x: heads, r"output after prefill=.*must be float32\[2, 8, 16\]"),
        ("step", lambda self, x, rows, state: (jnp.zeros((2, 1, 2, 3)), state[:1]), "its state=.*must stay"),
        ("step", lambda self, x, rows, state: 1 / 0, "it raises ZeroDivisionError"),
        ("prefill", lambda self, x, rows, drop=None: sys.exit(0), "it raises ImportError: it calls sys.exit"),
    ],
)
def test_a_layer_of_other_shapes_is_refused_before_a_run(guide, small, monkeypatch, method, wrong, message):
    model = _model(small)
    probe(model, small)
    monkeypatch.setattr(guide.LinearLayer, method, wrong)
    with pytest.raises(ConfigError, match=f"model.mixer=.*{message}"):
        probe(model, small)


def test_a_mixer_without_costs_or_a_layer_is_refused(guide, small):
    class Free(guide.Linear):
        flops = guide.Mixer.flops

    with pytest.raises(ConfigError, match=r"Free has no method flops\(length\)"):
        probe(_model(Free(heads=2, dim=3)), Free(heads=2, dim=3))

    class Layerless(guide.Linear):
        layer = None

    with pytest.raises(ConfigError, match=r"its layer=None: must be a class derived from moe\.MixerLayer"):
        probe(_model(small), Layerless())


def test_a_mixer_of_the_package_can_be_subclassed():
    class Narrow(GroupedQuery):
        pass

    probe(ModelConfig(d_model=16), Narrow(heads=2, kv_heads=1, head_dim=4))
