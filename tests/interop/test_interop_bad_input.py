"""Malformed folders of open checkpoints: each is refused in one sentence naming the cause, and nothing is written."""

from __future__ import annotations

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe.config import ConfigError
from moe.interop import import_checkpoint, load_huggingface, save_huggingface
from moe.interop.config_json import read_config
from tests.interop.test_interop import HERE


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


EXPERT = "model.layers.1.block_sparse_moe.experts.4.w2.weight"


def test_missing_surplus_and_misshapen_tensors_are_named(editable):
    folder, change, _ = editable
    change(lambda tensors: tensors.update({"model.extra": tensors.pop(EXPERT)}))
    with pytest.raises(ConfigError, match=rf"missing {EXPERT}; surplus model\.extra"):
        load_huggingface(folder)
    change(lambda tensors: tensors.update({EXPERT: tensors.pop("model.extra").T.copy()}))
    with pytest.raises(ConfigError, match=rf"{EXPERT} has shape \[20, 16\], config\.json asks for \[16, 20\]"):
        load_huggingface(folder)


def test_a_tensor_of_an_unsupported_dtype_is_named(editable):
    folder, change, _ = editable
    change(lambda tensors: tensors.update({EXPERT: tensors[EXPERT].astype(ml_dtypes.float8_e4m3fn)}))
    with pytest.raises(ConfigError, match=rf"{EXPERT}: is F8_E4M3"):
        load_huggingface(folder)


def test_mixed_dtypes_become_float32_without_loss(editable):
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


@pytest.mark.parametrize(
    ("family", "original", "copy"),
    [
        ("mistral", "model.embed_tokens.weight", "lm_head.weight"),
        ("t5", "shared.weight", "decoder.embed_tokens.weight"),
        ("switch_transformers", "shared.weight", "encoder.embed_tokens.weight"),
    ],
)
def test_tied_embeddings_may_be_stored_under_the_name_of_a_copy(family, original, copy, tmp_path):
    whole, config = load_huggingface(HERE / family)
    shutil.copytree(HERE / family, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors[copy] = tensors.pop(original)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    model, same = load_huggingface(tmp_path / "model")
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, model, whole)


def test_damaged_folders_are_refused(editable, tmp_path):
    folder, _, _ = editable
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        load_huggingface(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors: damaged"):
        load_huggingface(folder)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pickled weights \(\*\.bin\) can run code and are not read"):
        load_huggingface(folder)


def test_a_single_file_takes_precedence_over_an_older_index_of_shards(tmp_path):
    model, config = load_huggingface(HERE / "mistral")
    zeros = jax.tree.map(np.zeros_like, model)
    save_huggingface(zeros, config, tmp_path, max_shard_bytes=8000)
    shutil.copy(HERE / "mistral" / "model.safetensors", tmp_path)
    jax.tree.map(np.testing.assert_array_equal, load_huggingface(tmp_path)[0], model)


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
        ({"model_type": "gpt2"}, "model_type='gpt2': must be one of mistral, llama"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_type='yarn': needs factor"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type='linear': needs factor"),
        (
            {"rope_parameters": {"rope_type": "proportional", "factor": 4}},
            "rope_type='proportional': must be 'default'",
        ),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4}}, r"rope_scaling\.short_factors=\(\): must be pos"),
        ({"rope_parameters": {"rope_type": "default", "new_factor": 4}}, "new_factor=4"),
        ({"hidden_act": "mish"}, "hidden_act='mish': must be 'silu'"),
        ({"is_causal": False}, "is_causal=False: must be true"),
        ({"per_layer_config": {"1": {"sliding_window": 3}}}, "per_layer_config="),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method='awq': must be one of fp8, mxfp4, compressed"),
        ({"quantization_config": 8}, "quant_method=8: must be one of fp8"),
        (
            {"model_type": "llama4"},
            "model_type='llama4': needs attention within chunks, .* which no model here computes",
        ),
        ({"model_type": "gemma4_text"}, "model_type='gemma4_text': needs norms before and after each half"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2, "alpha": 4}}, "alpha=4.0 of rotary positions"),
        ({"rope_parameters": {"rope_type": "default", "short_mscale": 2}}, "short_mscale or long_mscale .* be absent"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"hidden_size": "16"}, "hidden_size='16': must be an integer"),
        ({"num_key_value_heads": 3}, r"model\.num_kv_heads=3: must divide"),
        ({"num_experts_per_tok": 9}, r"model\.moe\.gate\.k=9"),
    ],
)
def test_unsupported_settings_are_refused(editable, fields, pattern):
    folder, _, configure = editable
    configure(**fields)
    with pytest.raises(ConfigError, match=pattern):
        load_huggingface(folder)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"long_mscale": 1.1}, "longrope, short_mscale=1.2, long_mscale=1.1: must be longrope with two equal scales"),
        ({"rope_type": "yarn"}, "yarn, short_mscale=1.2, long_mscale=1.2: must be longrope"),
    ],
)
def test_unsupported_scales_of_phi_are_refused(fields, pattern):
    source = json.loads((HERE / "phimoe" / "config.json").read_text())
    with pytest.raises(ConfigError, match=pattern):
        read_config(source | {"rope_parameters": source["rope_parameters"] | fields})
    with pytest.raises(ConfigError, match="num_experts_per_tok=1: must be greater than or equal to 2"):
        read_config(source | {"num_experts_per_tok": 1})


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("mixtral", "num_experts_per_tok"),
        ("gpt_oss", "num_experts_per_tok"),
        ("deepseek_v3", "num_experts_per_tok"),
        ("hunyuan_v1_moe", "moe_topk"),
        ("ernie4_5_moe", "moe_k"),
    ],
)
def test_a_renormalised_top_1_is_refused_under_the_name_of_its_field(family, field):
    source = json.loads((HERE / family / "config.json").read_text())
    with pytest.raises(ConfigError, match=rf"^config\.json: {field}=1: must be above 1 in a {family} whose weights"):
        read_config(source | {field: 1})


def test_a_top_1_that_is_not_renormalised_is_read():
    source = json.loads((HERE / "deepseek_v3" / "config.json").read_text())
    moe = read_config(source | {"num_experts_per_tok": 1, "norm_topk_prob": False}).model.moe
    assert moe.experts_per_token == 1


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_a_factor_of_attention_scores_is_read_only_with_yarn(kind):
    """DeepSeek's code scales the scores with every kind of rotary positions."""
    source = json.loads((HERE / "deepseek_v3" / "config.json").read_text())
    scaling = {"type": kind, "factor": 4.0, "mscale_all_dim": 1.0}
    with pytest.raises(ConfigError, match=rf"mscale_all_dim=1\.0: is read only with yarn, not with {kind}"):
        read_config(source | {"rope_scaling": scaling, "rope_parameters": None})


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mistral4", {"rope_type": "linear"}, "rope_type='linear': must be 'yarn' for mistral4"),
        ("ministral3", {"llama_4_scaling_beta": None}, "need llama_4_scaling_beta for ministral3"),
        ("deepseek_v3", {"llama_4_scaling_beta": 0.1}, "llama_4_scaling_beta: must be absent for deepseek_v3"),
    ],
)
def test_only_some_families_have_queries_that_grow(family, changes, message):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.1}
    source = json.loads((HERE / family / "config.json").read_text())
    with pytest.raises(ConfigError, match=message):
        read_config(source | {"rope_scaling": None, "rope_parameters": yarn | changes})


#: (family, field of config.json, values that are refused)
_SCALED_WINDOWS = {"full_attention": {"rope_theta": 5.0}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}
WRONG_VALUES = [
    ("mixtral", "model_type", (None, 3, ["mixtral"], {})),
    ("mixtral", "num_hidden_layers", (0, -1, 1.5, 10**9, 10**400, True, "2", [2], {})),
    ("mixtral", "num_local_experts", (0, 10**9, "8")),
    ("mixtral", "num_attention_heads", (0, 2**31, 2.0)),
    ("mixtral", "num_experts_per_tok", (0, 10**9, [2])),
    ("mixtral", "hidden_size", (0, 3, 2**62)),
    ("mixtral", "head_dim", (0, -2, 2**40)),
    ("mixtral", "rms_norm_eps", (0, float("nan"), float("inf"), "1e-5")),
    ("mixtral", "rope_theta", (0, -1e4, "big")),
    ("mixtral", "rope_parameters", (3, [], {"rope_type": 5}, {"rope_theta": "x"})),
    ("mixtral", "sliding_window", (-1, "all", 2**40)),
    ("mixtral", "router_jitter_noise", (-0.1, 1.0, "none")),
    ("mixtral", "router_aux_loss_coef", (-1, "x", float("inf"))),
    ("mixtral", "hidden_act", (3, [], "x" * 100_000)),
    ("mixtral", "tie_word_embeddings", ("false", 1)),
    ("mixtral", "vocab_size", (10**12, 31)),
    ("mixtral", "max_position_embeddings", (0, 2**31, "long")),
    ("olmoe", "norm_topk_prob", ("false", 0)),
    ("qwen3_moe", "decoder_sparse_step", (0, "1")),
    ("qwen3_moe", "mlp_only_layers", (3, ["0"], [-1], [10**9])),
    ("qwen2_moe", "layer_types", ("full_attention", ["chunked"], [1, 2, 3], [])),
    ("deepseek", "moe_layer_freq", (0, -1)),
    ("deepseek", "n_shared_experts", (-1, 10**9)),
    ("deepseek_v3", "moe_layer_freq", (2,)),
    ("hunyuan_v1_moe", "moe_topk", ([2, 3], [], "2", 0)),
    ("granitemoe", "logits_scaling", (0, "6")),
    ("ernie4_5_moe", "use_bias", (True,)),
    ("t5", "dense_act_fn", ("relu", "gelu")),
    ("t5", "is_gated_act", (False,)),
    ("switch_transformers", "router_dtype", ("bfloat16", "float16")),
    ("glm4_moe_lite", "mlp_layer_types", (["dense"] * 2, ["moe"] * 3)),
    ("afmoe", "attention_bias", (True,)),
    ("mellum", "rope_parameters", (3, {"rope_theta": 5.0}, {"full_attention": 3}, _SCALED_WINDOWS)),
    ("granitemoe_swa", "layer_rope_theta", ([5.0], [5.0, 2.0, 2.0, 3.0], [5.0, 0, 0, 0], [-1, 2, 2, 2], "5")),
]
CASES = [
    pytest.param(family, field, value, id=f"{family}.{field}={json.dumps(value)[:20]}")
    for family, field, values in WRONG_VALUES
    for value in values
]


@pytest.mark.parametrize(("family", "field", "value"), CASES)
@pytest.mark.timeout(60)
def test_wrong_values_are_refused_in_one_sentence(family, field, value, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(HERE / family, folder)
    source = json.loads((folder / "config.json").read_text()) | {field: value}
    (folder / "config.json").write_text(json.dumps(source))
    _refused(folder, tmp_path / "out")


MALFORMED_CONFIGS = {
    "list": b"[]",
    "number": b"3",
    "empty": b"",
    "null": b"null",
    "truncated": b'{"model_type": "mixtral", ',
    "not UTF-8": b'{"model_type": "mixtral\xff"}',
    "deeply nested": b"[" * 200_000,
    "surrogate": b'{"model_type": "\\ud800"}',
}
MALFORMED_INDICES = {
    "list": b"[]",
    "empty": b"",
    "no map": b"{}",
    "null map": b'{"weight_map": null}',
    "list as map": b'{"weight_map": ["model.safetensors"]}',
    "number as name": b'{"weight_map": {"lm_head.weight": 3}}',
    "empty map": b'{"weight_map": {}}',
    "not UTF-8": b"\xff\xfe",
    "parent folder": b'{"weight_map": {"lm_head.weight": "../mixtral/model.safetensors"}}',
    "absolute path": b'{"weight_map": {"lm_head.weight": "/etc/model.safetensors"}}',
    "null byte": b'{"weight_map": {"lm_head.weight": "a\\u0000.safetensors"}}',
    "other kind of file": b'{"weight_map": {"lm_head.weight": "config.json"}}',
}
MALFORMED_WEIGHTS = {"empty": b"", "noise": b"\xff" * 1000, "absurd header": (1 << 60).to_bytes(8, "little") + b"{}"}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        pytest.param(file, content, id=f"{file}-{name}")
        for file, contents in {
            "config.json": MALFORMED_CONFIGS,
            "model.safetensors.index.json": MALFORMED_INDICES,
            "model.safetensors": MALFORMED_WEIGHTS,
        }.items()
        for name, content in contents.items()
    ],
)
@pytest.mark.timeout(60)
def test_malformed_files_are_refused_in_one_sentence(file, content, editable, tmp_path):
    folder, _, _ = editable
    if "index" in file:
        (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(content)
    _refused(folder, tmp_path / "out")


def _refused(folder, out):
    """Check that an import ends in one sentence of bounded length and writes nothing."""
    with pytest.raises(ConfigError) as refusal:
        import_checkpoint(folder, out)
    assert len(str(refusal.value).splitlines()) == 1
    assert len(str(refusal.value)) < 600
    assert not out.exists()


def test_a_path_in_the_index_that_leaves_the_folder_is_refused(editable):
    folder, _, _ = editable
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_bytes(MALFORMED_INDICES["parent folder"])
    with pytest.raises(ConfigError, match=r"weight_map\.lm_head\.weight='\.\./mixtral/model\.safetensors'"):
        load_huggingface(folder)
