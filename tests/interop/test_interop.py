"""Open checkpoints: outputs equal Hugging Face transformers', and an export of an import is the same bit for bit.

Reference values were computed in float32 by transformers, for random wide weights: in tests/data, and in
../shared/parity where that exists. DeepSeekMoE v1 is not in that library; its values come from its published formulas
with the library's modules.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import logging
import os
import shutil
import stat
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from moe.checkpoints.parameters import read_parameters, read_variables
from moe.checkpoints.workdir import read_config
from moe.config import Capacity, Config, ConfigError, MeshConfig, ModelConfig, MoEConfig, sparse_layers, to_dict
from moe.interop import (
    balance,
    export_checkpoint,
    import_checkpoint,
    load_balancing_loss,
    load_huggingface,
    save,
    save_huggingface,
    workdirs,
)
from moe.interop.config_json import read_config as read_open_config
from moe.interop.families import FAMILIES
from moe.interop.tensor_files import TensorWriter
from moe.models.decoder import Transformer
from moe.models.factory import Model, abstract_model
from moe.parallel.mesh import make_mesh
from moe.training.losses import cross_entropy
from tests.helpers import slow_case

HERE = Path(__file__).parents[1] / "data" / "checkpoints"
SHARED = Path(__file__).parents[2].parent / "shared" / "parity"
_OURS = (
    *("mistral", "llama", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek", "deepseek_v2", "deepseek_v3"),
    *("glm4_moe", "gpt_oss", "llama_dynamic", "llama_longrope"),
    *("qwen2", "qwen3", "kimi_k2", "dots1", "glm4_moe_lite", "minimax_m2", "ernie4_5_moe"),
    *("flex_olmo", "hunyuan_v1_moe", "granitemoe", "granitemoeshared"),
    *("qwen3_next", "qwen3_5_moe_text", "phimoe", "solar_open", "sarvam_moe", "hy_v3", "sarvam_mla"),
    *("exaone_moe", "flint", "afmoe", "mellum", "granitemoe_swa", "kolibri1", "lara_mini"),
    *("mistral4", "ministral3"),
)
OURS = [HERE / name for name in _OURS]
_DENSE = ("mistral", "llama", "llama_dynamic", "llama_longrope", "qwen2", "qwen3", "ministral3")
MOE = [path for path in OURS if path.name not in (*_DENSE, "granitemoe", "granitemoeshared", "granitemoe_swa")]
_THEIRS = (
    *("mistral", "llama", "mixtral", "mixtral_fused", "olmoe", "qwen3_moe", "deepseek_v2_lite", "deepseek_v3"),
    "gpt_oss",
)
THEIRS = [SHARED / name for name in _THEIRS]
#: Family of an export that names none, where it differs from the import's: a Llama is a Mistral without a window.
WRITTEN_AS = {
    SHARED / "mixtral_fused": "mixtral",
    **dict.fromkeys((SHARED / "llama", HERE / "llama_dynamic", HERE / "llama_longrope"), "mistral"),
    SHARED / "deepseek_v2_lite": "deepseek_v2",
    HERE / "kimi_k2": "deepseek_v3",
    HERE / "sarvam_mla": "deepseek_v3",
    HERE / "solar_open": "glm4_moe",
}
#: Families that compute what an earlier one computes, with other names of tensors.
_OTHER_TENSORS = ("qwen3_5_moe_text", "sarvam_moe", "hy_v3")
#: Cases whose equations other folders of tests/data cover too, as they do those of ../shared; their tensors and configs
#: are read and written by all tests.
_AGAIN = [
    HERE / name
    for name in (
        *("kimi_k2", "sarvam_mla"),  # glm4_moe_lite
        *("llama", "granitemoe", "granitemoe_swa"),  # mistral, granitemoeshared, and mellum's windows
        *("solar_open", "dots1"),  # glm4_moe, and exaone_moe's groups and windows
        *_OTHER_TENSORS,  # qwen3_next, exaone_moe, glm4_moe
    )
]
CASES = [pytest.param(path, id=path.name) for path in OURS if path not in _AGAIN] + [
    slow_case(path, id=f"{path.parent.name}-{path.name}") for path in [*THEIRS, *_AGAIN]
]


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


# --- Parity ----------------------------------------------------------------------------------------------------------
def test_an_export_is_of_one_checkpoint(tmp_path, monkeypatch):
    """Its tensors are read one after another; the run saves a further checkpoint meanwhile."""
    import_checkpoint(HERE / "mistral", tmp_path / "run")
    checkpoints, read, seen = tmp_path / "run" / "checkpoints", workdirs.stored.read_parameters, []

    def read_and_save(*args, **options):
        tree = read(*args, **options)
        seen.append(options["step"])
        if len(seen) == 3:
            shutil.copytree(checkpoints / "0", checkpoints / "1")
        return tree

    monkeypatch.setattr(workdirs.stored, "read_parameters", read_and_save)
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert len(seen) > 3
    assert set(seen) == {0}


def test_selection_biases_do_not_set_the_dtype_of_an_export(tmp_path):
    """DeepSeek-V3 is published in bfloat16 with biases in float32."""
    source = tmp_path / "source"
    shutil.copytree(HERE / "deepseek_v3", source)
    fields = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(fields))
    tensors = load_file(source / "model.safetensors")
    halved = {name: t if "e_score" in name else t.astype(ml_dtypes.bfloat16) for name, t in tensors.items()}
    save_file(halved, source / "model.safetensors")
    import_checkpoint(source, tmp_path / "run")
    for name, dtype in (("out", ""), ("cast", "bfloat16")):
        export_checkpoint(tmp_path / "run", tmp_path / name, dtype=dtype)
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == "bfloat16"


def test_selection_biases_in_bfloat16_come_back_bit_for_bit(tmp_path):
    """They are float32 in the run; trained ones stay that where bfloat16 does not hold their values."""
    source = tmp_path / "source"
    shutil.copytree(HERE / "deepseek_v3", source)
    tensors = load_file(source / "model.safetensors")
    save_file({name: t.astype(ml_dtypes.bfloat16) for name, t in tensors.items()}, source / "model.safetensors")
    import_checkpoint(source, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert _tensors(tmp_path / "out") == _tensors(source)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    trained = np.float32([[0.5, 1 + 2**-10]])
    assert workdirs._as_imported(trained, "bfloat16").dtype == np.float32
    assert workdirs._as_imported(trained[:, :1], "bfloat16").dtype == ml_dtypes.bfloat16


def test_an_export_in_float16_of_a_larger_number_is_refused(tmp_path):
    """The largest float16 is 65,504; the number would be exported as infinity."""
    source = tmp_path / "source"
    shutil.copytree(HERE / "llama", source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 70_000
    save_file(tensors, source / "model.safetensors")
    import_checkpoint(source, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"model\.norm\.weight: holds numbers that float16 does not; use bfloat16"):
        export_checkpoint(tmp_path / "run", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    export_checkpoint(tmp_path / "run", tmp_path / "wider", dtype="bfloat16")


@pytest.mark.parametrize("path", CASES)
def test_parity(path):
    check_parity(path)


def _by_einsum(model: Model) -> Model:
    """The model with the dispatch that compiles fastest and capacity for every token, where all modes are equal."""
    moe = model.config.moe
    if moe.gate is None:
        return model
    moe = dataclasses.replace(moe, dispatch="einsum", capacity=Capacity(eval=float(moe.num_experts)))
    abstract = abstract_model(dataclasses.replace(model.config, moe=moe))
    return nnx.merge(nnx.graphdef(abstract), nnx.to_pure_dict(nnx.state(model)))


def check_parity(path: Path) -> None:
    """Compare logits, router logits and losses of a folder with its expected.npz."""
    expected = _expected(path)
    model, config = load_huggingface(path)
    model = _by_einsum(model)
    ids = expected["input_ids"].astype(np.int32)
    targets = np.concatenate([ids[:, 1:], np.full((len(ids), 1), -1)], axis=1)

    @jax.jit
    def run(tokens):
        """Without further outputs, which would be a third of the program."""
        output = model(tokens, return_routing=True)
        nll, count = cross_entropy(output.logits, targets)
        auxiliary = load_balancing_loss(output.routing) if "aux_loss" in expected else None
        routers = output.routing and output.routing.router_logits
        return output.logits, routers, output.layers and output.layers.fraction_tokens_dropped, nll / count, auxiliary

    logits, routers, dropped, loss, auxiliary = run(ids)
    assert _relative(logits, expected["logits"]) < 2e-5
    names = [name for name in expected if name.startswith("router_")]
    assert len(names) == sum(sparse_layers(config.model))
    if names:
        # [L,G,S,E] → [L,G·S,E]
        ours = np.asarray(routers).reshape(len(names), -1, config.model.moe.num_experts)
        assert _relative(ours, np.stack([expected[name] for name in names])) < 2e-5
        assert not np.any(dropped)
    if "aux_loss" in expected:
        np.testing.assert_allclose(auxiliary, expected["aux_loss"], rtol=1e-5)
        family = FAMILIES[json.loads((path / "config.json").read_text())["model_type"]]
        loss += balance.coefficient_there(family, config.model) * auxiliary
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=2, expert=2), MeshConfig(data=1, expert=2, tensor=4)])
@pytest.mark.slow
def test_each_device_reads_its_shard(mesh, tmp_path):
    moe = MoEConfig(num_experts=4, d_ff=12, shared_d_ff=20, shared_gate=True, dispatch="dropless")
    model = ModelConfig(
        **{"vocab_size": 48, "d_model": 16, "num_heads": 8, "num_kv_heads": 4, "head_dim": 6, "num_layers": 2},
        **{"attention_bias": "qkv", "d_ff": 20, "moe": moe},
    )
    config = Config(model=model)
    original = Transformer(config.model, rngs=nnx.Rngs(0))
    save_huggingface(original, config, tmp_path)
    tokens = np.arange(8 * 10).reshape(8, 10) % 48
    want = jax.jit(lambda t: original(t).logits)(tokens)
    devices = make_mesh(mesh)
    loaded, _ = load_huggingface(tmp_path, mesh=devices)
    with jax.set_mesh(devices):
        jax.tree.map(np.testing.assert_array_equal, nnx.state(original), nnx.state(loaded))
        up = loaded.segment_0.block_0.moe.experts.up[...]
        assert up.sharding.shard_shape(up.shape)[1] == 2
        np.testing.assert_allclose(jax.jit(lambda t: loaded(t).logits)(tokens), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"model\.moe\.num_experts=4: must be divisible by mesh\.expert = 8"):
        load_huggingface(tmp_path, mesh=make_mesh(MeshConfig(data=1, expert=8)))


# --- Export -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("path", "max_shard_bytes"),
    [pytest.param(path, 8000, id=f"{path.name}-sharded") for path in OURS]
    + [slow_case(path, 1 << 30, id=f"{path.name}-one file") for path in THEIRS],
)
def test_round_trip_is_bit_identical(path, max_shard_bytes, tmp_path):
    _expected(path)
    model, config = load_huggingface(path)
    source = json.loads((path / "config.json").read_text())
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model)} == {source.get("dtype", source.get("torch_dtype"))}
    fused = path.name.endswith("_fused")
    kind = path.name if path.name in _OTHER_TENSORS else ""
    save_huggingface(model, config, tmp_path, model_type=kind, max_shard_bytes=max_shard_bytes, fused=fused)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_bytes == 8000)
    assert _tensors(tmp_path) == _tensors(path)
    again, config_again = load_huggingface(tmp_path)
    assert config_again == config
    jax.tree.map(np.testing.assert_array_equal, again, model)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == WRITTEN_AS.get(path, path.name)


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in MOE])
def test_the_fused_layout_of_every_family(path, tmp_path):
    model, config = load_huggingface(path)
    save_huggingface(model, config, tmp_path, model_type=path.name, fused=True)
    names = _tensors(tmp_path)
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in names)
    assert not any(".experts.0." in name for name in names)
    again, _ = load_huggingface(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again, model)


@pytest.mark.parametrize("prefix", ["block_sparse_moe.gate", "block_sparse_moe."])
def test_fused_experts_under_the_older_names_of_mixtral(prefix, tmp_path):
    """A fused file in which the router, or all of the block, has the name from before the library renamed it."""
    model, config = load_huggingface(HERE / "mixtral")
    save_huggingface(model, config, tmp_path / "fused", fused=True)
    newer = "mlp.gate" if prefix.endswith("gate") else "mlp."
    tensors = load_file(tmp_path / "fused" / "model.safetensors")
    renamed = {name.replace(newer, prefix): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "fused" / "model.safetensors")
    again, _ = load_huggingface(tmp_path / "fused")
    jax.tree.map(np.testing.assert_array_equal, again, model)


def test_names_of_tensors_in_the_memory_of_the_library(tmp_path):
    """Published files of Sarvam and Hunyuan 3 have other names, and Sarvam's one tensor of queries, keys and values."""
    names = {
        "sarvam_moe": {
            "word_embeddings": "embed_tokens",
            ".attention.": ".self_attn.",
            "self_attn.dense": "self_attn.o_proj",
            "query_layernorm": "q_norm",
            "key_layernorm": "k_norm",
            "gate.expert_bias": "gate.e_score_correction_bias",
        },
        "hy_v3": {
            "mlp.router.gate": "mlp.gate",
            "mlp.expert_bias": "mlp.e_score_correction_bias",
            "shared_mlp": "shared_experts",
        },
    }
    for kind, changes in names.items():
        folder = tmp_path / kind
        shutil.copytree(HERE / kind, folder)
        tensors = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            for published, memory in changes.items():
                name = name.replace(published, memory)
            tensors[name] = tensor
            if "query_key_value" in name:  # 4 heads of queries, 2 of keys and of values, of 8
                tensors |= {
                    name.replace("query_key_value", part): np.ascontiguousarray(rows)
                    for part, rows in zip(
                        ("q_proj", "k_proj", "v_proj"), np.split(tensors.pop(name), [32, 48]), strict=True
                    )
                }
        assert tensors.keys() != load_file(folder / "model.safetensors").keys()
        save_file(tensors, folder / "model.safetensors")
        left, right = load_huggingface(folder)[0], load_huggingface(HERE / kind)[0]
        jax.tree.map(np.testing.assert_array_equal, left, right)


def test_multi_token_prediction_of_ernie_is_skipped(tmp_path, caplog):
    shutil.copytree(HERE / "ernie4_5_moe", tmp_path / "ernie")
    tensors = load_file(tmp_path / "ernie" / "model.safetensors")
    for name in ("mtp_emb_norm.0.weight", "mtp_linear_proj.0.weight", "mtp_block.0.input_layernorm.weight"):
        tensors[f"model.{name}"] = tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "ernie" / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        load_huggingface(tmp_path / "ernie")
    assert "3 tensors of multi-token prediction are skipped" in caplog.text


def test_multi_token_prediction_is_skipped(tmp_path, caplog):
    """DeepSeek-V3's layers after the last one are skipped; in a family without prediction they are surplus tensors."""
    shutil.copytree(HERE / "deepseek_v3", tmp_path / "v3")
    tensors = load_file(tmp_path / "v3" / "model.safetensors")
    extra = {name.replace("layers.2.", "layers.3."): tensor for name, tensor in tensors.items() if "layers.2." in name}
    save_file(tensors | extra, tmp_path / "v3" / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        load_huggingface(tmp_path / "v3")
    assert f"{len(extra)} tensors of multi-token prediction are skipped" in caplog.text
    shutil.copytree(HERE / "llama", tmp_path / "llama")
    tensors = load_file(tmp_path / "llama" / "model.safetensors")
    tensors["model.layers.3.input_layernorm.weight"] = tensors["model.layers.2.input_layernorm.weight"]
    save_file(tensors, tmp_path / "llama" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"surplus model\.layers\.3\.input_layernorm"):
        load_huggingface(tmp_path / "llama")


def test_weights_are_never_overwritten(tmp_path):
    model, config = load_huggingface(HERE / "mistral")
    save_huggingface(model, config, tmp_path)
    with pytest.raises(ConfigError, match=r"must be empty or new; it holds config\.json, model\.safetensors"):
        save_huggingface(model, config, tmp_path)


# --- Workdirs ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(HERE / "mistral", id="mistral"),
        slow_case(HERE / "qwen2_moe", id="qwen2_moe"),
        pytest.param(HERE / "deepseek_v3", id="deepseek_v3"),
    ],
)
def test_import_then_export(path, tmp_path):
    (tmp_path / "source").mkdir()
    for file in path.iterdir():
        shutil.copy(file, tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    config = import_checkpoint(tmp_path / "source", tmp_path / "run")
    assert read_config(tmp_path / "run") == config
    model, _ = load_huggingface(path)
    stored = read_variables(tmp_path / "run", config.model)
    jax.tree.map(np.testing.assert_array_equal, stored, nnx.to_pure_dict(nnx.state(model)))
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
    with pytest.raises(ConfigError, match="must be empty or new; it holds"):
        import_checkpoint(tmp_path / "source", tmp_path / "run")


def test_reading_parameters_onto_a_mesh(tmp_path):
    config = import_checkpoint(HERE / "qwen2_moe", tmp_path)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    one = read_parameters(tmp_path, config.model)
    many = read_parameters(tmp_path, config.model, mesh=mesh, dtype=np.float32)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float32(a), b), one, many)
    up = many["segment_0"]["block_0"]["moe"]["experts"]["up"]
    assert up.dtype == np.float32
    assert up.sharding.shard_shape(up.shape)[2] == config.model.d_model // 4


def test_parameters_read_without_a_mesh_can_be_used_on_any_mesh(tmp_path):
    config = import_checkpoint(HERE / "mixtral", tmp_path)
    table = read_parameters(tmp_path, config.model, only=("embedding", "table"))["embedding"]["table"]
    mesh = make_mesh(MeshConfig(data=8))
    tokens = jax.device_put(np.zeros(8, np.int32), NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        rows = jax.jit(lambda table, tokens: table[tokens])(table, tokens)
    np.testing.assert_array_equal(rows, np.broadcast_to(table[0], rows.shape))


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


def test_nothing_is_overwritten(tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(HERE / "mixtral", source)
    (source / "tokenizer.model").write_bytes(b"theirs")
    import_checkpoint(source, run)
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.model").write_bytes(b"foreign")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out in (source, run, other):
        with pytest.raises(ConfigError, match="must be empty or new; it holds"):
            import_checkpoint(source, out)
        with pytest.raises(ConfigError, match="must be empty or new; it holds"):
            export_checkpoint(run, out)
    with pytest.raises(ConfigError, match="must be a folder"):
        export_checkpoint(run, other / "tokenizer.model")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_last_file_of_an_import_and_of_an_export_is_config_json(tmp_path, monkeypatch):
    """A folder that a kill left without a tokenizer, or without the scales of FP8 weights, is no complete model."""
    names, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, target: names.append(target.name) or replace(path, target))
    import_checkpoint(HERE / "deepseek_v3_fp8", tmp_path / "run")
    assert {*names} >= {"huggingface_scales.safetensors", "generation_config.json"}
    assert names[-1] == "config.json"
    names.clear()
    export_checkpoint(tmp_path / "run", tmp_path / "exported")
    assert {*names} >= {"model.safetensors", "generation_config.json"}
    assert names[-1] == "config.json"


def test_a_failed_import_or_export_leaves_no_folders(tmp_path, monkeypatch):
    import_checkpoint(HERE / "mixtral", tmp_path / "run")

    def fail(path, content):
        del content
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(save, "write_atomic", fail)  # of config.json, after the weights
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for out in ("new/below", "empty"):
        with pytest.raises(ConfigError, match=r"cannot be written, and nothing was left: .*No space left"):
            export_checkpoint(tmp_path / "run", tmp_path / out)
        with pytest.raises(ConfigError, match="checkpoints cannot be kept under a path with"):
            import_checkpoint(HERE / "mixtral", tmp_path / out / "a[x]" / "run")
        assert sorted(tmp_path.rglob("*")) == before


def _fine_tuned(source: Path, run: Path, length: int) -> None:
    """Write the workdir of a run that started from an import, with its parameters and another row length."""
    shutil.copytree(source / "checkpoints", run / "checkpoints")
    config = read_config(source)
    data, start = (
        dataclasses.replace(config.data, sequence_length=length),
        dataclasses.replace(config.start, checkpoint=str(source)),
    )
    (run / "config.json").write_text(json.dumps(to_dict(dataclasses.replace(config, data=data, start=start))))


@pytest.mark.parametrize(("length", "exported"), [(128, 256), (512, 512)])
def test_an_export_keeps_what_fine_tuning_did_not_change(length, exported, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(HERE / "mixtral", folder)
    original = json.loads((folder / "config.json").read_text()) | {"unknown_here": [1, 2], "eos_token_id": [2, 5]}
    (folder / "config.json").write_text(json.dumps(original))
    import_checkpoint(folder, tmp_path / "import")
    _fine_tuned(tmp_path / "import", tmp_path / "run", length)
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == original | {"max_position_embeddings": exported}
    assert read_open_config(written).model == read_open_config(original).model


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_an_export_has_the_permissions_of_the_umask(mask, mode, tmp_path):
    """safetensors writes a file for its owner alone, which other users of a folder could not load."""
    before = os.umask(mask)
    try:
        writer = TensorWriter(tmp_path, max_shard_bytes=16)
        for name in ("one", "two"):
            writer.add(name, np.zeros(4, np.float32))
        writer.finish()
    finally:
        os.umask(before)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [mode, mode]
    assert load_file(files[1])["two"].tolist() == [0] * 4


#: Architectures whose code is not part of transformers.
REMOTE_CODE = ("deepseek", "kimi_k2")


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in OURS if path.name not in REMOTE_CODE])
@pytest.mark.transformers
def test_an_export_loads_in_transformers_without_new_warnings(path, tmp_path):
    """Only warnings that the published config.json causes too. Needs torch and transformers 5: python -m pytest -m
    transformers."""
    import torch
    import transformers

    import_checkpoint(path, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    told = io.StringIO()
    transformers.utils.logging.add_handler(logging.StreamHandler(told))
    transformers.AutoConfig.from_pretrained(path)
    of_source = set(told.getvalue().splitlines())
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values())
    tokens = torch.tensor(_expected(path)["input_ids"])
    assert _relative(model(tokens).logits.detach().numpy(), _expected(path)["logits"]) < 2e-5
    assert model.generate(tokens[:, :6], max_new_tokens=3, do_sample=False).shape[1] > 6
    kernels = "falling back to its reference"  # those of gated DeltaNet are separate packages
    assert {line for line in told.getvalue().splitlines() if kernels not in line} == of_source
