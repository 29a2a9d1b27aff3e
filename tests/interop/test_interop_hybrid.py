"""Qwen3-Next and Qwen3.5-MoE: slices of fused tensors, multi-token prediction, a text model in a multimodal one."""

from __future__ import annotations

import json
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe.config import ConfigError, MeshConfig
from moe.interop import export_checkpoint, import_checkpoint, load_huggingface, save_huggingface, workdirs
from moe.interop.config_json import keep_fields, read_config
from moe.interop.whole_models import text_fields
from moe.parallel.mesh import make_mesh
from tests.helpers import slow_case
from tests.interop.test_interop import HERE, _tensors

NEXT, TEXT = HERE / "qwen3_next", HERE / "qwen3_5_moe_text"


def _equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_slices_of_fused_tensors_by_hand():
    """2 key heads of 4 with 2 value heads of 6 each: rows 4+4+12+12 of the first, then of the second."""
    tensors = load_file(NEXT / "model.safetensors")
    model, _ = load_huggingface(NEXT)
    layer = model.segment_0.block_0.delta_net
    rows = tensors["model.layers.0.linear_attn.in_proj_qkvz.weight"]
    assert rows.shape == (64, 16)
    np.testing.assert_array_equal(layer.query[0, :, 1].T, rows[32:36])
    np.testing.assert_array_equal(layer.key[0, :, 0].T, rows[4:8])
    np.testing.assert_array_equal(layer.value[0, :, 3].T, rows[32 + 8 + 6 : 32 + 8 + 12])
    np.testing.assert_array_equal(layer.gate[0, :, 2].T, rows[32 + 20 : 32 + 26])
    rates = tensors["model.layers.0.linear_attn.in_proj_ba.weight"]
    np.testing.assert_array_equal(layer.beta[0].T, rates[[0, 1, 4, 5]])
    np.testing.assert_array_equal(layer.decay[0].T, rates[[2, 3, 6, 7]])
    taps = tensors["model.layers.0.linear_attn.conv1d.weight"]
    assert taps.shape == (2 * 8 + 24, 1, 3)
    np.testing.assert_array_equal(layer.key_conv[0, :, 1], taps[12:16, 0].T)
    np.testing.assert_array_equal(layer.value_conv[0, :, 3], taps[16 + 18 :, 0].T)


@pytest.mark.parametrize("path", [NEXT, TEXT], ids=lambda path: path.name)
def test_each_device_reads_its_slices(path):
    """Heads are split over tensor and D over fsdp, so that a device reads slices of the fused tensors."""
    whole, _ = load_huggingface(path)
    split, _ = load_huggingface(path, mesh=make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))
    _equal(split, whole)
    query = next(leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(split) if "value_conv" in str(keys))
    assert query.sharding.shard_shape(query.shape)[2] == 2


def test_multi_token_prediction_is_skipped_or_imported_and_exported(tmp_path, caplog):
    """An attention layer after two of gated DeltaNet and one of attention, under the names of Qwen's files."""
    tensors = load_file(TEXT / "model.safetensors")
    last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.2.")}
    extra = {name.replace("model.layers.2.", "mtp.layers.0."): tensor + 1 for name, tensor in last.items()}
    draws = {"fc": (16, 32), "pre_fc_norm_hidden": (16,), "pre_fc_norm_embedding": (16,), "norm": (16,)}
    extra |= {f"mtp.{name}.weight": np.full(shape, len(name), np.float32) for name, shape in draws.items()}
    folder = tmp_path / "published"
    folder.mkdir()
    shutil.copy(TEXT / "config.json", folder)
    save_file(tensors | extra, folder / "model.safetensors")
    with caplog.at_level("WARNING"):
        model, _ = load_huggingface(folder)
    assert f"{len(extra)} tensors of multi-token prediction are skipped" in caplog.text
    _equal(model, load_huggingface(TEXT)[0])
    config = import_checkpoint(folder, tmp_path / "run", prediction=True)
    assert config.model.prediction_layers == 1
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert _tensors(tmp_path / "out") == _tensors(folder)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    with pytest.raises(ConfigError, match="holds no layer of multi-token prediction"):
        import_checkpoint(NEXT, tmp_path / "none", prediction=True)
    config = json.loads((folder / "config.json").read_text())
    config["layer_types"][-1] = "linear_attention"  # the published models end with full attention
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=r"layer_types ends with linear_attention: layers of multi-token prediction are"
    ):
        import_checkpoint(folder, tmp_path / "linear", prediction=True)


def _text_alone(kind, path, folder):
    """A folder of the text model as its family has it, and the ``config.json``."""
    shutil.copytree(path, folder)
    source = json.loads((path / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    if kind == "glm4v_moe":
        source |= {"use_qk_norm": False, "num_nextn_predict_layers": 0}
        tensors = {name: t for name, t in tensors.items() if not re.search(r"_norm\.weight|layers\.3\.", name)}
    if "qwen3_moe" in path.name:  # the whole models have no windows, and the first always divides weights by their sum
        source |= {"use_sliding_window": False, "norm_topk_prob": kind == "qwen3_vl_moe"}
    (folder / "config.json").write_text(json.dumps(source))
    save_file(tensors, folder / "model.safetensors")
    if kind == "qwen3_vl_moe":
        model, config = load_huggingface(folder)
        shutil.rmtree(folder)
        save_huggingface(model, config, folder, fused=True, source=source)
    return source, load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "path", "sections", "prefix"),
    [
        slow_case("qwen3_5_moe", TEXT, ("text_config",), "model.language_model."),
        ("qwen3_vl_moe", HERE / "qwen3_moe", ("text_config",), "model.language_model."),
        slow_case("qwen3_omni_moe", HERE / "qwen3_moe", ("thinker_config", "text_config"), "thinker.model."),
        slow_case("glm4v_moe", HERE / "glm4_moe", ("text_config",), "model.language_model."),
    ],
)
def test_the_text_model_of_a_multimodal_checkpoint_is_read(kind, path, sections, prefix, tmp_path, caplog):
    """The published form: names with a prefix, other parts, fields in a section. The export is text only."""
    source, tensors = _text_alone(kind, path, tmp_path / "alone")
    head = "thinker.lm_head." if kind == "qwen3_omni_moe" else "lm_head."
    inside = {re.sub("^model[.]", prefix, re.sub("^lm_head[.]", head, name)): t for name, t in tensors.items()}
    if kind == "qwen3_vl_moe":  # its matrices of experts are [inputs, outputs]
        inside |= {name: np.ascontiguousarray(t.swapaxes(1, 2)) for name, t in inside.items() if t.ndim == 3}
    vision = prefix.partition(".")[0] + ".visual.patch.weight"
    folder = tmp_path / "published"
    folder.mkdir()
    save_file(inside | {vision: np.zeros((2, 3), np.float32)}, folder / "model.safetensors")
    text = source if kind == "qwen3_5_moe" else source | {"model_type": f"{kind}_text", "architectures": None}
    text = text | ({"norm_topk_prob": False} if kind == "qwen3_vl_moe" else {})
    for section in reversed(sections):
        text = {section: text, "vision_config": {}}
    content = {"model_type": kind, "tie_word_embeddings": source["tie_word_embeddings"]} | text
    (folder / "config.json").write_text(json.dumps(content))
    with caplog.at_level("WARNING"):
        model, config = load_huggingface(folder)
    assert "1 tensors of the vision model are skipped" in caplog.text
    alone, config_alone = load_huggingface(tmp_path / "alone")
    _equal(model, alone)
    assert config == config_alone
    import_checkpoint(folder, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "out", fused=kind == "qwen3_vl_moe")
    assert _tensors(tmp_path / "out") == _tensors(tmp_path / "alone")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: written[name] for name in source} == source


def test_the_text_model_of_ernie_beside_experts_of_images(tmp_path, caplog):
    """Logits are transformers' of a text, by a folder as it saves the whole model."""
    path = HERE.parent / "whole_models" / "ernie4_5_vl_moe"
    with caplog.at_level("WARNING"):
        model, config = load_huggingface(path)
    assert "38 tensors of experts of images are skipped" in caplog.text
    with np.load(path / "expected.npz") as expected:
        logits = jax.jit(lambda tokens: model(tokens).logits)(expected["input_ids"].astype(np.int32))
        assert np.abs(logits - expected["logits"]).max() < 2e-5 * np.abs(expected["logits"]).max()
    save_huggingface(model, config, tmp_path / "text")
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == "ernie4_5_moe"
    _equal(load_huggingface(tmp_path / "text")[0], model)
    source = json.loads((path / "config.json").read_text())
    source["text_config"]["mlp_layer_types"] = ["sparse", "dense", "sparse"]
    with pytest.raises(ConfigError, match="mlp_layer_types: must list each layer, and the MoE layers must be"):
        text_fields(source)


def test_an_export_of_the_text_model_names_its_architecture_and_modules():
    source = json.loads((TEXT / "config.json").read_text())
    bare = {name: value for name, value in source.items() if name != "architectures"}
    assert keep_fields(bare, read_config(bare))["architectures"] == source["architectures"]
    kept = ["lm_head", "model.language_model.layers.0.linear_attn.in_proj_a"]
    quantization = {"quant_method": "fp8", "modules_to_not_convert": kept}
    written = workdirs._quantization_of_export(source | {"quantization_config": quantization})
    assert written["modules_to_not_convert"] == ["lm_head", "model.layers.0.linear_attn.in_proj_a"]
    assert quantization["modules_to_not_convert"] == kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act.*must be silu"),
        ({"layer_types": ["linear_attention"] * 2 + ["sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({"linear_num_value_heads": 3}, "model.delta_net.value_heads=3: must be a multiple of key_heads=2"),
        ({"head_dim": 6}, "model.rope_dim=3: must be even"),
    ],
)
def test_unsupported_settings_are_refused(changes, message):
    source = json.loads((NEXT / "config.json").read_text())
    with pytest.raises(ConfigError, match=message):
        read_config(source | changes)


def test_zero_experts_make_a_dense_model():
    source = json.loads((NEXT / "config.json").read_text())
    assert read_config(source | {"num_experts": 0}).model.moe.gate is None
