"""config.json of open checkpoints: what is read, what is written, and how balance coefficients are converted."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from moe.config import Config, ConfigError, ModelConfig, RopeScalingConfig, layer_kinds, sparse_layers
from moe.config.parse import from_config_dict
from moe.configs import (
    deepseek_moe_16b,
    deepseek_v2,
    deepseek_v2_lite,
    deepseek_v3,
    gpt_oss_20b,
    gpt_oss_120b,
    kimi_k2,
    mixtral_8x7b,
    mixtral_8x22b,
    olmoe_1b_7b,
    qwen1_5_moe_a2_7b,
    qwen3_30b_a3b,
    qwen3_next_80b_a3b,
)
from moe.interop import balance, families
from moe.interop.config_json import keep_fields, write_config
from moe.interop.config_json import read_config as read_open_config
from moe.interop.families import FAMILIES, MISSING
from moe.interop.whole_models import WHOLE_MODELS
from moe.models.flops import count_parameters
from tests.helpers import moe_config
from tests.interop.test_interop import HERE, OURS, THEIRS
from tests.interop.test_interop_encoder_decoder import PATHS as ENCODER_DECODERS


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
    assert model.moe.losses.balance == pytest.approx(0.02 * 2 / 32)


#: Factor of each family's coefficient at K = 2 (DeepSeek: 3) in L MoE layers, see moe.interop.balance.
@pytest.mark.parametrize(
    ("name", "coefficient", "factor"),
    [
        ("mixtral", "router_aux_loss_coef", 3 / 2),
        ("olmoe", "router_aux_loss_coef", 2 / 2),
        ("qwen2_moe", "router_aux_loss_coef", 2 / 2),
        ("qwen3_moe", "router_aux_loss_coef", 2 / 2),
        ("deepseek", "aux_loss_alpha", 1),
        ("deepseek_v2", "aux_loss_alpha", 1),
        ("deepseek_v3", "aux_loss_alpha", 1),
    ],
)
def test_balance_coefficients_are_converted_both_ways(name, coefficient, factor):
    source = json.loads((HERE / name / "config.json").read_text()) | {coefficient: 0.04}
    config = read_open_config(source)
    assert config.model.moe.losses.balance == pytest.approx(0.04 * factor)
    assert write_config(config, name)[coefficient] == pytest.approx(0.04)


#: As published, without the quantisation of the experts and the fields that do not describe the model.
GPT_OSS_20B = {
    **{"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "head_dim": 64},
    **{"experts_per_token": 4, "num_experts_per_tok": 4, "num_local_experts": 32, "hidden_act": "silu"},
    **{"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "vocab_size": 201088},
    **{"num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128, "swiglu_limit": 7.0},
    **{"layer_types": ["sliding_attention", "full_attention"] * 12, "initial_context_length": 4096},
    **{"max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 150000, "router_aux_loss_coef": 0.9},
    "rope_scaling": {
        **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096},
        **{"rope_type": "yarn", "truncate": False},
    },
    "tie_word_embeddings": False,
}


def test_published_config_of_gpt_oss():
    model = read_open_config(GPT_OSS_20B).model
    ours = from_config_dict(gpt_oss_20b.get_config()).model
    moe = dataclasses.replace(model.moe, dispatch="gather", losses=ours.moe.losses)
    moe = dataclasses.replace(moe, jitter=ours.moe.jitter)
    same = {name: getattr(ours, name) for name in ("d_ff", "dtype", "attention", "remat")}
    assert dataclasses.replace(model, moe=moe, **same) == ours
    assert model.moe.losses.balance == pytest.approx(ours.moe.losses.balance)
    # Where a file does not state positions and layers, the library's defaults are those of the published models.
    absent = ("layer_types", "rope_scaling", "rope_theta", "head_dim", "sliding_window", "attention_bias")
    assert read_open_config({k: v for k, v in GPT_OSS_20B.items() if k not in absent}).model == model
    # The coefficient's default is not: 0.001, of which K / L = 4 / 24 is ours.
    published = {k: v for k, v in GPT_OSS_20B.items() if k != "router_aux_loss_coef"}
    assert read_open_config(published).model.moe.losses.balance == pytest.approx(0.001 * 4 / 24)


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [(gpt_oss_20b, 20_914_757_184, 3_608_307_264), (gpt_oss_120b, 116_829_156_672, 5_132_849_472)],
)
def test_published_counts_of_gpt_oss(config, total, active):
    """20.91B and 116.83B; the published active counts, 3.61B and 5.13B, leave out the embedding table."""
    assert count_parameters(from_config_dict(config.get_config()).model) == (total, active + 201088 * 2880)


def test_published_counts_of_deepseek():
    """Without multi-token prediction."""
    published = {deepseek_v2_lite: 15_706_484_224, deepseek_v2: 235_741_434_880, deepseek_v3: 671_026_419_200}
    for config, count in published.items():
        assert count_parameters(from_config_dict(config.get_config()).model)[0] == count


def test_count_of_kimi_k2_by_hand():
    """1.026 trillion parameters from the sizes of its config.json; the paper has 1.04, and 32.6 billion active."""
    attention = 7168 * 1536 + 1536 + 1536 * 64 * 192 + 7168 * 576 + 512 + 512 * 64 * 256 + 64 * 128 * 7168
    norms, expert = 2 * 7168, 3 * 7168 * 2048
    shared_by_all = 2 * 163840 * 7168 + 7168 + 61 * (attention + norms) + 3 * 7168 * 18432
    router = 7168 * 384 + 384  # and the selection bias
    total, active = count_parameters(from_config_dict(kimi_k2.get_config()).model)
    assert total == shared_by_all + 60 * (router + 385 * expert)
    assert active == shared_by_all + 60 * (router + 9 * expert)


def test_published_config_of_qwen3_next():
    """48 layers, every fourth with full attention; 79.67B without multi-token prediction."""
    source = {
        **{"model_type": "qwen3_next", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48},
        **{"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "intermediate_size": 5120},
        **{"num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512, "norm_topk_prob": True},
        **{"shared_expert_intermediate_size": 512, "decoder_sparse_step": 1, "mlp_only_layers": []},
        **{"full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128},
        **{"linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32},
        **{"partial_rotary_factor": 0.25, "rope_theta": 10_000_000, "rms_norm_eps": 1e-6, "hidden_act": "silu"},
    }
    model, ours = read_open_config(source).model, from_config_dict(qwen3_next_80b_a3b.get_config()).model
    same = {name: getattr(ours, name) for name in ("dtype", "attention", "remat")}
    moe = dataclasses.replace(model.moe, dispatch=ours.moe.dispatch, losses=ours.moe.losses)
    moe = dataclasses.replace(moe, jitter=ours.moe.jitter)
    assert dataclasses.replace(model, moe=moe, **same) == ours
    assert count_parameters(ours)[0] == 79_674_391_296
    older = {name: value for name, value in source.items() if not name.startswith("linear_")}
    assert read_open_config(older).model == model


@pytest.mark.parametrize("experts", [None, 0])
def test_deepseek_without_experts_is_dense(experts):
    source = json.loads((HERE / "deepseek" / "config.json").read_text())
    assert not any(sparse_layers(read_open_config(source | {"n_routed_experts": experts}).model))


@pytest.mark.parametrize(
    ("name", "absent", "value"),
    [
        ("qwen2_moe", "num_experts_per_tok", 4),
        ("qwen3_moe", "num_experts_per_tok", 8),
        ("granitemoeshared", "shared_intermediate_size", 0),
        ("deepseek_v3", "first_k_dense_replace", 3),
        ("deepseek_v3", "n_shared_experts", 1),
        ("deepseek_v3", "q_lora_rank", 1536),
        ("deepseek_v2", "n_shared_experts", 2),
        ("deepseek_v2", "q_lora_rank", 1536),
        ("glm4_moe_lite", "q_lora_rank", 768),
        ("mixtral", "max_position_embeddings", 131_072),
        ("olmoe", "max_position_embeddings", 4096),
        ("gpt_oss", "router_aux_loss_coef", 0.001),
        ("qwen3_moe", "max_position_embeddings", 32_768),
        ("solar_open", "head_dim", 128),
        ("sarvam_moe", "moe_intermediate_size", 1024),
        ("hy_v3", "router_scaling_factor", 2.826),
        ("flint", "shared_expert_intermediate_size", 1024),
        ("sarvam_mla", "q_lora_rank", None),
        ("afmoe", "num_shared_experts", 2),
        ("mellum", "moe_intermediate_size", 896),
        ("lara_mini", "shared_expert_intermediate_size", 512),
        ("kolibri1", "shared_expert_intermediate_size", 512),
        ("mistral4", "n_shared_experts", 1),
    ],
)
def test_an_absent_field_has_the_default_of_the_library(name, absent, value):
    source = json.loads((HERE / name / "config.json").read_text()) | {"num_experts": 8}
    del source[absent]
    assert getattr(FAMILIES[name].schema.model_validate(source), absent) == value
    assert read_open_config(source).model == read_open_config(source | {absent: value}).model


@pytest.mark.parametrize(
    ("name", "experts"), [("qwen2_moe", 60), ("qwen3_moe", 128), ("qwen3_next", 512), ("qwen3_5_moe_text", 256)]
)
def test_an_absent_number_of_experts_of_qwen_has_the_default_of_the_library(name, experts):
    source = json.loads((HERE / name / "config.json").read_text())
    source = {key: value for key, value in source.items() if key not in ("num_experts", "num_local_experts")}
    assert FAMILIES[name].schema.model_validate(source).num_experts == experts


def test_absent_sizes_of_switch_have_the_defaults_of_the_library():
    """A decoder depth of null is the encoder's; an absent one is 12."""
    schema = FAMILIES["switch_transformers"].schema
    source = json.loads((HERE / "switch_transformers" / "config.json").read_text())
    sizes = ("d_model", "num_heads", "num_layers", "num_decoder_layers")
    absent = schema.model_validate({key: value for key, value in source.items() if key not in sizes})
    assert (absent.hidden_size, absent.num_attention_heads, absent.num_layers) == (768, 12, 12)
    assert absent.num_hidden_layers == 12
    null = schema.model_validate(source | {"num_layers": 5, "num_decoder_layers": None})
    assert (null.num_layers, null.num_hidden_layers) == (5, 5)


@pytest.mark.parametrize(
    ("name", "own", "other"),
    [
        ("ernie4_5_moe", "moe_k", "num_experts_per_tok"),
        ("ernie4_5_moe", "moe_num_experts", "num_experts"),
        ("mixtral", "num_local_experts", "num_experts"),
        ("gpt_oss", "num_local_experts", "num_experts"),
        ("minimax_m2", "num_local_experts", "num_experts"),
        ("deepseek_v2", "n_routed_experts", "num_experts"),
        ("deepseek_v3", "n_routed_experts", "num_local_experts"),
        ("glm4_moe", "n_routed_experts", "num_local_experts"),
        ("dots1", "n_routed_experts", "num_local_experts"),
        ("olmoe", "num_experts", "num_local_experts"),
        ("flex_olmo", "num_experts", "num_local_experts"),
        ("hunyuan_v1_moe", "num_experts", "num_local_experts"),
        ("hunyuan_v1_moe", "moe_topk", "num_experts_per_tok"),
        ("sarvam_moe", "n_routed_experts", "num_experts"),
        ("sarvam_mla", "n_routed_experts", "num_experts"),
        ("hy_v3", "num_experts", "num_local_experts"),
    ],
)
def test_alternative_field_names_of_the_library_are_read(name, own, other):
    source = json.loads((HERE / name / "config.json").read_text())
    renamed = {other if key == own else key: value for key, value in source.items()}
    assert renamed != source
    config = read_open_config(renamed)
    assert config.model == read_open_config(source).model
    k, experts = config.model.moe.experts_per_token + 1, 2 * config.model.moe.num_experts
    moe = dataclasses.replace(config.model.moe, gate=config.model.moe.gate.with_k(k), num_experts=experts)
    written = keep_fields(renamed, dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe)))
    assert written[own] in (k, experts)
    assert other not in written  # beside the first name, that library would read the second one


def test_an_export_does_not_refer_to_remote_code():
    code = {"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    source = json.loads((HERE / "kimi_k2" / "config.json").read_text()) | code
    assert "auto_map" not in keep_fields(source, read_open_config(source))


def test_a_prefix_lm_is_not_exported():
    """Every open decoder-only model reads a prompt from left to right."""
    source = json.loads((HERE / "mixtral" / "config.json").read_text()) | {"sliding_window": None}
    config = read_open_config(source)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, objective="prefix_lm"))
    for write in (write_config, functools.partial(keep_fields, source)):
        with pytest.raises(ConfigError, match=r"data\.objective='prefix_lm': no open architecture"):
            write(config)


def test_published_losses_of_olmoe_and_epsilon_of_deepseek_moe():
    """MegaBlocks, by which OLMoE was trained, takes the mean over layers of a loss that is 1 at balance."""
    olmoe = from_config_dict(olmoe_1b_7b.get_config()).model
    assert olmoe.moe.losses.balance * olmoe.num_layers == pytest.approx(0.01)
    assert from_config_dict(deepseek_moe_16b.get_config()).model.norm_eps == 1e-6


@pytest.mark.parametrize(
    ("name", "heads"),
    [("mixtral", 8), ("qwen2", 32), ("qwen3_moe", 4), ("flint", 4), ("mellum", 4), ("exaone_moe", 32), ("olmoe", None)],
)
def test_an_absent_number_of_key_heads_has_the_default_of_the_library(name, heads):
    """Null, or a family without a default, means as many as query heads."""
    fields = json.loads((HERE / name / "config.json").read_text())
    del fields["num_key_value_heads"]
    assert FAMILIES[name].schema.model_validate(fields).num_key_value_heads == heads
    assert FAMILIES[name].schema.model_validate(fields | {"num_key_value_heads": None}).num_key_value_heads is None


def test_positions_of_each_kind_of_layers():
    """Granite's base 0 means no positions, which only the layers without windows may lack; Mellum's bases are equal, or
    the library's default."""
    granite = json.loads((HERE / "granitemoe_swa" / "config.json").read_text())
    for bases, want in (
        ([0, 9.0, 9.0, 9.0], (9.0, 0.0, "sliding")),
        ([9.0] * 4, (9.0, 0.0, "all")),
        (None, (10_000.0, 0.0, "all")),
    ):
        model = read_open_config(granite | {"layer_rope_theta": bases}).model
        assert (model.rope_theta, model.window_rope_theta, model.rotated_layers) == want
    mellum = json.loads((HERE / "mellum" / "config.json").read_text())
    one = {"rope_type": "yarn", "rope_theta": 9.0, "factor": 2.0}
    for rope, want in (({"full_attention": one, "sliding_attention": one}, (9.0, 0.0)), (None, (5e5, 1e4))):
        model = read_open_config(mellum | {"rope_parameters": rope}).model
        assert (model.rope_theta, model.window_rope_theta) == want


def test_kinds_of_layers_without_layer_types():
    """Lara's reference has its default, of period 5; in Kolibri every fifth layer has neither window nor positions."""
    lara, kolibri = (json.loads((HERE / name / "config.json").read_text()) for name in ("lara_mini", "kolibri1"))
    assert read_open_config(lara | {"layer_types": None}).model == read_open_config(lara).model
    changes = {"layer_types": None, "num_hidden_layers": 10}
    assert read_open_config(kolibri | changes).model.pattern == "sliding x 4 attention"


def test_null_is_false_in_deepseek_v3():
    source = json.loads((HERE / "deepseek_v3" / "config.json").read_text()) | {"rope_interleave": True}
    null = read_open_config(source | {"norm_topk_prob": None, "rope_interleave": None}).model
    assert null == read_open_config(source | {"norm_topk_prob": False, "rope_interleave": False}).model
    assert null.moe.gate != read_open_config(source).model.moe.gate


@pytest.mark.parametrize("name", ["minimax_m2", "ernie4_5_moe"])
def test_models_with_mixtrals_loss_balance_the_batch(name):
    """Both inherit that loss in transformers; the gate whose rule they share balances each sequence."""
    source = json.loads((HERE / name / "config.json").read_text())
    assert read_open_config(source).model.moe.losses.scope == "batch"


def test_switch_without_sparse_layers_is_dense():
    source = json.loads((HERE / "switch_transformers" / "config.json").read_text()) | {"num_sparse_encoder_layers": 0}
    source.pop("encoder_sparse_step", None)
    assert not any(sparse_layers(read_open_config(source).model)[: source["num_layers"]])


def test_a_dense_switch_survives_a_round_trip():
    source = json.loads((HERE / "switch_transformers" / "config.json").read_text())
    source |= {"num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0}
    config = read_open_config(source)
    assert read_open_config(keep_fields(source, config)).model == config.model


@pytest.mark.parametrize(
    ("first", "step", "layers"),
    [(0, 1, [0, 1, 2, 3, 4, 5]), (1, 2, [2, 4]), (2, 2, [2, 4]), (1, 3, [3]), (3, 1, [3, 4, 5]), (9, 1, [])],
)
def test_steps_between_the_layers_of_deepseek_survive_a_round_trip(first, step, layers):
    """DeepSeekMoE: layer n is MoE from the first one on where n is a multiple of the step; step 2 was not exported."""
    source = json.loads((HERE / "deepseek" / "config.json").read_text())
    changes = {"num_hidden_layers": 6, "first_k_dense_replace": first, "moe_layer_freq": step}
    model = read_open_config(source | changes).model
    assert [n for n, sparse in enumerate(sparse_layers(model)) if sparse] == layers
    if layers:
        written = write_config(Config(model=model), "deepseek")
        assert sparse_layers(read_open_config(written).model) == sparse_layers(model)


def test_a_tied_phimoe_with_a_bias_of_the_head_is_refused_by_its_own_fields():
    source = json.loads((HERE / "phimoe" / "config.json").read_text())
    tied = {"tie_word_embeddings": True, "lm_head_bias": True}
    with pytest.raises(
        ConfigError, match=r"config\.json: lm_head_bias=true: is read only with tie_word_embeddings=false"
    ):
        read_open_config(source | tied)


def test_scope_of_the_balance_loss_of_deepseek():
    source = json.loads((HERE / "deepseek" / "config.json").read_text())
    for per_sequence, scope in ((True, "sequence"), (False, "batch")):
        config = read_open_config(source | {"seq_aux": per_sequence})
        assert config.model.moe.losses.scope == scope
        assert write_config(config, "deepseek")["seq_aux"] == per_sequence


@pytest.mark.parametrize(
    ("config", "name", "coefficient"),
    [
        (mixtral_8x7b, "mixtral", 0.02),
        (mixtral_8x22b, "mixtral", 0.001),
        (qwen3_30b_a3b, "qwen3_moe", 0.001),
        (qwen1_5_moe_a2_7b, "qwen2_moe", 0.001),
        (deepseek_moe_16b, "deepseek", 0.001),
    ],
)
def test_published_coefficients_in_the_configs(config, name, coefficient):
    model = from_config_dict(config.get_config()).model
    assert balance.weight_here(FAMILIES[name], coefficient, model) == pytest.approx(model.moe.losses.balance)


def test_layers_of_qwen():
    """Sparse layers are 1, 3 and 5 of 6 by decoder_sparse_step=2, less 3; windows: even layers below the bound."""
    source = json.loads((HERE / "qwen2_moe" / "config.json").read_text())
    source |= {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3], "max_window_layers": 3}
    del source["layer_types"]
    kinds = layer_kinds(read_open_config(source).model)
    assert [kind.sparse for kind in kinds] == [False, True, False, False, False, True]
    assert [kind.window for kind in kinds] == [6, 0, 6, 0, 0, 0]


def test_a_mistral_with_listed_layers_has_windows_in_those():
    """transformers 4.57 and 5.24 read it as Ministral; without a list, or with null, all layers have the window."""
    source = json.loads((HERE / "mistral" / "config.json").read_text())
    listed = source | {"layer_types": ["full_attention", "sliding_attention"]}
    for fields, windows in ((source, [5, 5]), (source | {"layer_types": None}, [5, 5]), (listed, [0, 5])):
        config = read_open_config(fields)
        assert [kind.window for kind in layer_kinds(config.model)] == windows
        assert keep_fields(fields, config) == fields
        assert read_open_config(write_config(config, "mistral")).model == config.model


def test_jitter_of_phimoe_is_kept_both_ways():
    """``input_jitter_noise`` is that of the router's input, ``router_jitter_noise`` the tolerance of its selection."""
    source = json.loads((HERE / "phimoe" / "config.json").read_text()) | {"input_jitter_noise": 0.03}
    config = read_open_config(source)
    assert (config.model.moe.jitter, config.model.moe.gate.tolerance) == (0.03, 0.2)
    assert write_config(config, "phimoe")["input_jitter_noise"] == 0.03


def test_a_rotary_dim_is_read_where_no_factor_is_stated():
    """The factor of MiniMax-M2 wins over rotary_dim, as in transformers: 1 means all 8 dimensions of a head."""
    source = json.loads((HERE / "minimax_m2" / "config.json").read_text()) | {"rotary_dim": 6}
    plain = {"rope_type": "default", "rope_theta": 5e6}
    for beside, rotated in (
        ({"rope_parameters": plain}, 6),
        ({"rope_parameters": plain, "partial_rotary_factor": 1.0}, 8),
        ({"rope_parameters": plain | {"partial_rotary_factor": 1.0}}, 8),
        ({}, 4),
    ):
        model = read_open_config(source | beside).model
        assert (model.rope_dim or model.head_dim) == rotated


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok: must be there"),
        ("dots1", {"num_experts_per_tok": None}, "num_experts_per_tok: must be there"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "needs high_freq_factor and low_freq_factor",
        ),
        ("olmoe", {"clip_qkv": 0.0}, "clip_qkv=0.0: must be greater than 0"),
    ],
)
def test_what_the_library_has_no_default_for_is_not_guessed(name, fields, message):
    source = json.loads((HERE / name / "config.json").read_text()) | fields
    with pytest.raises(ConfigError, match=message):
        read_open_config(source)


def test_null_is_false_in_yarn_and_t5():
    """In the library an absent truncate means true, and absent scale_decoder_outputs what tie_word_embeddings says."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    source = json.loads((HERE / "llama" / "config.json").read_text())
    for stated, expected in (({}, True), ({"truncate": None}, False), ({"truncate": False}, False)):
        scaling = read_open_config(source | {"rope_scaling": yarn | stated}).model.rope_scaling
        assert scaling.truncate is expected
    source = json.loads((HERE / "t5" / "config.json").read_text())
    del source["scale_decoder_outputs"]
    for stated, expected in (({}, True), ({"scale_decoder_outputs": None}, False)):
        assert read_open_config(source | stated).model.scale_logits is expected


def test_the_older_field_of_scaling_replaces_the_newer_one():
    """Its base is the rope_theta beside it or the default, as in transformers; an empty field counts as absent."""
    source = json.loads((HERE / "llama" / "config.json").read_text())
    both = source | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "rope_scaling": {"type": "linear", "factor": 4.0},
    }
    for beside, theta in (({}, 1e4), ({"rope_theta": 2e4}, 2e4)):
        config = read_open_config(both | beside)
        assert config.model.rope_scaling == RopeScalingConfig(kind="linear", factor=4.0)
        assert config.model.rope_theta == theta
        assert keep_fields(both | beside, config) == both | beside
    assert read_open_config(both | {"rope_scaling": {}}).model.rope_theta == 5e5
    assert read_open_config(GPT_OSS_20B | {"rope_scaling": None}).model == read_open_config(GPT_OSS_20B).model


#: Two pairs of each head of 8 are rotated.
HALF_ROTATED = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "factor": 2.0},
    **{"original_max_position_embeddings": 16, "short_factor": [1.0, 1.0], "long_factor": [1.0, 2.0]},
}


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("deepseek_v2", {"head_dim": None, "hidden_size": 36}, {"d_model": 36, "head_dim": 8}),
        ("deepseek_v3", {"head_dim": None, "hidden_size": 36}, {"d_model": 36, "head_dim": 8}),
        ("deepseek_v3", {"num_key_value_heads": 3}, {"num_kv_heads": 4}),
        ("t5", {"d_kv": 5}, {"head_dim": 5}),
        ("switch_transformers", {"d_kv": 5}, {"head_dim": 5}),
        ("glm4_moe", {"rope_parameters": HALF_ROTATED}, {"rope_dim": 4}),
    ],
)
def test_sizes_that_a_family_replaces_are_not_checked_first(name, fields, expected):
    """Head sizes that latent attention replaces, or that relative positions or a partial rotation allow."""
    model = read_open_config(json.loads((HERE / name / "config.json").read_text()) | fields).model
    assert {field: getattr(model, field) for field in expected} == expected


def test_a_longrope_that_names_no_original_context_has_factor_1():
    source = json.loads((HERE / "llama_longrope" / "config.json").read_text())
    stated = ("factor", "original_max_position_embeddings")
    positions = {name: value for name, value in source["rope_parameters"].items() if name not in stated}
    assert source.keys().isdisjoint(stated)
    scaling = read_open_config(source | {"rope_parameters": positions}).model.rope_scaling
    assert (scaling.kind, scaling.factor) == ("longrope", 1.0)
    assert scaling.original_length == source["max_position_embeddings"]


def test_the_field_finetuned_of_a_scaling_is_ignored():
    source = json.loads((HERE / "llama" / "config.json").read_text())
    yarn = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64}
    plain, tuned = (read_open_config(source | {"rope_scaling": yarn | more}) for more in ({}, {"finetuned": True}))
    assert tuned == plain


def test_yarn_under_the_name_of_sarvams_code():
    source = json.loads((HERE / "sarvam_mla" / "config.json").read_text())
    yarn = {"factor": 40.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}
    scaled = (read_open_config(source | {"rope_scaling": yarn | {"type": kind}}) for kind in ("deepseek_yarn", "yarn"))
    assert next(scaled) == next(scaled)


@pytest.mark.parametrize("name", MISSING)
def test_an_architecture_that_is_not_computed_is_refused_with_all_that_it_needs(name):
    for kind in (name, f"{name}_text"):
        with pytest.raises(ConfigError, match=re.escape(f"model_type={kind!r}: needs {MISSING[name]}, which no model")):
            read_open_config({"model_type": kind})


def test_every_family_has_a_case():
    assert {path.name for path in OURS + THEIRS + ENCODER_DECODERS} >= set(FAMILIES)


def test_the_guide_lists_every_family_and_every_whole_model():
    text = (Path(__file__).resolve().parents[2] / "docs" / "open_models.md").read_text()
    table = text.partition("## Families")[2].partition("\n\n")[2].partition("\n\n")[0]
    listed = {name for row in table.splitlines()[2:] for name in re.findall("`(.*?)`", row.split("|")[1])}
    assert listed == {*FAMILIES, *WHOLE_MODELS}


@pytest.mark.parametrize("path", [pytest.param(path, id=f"{path.parent.name}-{path.name}") for path in OURS + THEIRS])
def test_an_export_keeps_what_training_on_shorter_rows_did_not_change(path):
    if not path.exists():
        pytest.skip(f"no reference models at {path}")
    source = json.loads((path / "config.json").read_text()) | {"unknown_here": [1, 2]}
    config = read_open_config(source)
    shorter = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=8))
    assert keep_fields(source, shorter) == source


def test_a_changed_setting_is_written_to_the_field_in_which_the_source_has_it():
    source = json.loads((HERE / "qwen2_moe" / "config.json").read_text())
    config = read_open_config(source)
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, rope_theta=5e5))
    written = keep_fields(source, changed)
    assert read_open_config(written).model == changed.model
    assert written["initializer_range"] == source["initializer_range"]


def test_a_changed_number_of_experts_leaves_no_stale_field():
    """transformers 5 reads num_local_experts last, so that a stale one would win."""
    source = json.loads((HERE / "qwen3_moe" / "config.json").read_text())
    source["num_local_experts"] = source.pop("num_experts")
    config = read_open_config(source)
    moe = dataclasses.replace(config.model.moe, num_experts=config.model.moe.num_experts - 2)
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    written = keep_fields(source, changed)
    names = {"num_experts", "num_local_experts"} & written.keys()
    assert {written[name] for name in names} == {moe.num_experts}


@pytest.mark.parametrize("base", [96, 128, 160, 192])
def test_models_scaled_from_a_base_width_are_exported(base):
    model = ModelConfig(d_model=256, base_d_model=base, moe=moe_config(dispatch="dropless"))
    again = read_open_config(write_config(Config(model=model))).model
    assert again.logit_scale == pytest.approx(model.logit_scale, rel=1e-12)


def test_a_model_that_no_family_expresses_is_refused(tmp_path):
    def refused(message: str, **changes):
        moe = changes.pop("moe", {})
        model = ModelConfig(**{"num_layers": 2, **changes}, moe=moe_config(**moe))
        with pytest.raises(ConfigError, match=message):
            write_config(Config(model=model))

    refused(r"mixtral lacks model\.sliding_window", sliding_window=8, pattern="attention sliding")
    refused(
        r"qwen3_moe lacks model\.moe\.shared_d_ff; .* others are further away$", qk_norm="head", moe={"shared_d_ff": 8}
    )
    refused(r"mixtral lacks model\.activation", activation="relu")
    refused(r": mixtral lacks model\.moe\.novice_experts; ", moe={"novice_experts": 1})
    refused(r"mixtral lacks model\.moe\.gate", moe={"gate": "dense_mixture"})
    refused(r": glm4_moe lacks model\.moe\.gate", moe={"gate": "deepseek_moe", "routing_scale": 2.0})
    refused(r"lacks model\.embedding_scale", embedding_scale=2.0, moe={"gate": "none"})
    with pytest.raises(ConfigError, match=r"model_type='gpt'"):
        write_config(Config(), "gpt")


def test_only_the_tables_of_vendors_name_a_family():
    """Besides the tables only the lists of families and of whole models name GLM, and adapters of other libraries."""
    package = Path(families.__file__).parents[2]
    ours = (path for path in package.rglob("*.py") if "peers" not in path.parts)
    naming = {path.name for path in ours if "glm4" in path.read_text().lower()}
    assert naming == {"glm.py", "deepseek.py", "__init__.py", "whole_models.py"}


def test_the_family_of_contributing(monkeypatch):
    """The table and the renamed family in CONTRIBUTING.md work as written."""
    text = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()
    blocks = text.partition("## Adding a family")[2].split("```python\n")[1:3]
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.partition("```")[0], names)
    for name in ("NEAREST", "NEAREST_CHAT"):
        family = names[name]
        monkeypatch.setitem(FAMILIES, family.model_type, family)
        source = json.loads((HERE / "mixtral" / "config.json").read_text())
        source |= {"model_type": family.model_type, "routed_experts": 4, "window": 6, "norm_topk_prob": True}
        config = read_open_config(source)
        assert (config.model.moe.num_experts, config.model.sliding_window, config.model.qk_norm) == (4, 6, "head")
        written = write_config(config, family.model_type)
        assert (written["routed_experts"], written["window"]) == (4, 6)
        assert read_open_config(written).model == config.model
        assert read_open_config({k: v for k, v in source.items() if k != "window"}).model.sliding_window == 0
        with pytest.raises(ConfigError, match=r"config\.json: routed_experts='4': must be an integer"):
            read_open_config(source | {"routed_experts": "4"})
    assert names["NEAREST_CHAT"].schema.model_fields["max_position_embeddings"].default == 65536
