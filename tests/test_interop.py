"""Open checkpoints: outputs equal Hugging Face transformers', and an export of an import is the same bit for bit.

Reference values were computed in float32 by transformers, for random wide weights: in tests/data, and in
../shared/parity where that exists. DeepSeekMoE v1 is not in that library; its values come from its published formulas
with the library's modules.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from moe.checkpoints.parameters import read_parameters
from moe.checkpoints.workdir import read_config
from moe.config import Config, ConfigError, MeshConfig, ModelConfig, MoEConfig, layer_kinds, sparse_layers
from moe.interop import (
    export_checkpoint,
    import_checkpoint,
    load_balancing_loss,
    load_huggingface,
    save_huggingface,
)
from moe.interop.config_json import read_config as read_open_config
from moe.interop.config_json import write_config
from moe.interop.families import FAMILIES
from moe.models.decoder import Transformer
from moe.parallel.mesh import make_mesh
from moe.routing.resolve import resolve
from moe.training.losses import cross_entropy

HERE = Path(__file__).parent / "data" / "checkpoints"
SHARED = Path(__file__).parents[1].parent / "shared" / "parity"
OURS = [HERE / name for name in ("mistral", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek")]
THEIRS = [SHARED / name for name in ("mistral", "mixtral", "olmoe", "qwen3_moe")]
CASES = [pytest.param(path, id=f"{path.parent.name}-{path.name}") for path in OURS + THEIRS]


def _expected(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        pytest.skip(f"no reference models at {path}")
    with np.load(path / "expected.npz") as file:
        return dict(file)


def _relative(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())


def _tensors(folder: Path) -> dict[str, tuple[str, bytes]]:
    """name → (dtype and shape, bytes)."""
    result = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                result[name] = (f"{tensor.dtype}{tensor.shape}", tensor.tobytes())
    return result


@pytest.fixture
def editable(tmp_path):
    """A copy of the mixtral case: (folder, change(tensors) rewrites its file, configure(fields) its config.json)."""
    folder = tmp_path / "mixtral"
    shutil.copytree(HERE / "mixtral", folder)

    def change(edit):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    def configure(**fields):
        source = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**source, **fields}))

    return folder, change, configure


# --- Parity ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", CASES)
def test_parity(path):
    expected = _expected(path)
    model, config = load_huggingface(path)
    output = jax.jit(lambda tokens: model(tokens, return_routing=True))(expected["input_ids"].astype(np.int32))
    assert _relative(output.logits, expected["logits"]) < 2e-5

    names = [name for name in expected if name.startswith("router_logits_")]
    assert len(names) == sum(sparse_layers(config.model))
    targets = np.concatenate([expected["input_ids"][:, 1:], np.full((len(output.logits), 1), -1)], axis=1)
    nll, count = cross_entropy(output.logits, targets)
    loss = nll / count
    if names:
        # [L,G,S,E] → [L,G·S,E]
        ours = np.asarray(output.routing.router_logits).reshape(len(names), -1, config.model.moe.num_experts)
        assert _relative(ours, np.stack([expected[name] for name in names])) < 2e-5
        auxiliary = load_balancing_loss(output.routing)
        np.testing.assert_allclose(auxiliary, expected["aux_loss"], rtol=1e-5)
        moe = config.model.moe
        loss += moe.load_balancing_weight * len(names) / moe.experts_per_token * auxiliary
        assert not np.any(output.layers.fraction_tokens_dropped)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in OURS])
def test_parameters_keep_the_dtype_of_their_tensors(path):
    stored = json.loads((path / "config.json").read_text())
    model, _ = load_huggingface(path)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model)} == {stored.get("dtype", stored.get("torch_dtype"))}


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=2, expert=2), MeshConfig(data=1, expert=2, tensor=4)])
def test_each_device_reads_its_shard(mesh, tmp_path):
    moe = MoEConfig(num_experts=4, d_ff=12, shared_d_ff=20, shared_gate=True, dispatch="dropless")
    model = ModelConfig(
        **{"vocab_size": 48, "d_model": 16, "num_heads": 8, "num_kv_heads": 4, "head_dim": 6, "num_layers": 2},
        **{"attention_bias": "qkv", "d_ff": 20, "moe": moe},
    )
    config = resolve(Config(model=model))
    original = Transformer(config.model, rngs=nnx.Rngs(0))
    save_huggingface(original, config, tmp_path)
    tokens = np.arange(8 * 10).reshape(8, 10) % 48
    want = jax.jit(lambda t: original(t).logits)(tokens)
    devices = make_mesh(mesh)
    with jax.set_mesh(devices):
        loaded, _ = load_huggingface(tmp_path, mesh=devices)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(original), nnx.state(loaded))
        up = loaded.segment_0.block_0.moe.experts.up[...]
        assert up.sharding.shard_shape(up.shape)[1] == 2
        np.testing.assert_allclose(jax.jit(lambda t: loaded(t).logits)(tokens), want, rtol=1e-4, atol=1e-4)


# --- Export -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("path", "max_shard_bytes"),
    [pytest.param(path, 8000, id=f"{path.name}-sharded") for path in OURS]
    + [pytest.param(path, 1 << 30, id=f"{path.name}-one file") for path in THEIRS],
)
def test_round_trip_is_bit_identical(path, max_shard_bytes, tmp_path):
    _expected(path)
    model, config = load_huggingface(path)
    save_huggingface(model, config, tmp_path, max_shard_bytes=max_shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_bytes == 8000)
    assert _tensors(tmp_path) == _tensors(path)
    again, config_again = load_huggingface(tmp_path)
    assert config_again == config
    jax.tree.map(np.testing.assert_array_equal, again, model)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == path.name


def test_a_model_that_no_family_expresses_is_refused(tmp_path):
    def refused(pattern: str, **changes):
        moe = changes.pop("moe", {})
        model = ModelConfig(**{"num_layers": 2, **changes}, moe=MoEConfig(**moe))
        with pytest.raises(ConfigError, match=pattern):
            write_config(resolve(Config(model=model)))

    refused(r"mixtral lacks model\.sliding_window", sliding_window=8, sliding_window_layers=(1,))
    refused(
        r"mixtral lacks model\.qk_norm.*qwen3_moe lacks model\.moe\.shared_d_ff", qk_norm="head", moe={"shared_d_ff": 8}
    )
    refused(r"olmoe lacks model\.activation", activation="relu")
    refused(r"mixtral lacks model\.moe\.gate", moe={"gate": "dense_mixture"})
    refused(r"olmoe lacks .*model\.moe\.gate", moe={"gate": "deepseek_moe", "routing_scale": 2.0})
    with pytest.raises(ConfigError, match=r"model_type='gpt'"):
        write_config(resolve(Config()), "gpt")


def test_weights_are_never_overwritten(tmp_path):
    model, config = load_huggingface(HERE / "mistral")
    save_huggingface(model, config, tmp_path)
    with pytest.raises(ConfigError, match="holds weights already"):
        save_huggingface(model, config, tmp_path)


# --- Malformed folders ----------------------------------------------------------------------------------------------
EXPERT = "model.layers.1.block_sparse_moe.experts.4.w2.weight"


def test_missing_surplus_and_misshapen_tensors_are_named(editable):
    folder, change, _ = editable
    change(lambda tensors: tensors.update({"model.extra": tensors.pop(EXPERT)}))
    with pytest.raises(ConfigError, match=rf"missing {EXPERT}; surplus model\.extra"):
        load_huggingface(folder)
    change(lambda tensors: tensors.update({EXPERT: tensors.pop("model.extra").T.copy()}))
    with pytest.raises(ConfigError, match=rf"{EXPERT} has shape \[20, 16\], config\.json asks for \[16, 20\]"):
        load_huggingface(folder)


def test_a_tensor_of_another_type_is_named(editable):
    folder, change, _ = editable
    change(lambda tensors: tensors.update({EXPERT: tensors[EXPERT].astype(ml_dtypes.float8_e4m3fn)}))
    with pytest.raises(ConfigError, match=rf"{EXPERT}: is F8_E4M3"):
        load_huggingface(folder)


def test_mixed_types_become_float32_without_loss(editable):
    folder, change, _ = editable
    before, _ = load_huggingface(folder)
    change(lambda tensors: tensors.update({EXPERT: tensors[EXPERT].astype(np.float32)}))
    after, _ = load_huggingface(folder)
    assert after.segment_0.block_0.moe.experts.down.dtype == np.float32
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float32(a), np.float32(b)), before, after)


def test_old_buffers_and_a_tied_copy_are_accepted(tmp_path):
    folder = tmp_path / "mistral"
    shutil.copytree(HERE / "mistral", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors")
    load_huggingface(folder)
    tensors["lm_head.weight"][3, 2] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lm_head\.weight: differs from model\.embed_tokens\.weight"):
        load_huggingface(folder)


def test_damaged_folders(editable, tmp_path):
    folder, _, _ = editable
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        load_huggingface(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors: damaged"):
        load_huggingface(folder)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled weights are not read"):
        load_huggingface(folder)


def test_an_index_must_agree_with_its_files(tmp_path):
    model, config = load_huggingface(HERE / "mistral")
    save_huggingface(model, config, tmp_path, max_shard_bytes=8000)
    index = tmp_path / "model.safetensors.index.json"
    original = json.loads(index.read_text())

    def refused(pattern, edit):
        changed = json.loads(json.dumps(original))
        edit(changed["weight_map"])
        index.write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=pattern):
            load_huggingface(tmp_path)

    refused(r"does not list model\.norm\.weight", lambda names: names.pop("model.norm.weight"))
    refused(r"x is not in", lambda names: names.update(x=names["model.norm.weight"]))
    refused("absent.safetensors: no such file", lambda names: names.update(x="absent.safetensors"))


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2': must be one of mistral, mixtral"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_type='yarn': scaled rotary positions"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type='llama3'"),
        ({"hidden_act": "mish"}, "hidden_act='mish': must be 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not read"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"hidden_size": "16"}, "hidden_size='16': must be a valid integer"),
        ({"num_key_value_heads": 3}, r"model\.num_kv_heads=3: must divide"),
        ({"num_experts_per_tok": 9}, r"model\.moe\.experts_per_token=9"),
    ],
)
def test_settings_that_are_refused(editable, fields, pattern):
    folder, _, configure = editable
    configure(**fields)
    with pytest.raises(ConfigError, match=pattern):
        load_huggingface(folder)


# --- config.json -----------------------------------------------------------------------------------------------------
def test_published_config_of_mixtral():
    """The published file has no head_dim and keeps rope_theta at the top level."""
    model = read_open_config(
        {
            **{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 32000},
            **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
            **{"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-05},
            **{"rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None, "hidden_act": "silu"},
            **{"max_position_embeddings": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
        }
    ).model
    assert (model.head_dim, model.rope_theta, model.sliding_window, model.moe.d_ff) == (128, 1e6, 0, 14336)
    # 0.02 · 2 at balance, as the sum of 32 layers' losses of 1.
    assert model.moe.load_balancing_weight == pytest.approx(0.02 * 2 / 32)


def test_layers_of_qwen():
    """decoder_sparse_step 2 of 6 layers: 1, 3, 5; without 3. Windows: even layers below max_window_layers."""
    source = json.loads((HERE / "qwen2_moe" / "config.json").read_text())
    source |= {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3], "max_window_layers": 3}
    del source["layer_types"]
    kinds = layer_kinds(read_open_config(source).model)
    assert [kind.sparse for kind in kinds] == [False, True, False, False, False, True]
    assert [kind.window for kind in kinds] == [6, 0, 6, 0, 0, 0]


def test_every_family_has_a_case():
    assert {path.name for path in OURS} == set(FAMILIES)


# --- Workdirs ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in (OURS[0], OURS[3])])
def test_import_then_export(path, tmp_path):
    (tmp_path / "source").mkdir()
    for file in path.iterdir():
        shutil.copy(file, tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    config = import_checkpoint(tmp_path / "source", tmp_path / "run")
    assert read_config(tmp_path / "run") == config
    model, _ = load_huggingface(path)
    stored = read_parameters(tmp_path / "run", config.model)
    jax.tree.map(np.testing.assert_array_equal, stored, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert _tensors(tmp_path / "out") == _tensors(path)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    ids = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": json.loads((path / "config.json").read_text()).get("pad_token_id"),
    }
    for name in ("config.json", "generation_config.json"):
        assert ids.items() <= json.loads((tmp_path / "out" / name).read_text()).items()
    with pytest.raises(ConfigError, match="holds checkpoints already"):
        import_checkpoint(tmp_path / "source", tmp_path / "run")


def test_reading_parameters_onto_a_mesh(tmp_path):
    config = import_checkpoint(HERE / "qwen2_moe", tmp_path)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    one = read_parameters(tmp_path, config.model)
    many = read_parameters(tmp_path, config.model, mesh, dtype=np.float32)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float32(a), b), one, many)
    up = many["segment_0"]["block_0"]["moe"]["experts"]["up"]
    assert up.dtype == np.float32
    assert up.sharding.shard_shape(up.shape)[2] == config.model.d_model // 4


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    config = import_checkpoint(HERE / "mixtral", tmp_path)
    other = dataclasses.replace(config.model, d_ff=24, moe=dataclasses.replace(config.model.moe, d_ff=24))
    with pytest.raises(
        ConfigError, match=r"holds another model: .*experts\.down is \(2, 5, 20, 16\) there, \(2, 5, 24"
    ):
        read_parameters(tmp_path, other)
    with pytest.raises(ConfigError, match="holds no checkpoint of step 3"):
        read_parameters(tmp_path, config.model, step=3)
    with pytest.raises(ConfigError, match="holds no checkpoints"):
        read_parameters(tmp_path / "absent", config.model)


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in OURS[:5]])
@pytest.mark.transformers
def test_an_export_loads_in_that_library_without_a_warning(path, tmp_path):
    """Needs torch and transformers 5: python -m pytest -m transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import_checkpoint(path, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    told = io.StringIO()
    transformers.utils.logging.add_handler(logging.StreamHandler(told))
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values())
    tokens = torch.tensor(_expected(path)["input_ids"])
    assert _relative(model(tokens).logits.detach().numpy(), _expected(path)["logits"]) < 2e-5
    assert model.generate(tokens[:, :6], max_new_tokens=3, do_sample=False).shape[1] > 6
    assert told.getvalue() == ""
