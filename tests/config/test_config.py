"""Settings: what is refused with which message, and lossless conversion between the three forms of a config."""

import dataclasses
import importlib
import typing

import pytest

from moe.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    MoEConfig,
    changes_of,
    check_field,
    validate_mesh,
)
from moe.config.model_section import Activation, Remat
from moe.config.moe_section import Dispatch
from moe.config.parse import from_config_dict
from moe.configs import base
from moe.dispatch.ffn import GATED_ACTIVATIONS, PLAIN_ACTIVATIONS
from moe.dispatch.modes import CONFIG_MODES
from moe.parallel.partition_specs import REMAT_POLICIES
from tests.helpers import tiny_model

LAYERS = ("dense", "switch", "gshard", "mixtral", "quickstart")


def changed(**overrides):
    tree = base.get_config()
    for path, value in overrides.items():
        *sections, name = path.split("__")
        node = tree
        for section in sections:
            node = node[section]
        node[name] = value
    return tree


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model__num_heads": 6}, "model.num_kv_heads=4: must divide model.num_heads=6"),
        ({"model__head_dim": 7}, "model.head_dim=7: must be even"),
        ({"model__activation": "silu"}, "model.activation='silu': must be one of swiglu, swiglu_clamped, geglu,"),
        ({"model__qk_norm": "yes"}, "model.qk_norm='yes': must be one of none, head, full, rotated"),
        ({"model__dtype": "float16"}, "model.dtype='float16': must be one of float32, bfloat16"),
        ({"model__remat": "some"}, "model.remat='some': must be one of none, hidden, outputs, attention, offload"),
        ({"model__norm_eps": 0.0}, "model.norm_eps=0.0: must be positive"),
        ({"model__residual_scale": 0.0}, "model.residual_scale=0.0: must be positive"),
        ({"model__attention_scale": -1.0}, "model.attention_scale=-1.0: must be at least 0"),
        ({"model__norms": "after", "model__encoder_layers": 2}, "model.norms='after': must be before where"),
        ({"model__window_rope_theta": 5.0}, "model.window_rope_theta=5.0: must be 0 without model.sliding_window"),
        ({"model__vocab_size": 0}, "model.vocab_size=0: must be at least 1"),
        ({"model__moe__gate": "mixtrall"}, "model.moe.gate='mixtrall': must be one of none,"),
        ({"model__moe__gate__k": 9}, "model.moe.gate.k=9: must be at most num_experts=8"),
        ({"model__moe__capacity__train": 0.0}, "model.moe.capacity.train=0.0: must be positive"),
        ({"model__moe__jitter": 1.5}, "model.moe.jitter=1.5: must be in [0, 1)"),
        ({"model__moe__dispatch": "scatter"}, "model.moe.dispatch='scatter': must be one of gather, einsum"),
        ({"model__moe__first_dense": 4}, "use model.moe.gate=none for a dense model"),
        ({"model__moe__group_size": 100}, "model.moe.group_size=100: must divide or be a multiple of"),
        ({"model__low_precision_in": "all"}, "model.low_precision_in='all': must be ffn with model.low_precision=none"),
        ({"model__moe__exchange_chunks": 2}, "model.moe.exchange_chunks=2: must be 1 unless dispatch is dropless"),
        (
            {"model__moe__exchange_chunks": 3, "model__moe__dispatch": "dropless"},
            "model.moe.exchange_chunks=3: must divide the 256 tokens of a group",
        ),
        ({"model__moe__exchange_hosts": 2}, "model.moe.exchange_hosts=2: must be 1 unless dispatch is dropless"),
        (
            {"model__moe__exchange": "all_gather"},
            "model.moe.exchange='all_gather': must be all_to_all unless dispatch is dropless",
        ),
        (
            {"model__moe__exchange": "all_gather", "model__moe__dispatch": "dropless", "model__moe__exchange_hosts": 2},
            "model.moe.exchange_hosts=2: must be 1 with exchange=all_gather, which sends a token once to each device",
        ),
        ({"model__moe__losses__balance": -0.5}, "model.moe.losses.balance=-0.5: must be at least 0"),
        ({"data__domains": ("a", "a")}, "data.domains=('a', 'a'): must name each domain once"),
        ({"data__streams": 3}, "data.streams=3: must divide train.batch_size=8, or be 0"),
        ({"data__weights": (1.0,)}, "data.weights=(1.0,): must be empty or one positive share for each of the 2"),
        ({"data__sequence_length": 1}, "data.sequence_length=1: must be at least 2"),
        ({"train__accumulation_steps": 3}, "train.accumulation_steps=3: must divide train.batch_size=8"),
        ({"train__num_steps": 5}, "optimizer.warmup_steps=30: must be below train.num_steps=5"),
        ({"optimizer__b2": 1.0}, "optimizer.b2=1.0: must be in [0, 1)"),
        ({"optimizer__b1": 1 - 1e-9}, "optimizer.b1=0.999999999: must be in [0, 1), in float32"),
        ({"optimizer__eps": 1e-50}, "optimizer.eps=1e-50: rounds to 0 in float32"),
        ({"model__norm_eps": 1e-40}, "model.norm_eps=1e-40: rounds to 0 in float32"),
        ({"model__moe__expert_dropout": 1 - 1e-9}, "must be in [0, 1), in float32"),
        ({"data__objective": "pairs"}, "data.objective='pairs': needs model.encoder_layers above 0"),
        (
            {"data__objective": "span"},
            "data.objective='span': must be one of causal, prefix_lm, span_corruption, pairs",
        ),
        ({"data__input_length": 64}, "data.input_length=64: must be 0 where model.encoder_layers=0"),
        ({"data__corruption_rate": 1.0}, "data.corruption_rate=1.0: must be in (0, 1)"),
        ({"data__mean_span": 0.5}, "data.mean_span=0.5: must be at least 1"),
        (
            {"data__objective": "prefix_lm", "model__sliding_window": 8},
            "model.sliding_window=8: must be 0 where data.objective is prefix_lm",
        ),
        ({"data__sequence_length": 0}, "data.sequence_length=0: must be at least 2"),
        ({"data__sequence_length": 2**31 - 1}, "data.sequence_length=2147483647: must be at most"),
        ({"model__vocab_size": 2**31 - 1}, "model.vocab_size=2147483647: must be at most"),
        ({"model__d_model": 2**31 - 1}, "model.d_model=2147483647: must be at most"),
        ({"model__head_dim": 2**31 - 2}, "model.head_dim=2147483646: must be at most"),
        ({"model__moe__num_experts": 2**31 - 1}, "model.moe.num_experts=2147483647: must be at most"),
        ({"model__moe__shared_d_ff": 2**31 - 1}, "model.moe.shared_d_ff=2147483647: must be at most"),
        ({"train__batch_size": 2**23}, "train.batch_size * data.sequence_length=2147483648: must be at most"),
        ({"train__sample_tokens": 10**6}, "train.sample_tokens=1000000: must be at most 10000"),
        ({"data__shuffle_window": 2**31 - 1}, "data.shuffle_window=2147483647: must be at most 1048576"),
        ({"data__heldout_rows": 10**6}, "data.heldout_rows=1000000: must be at most 65536"),
        ({"data__domains": tuple(str(n) for n in range(70_000))}, "data.domains: has 70000 entries; must have at most"),
        ({"data__domains": ("\ud800",)}, "must be valid UTF-8 without the character NUL"),
        ({"data__tokenizer": "a\0b"}, "data.tokenizer='a\\x00b': must be valid UTF-8 without the character NUL"),
        ({"optimizer__learning_rate": 0.0}, "optimizer.learning_rate=0.0: must be positive"),
        ({"mesh__expert": 0}, "mesh.expert=0: must be positive, or -1 to use"),
        ({"mesh__expert": -1}, "only one axis can be -1"),
    ],
)
def test_wrong_settings_are_refused(overrides, words):
    with pytest.raises(ConfigError) as error:
        from_config_dict(changed(**overrides))
    assert words in str(error.value)


@pytest.mark.parametrize("fields", [{"gate": "expert_choice"}, {"gate": "st_moe", "drop_policy": "probability"}])
def test_only_layers_of_an_encoder_may_look_ahead(fields):
    Config(model=tiny_model(encoder_layers=2, num_layers=2, layers=(0, 1), **fields))
    with pytest.raises(ConfigError, match="accept_future_leak=True"):
        Config(model=tiny_model(encoder_layers=2, num_layers=2, layers=(0, 2), **fields))


def test_the_message_of_an_error_is_one_line():
    assert (
        str(ConfigError("data.directory=a\nb: cannot\u2028\r\n be written")) == "data.directory=a b: cannot be written"
    )


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("model.moe.num_expert", "did you mean model.moe.num_experts?"),
        ("modle.d_model", "did you mean model.d_model?"),
        ("train.lr", "train.lr: no such field; did you mean optimizer.learning_rate?"),
        ("learning_rate", "did you mean optimizer.learning_rate?"),
        ("model.moe.top_k", "did you mean model.moe.gate.k?"),
        ("moe.top_k", "moe.top_k: no such field; did you mean model.moe.gate.k?"),
        ("model.moe.aux_loss_weight", "did you mean model.moe.losses.balance?"),
        ("gate.temp", "gate.temp: no such field; did you mean model.moe.gate.temperature?"),
        ("data.vocab_size", "did you mean model.vocab_size?"),
        ("optim.lr", "did you mean optimizer.learning_rate?"),
        ("batch", "did you mean train.batch_size?"),
        ("mesh.ep", "did you mean mesh.expert?"),
        ("model.d_model.x", "model.d_model is a single value, not a section"),
        ("nothing", "fields here: seed, model, data, mesh, optimizer, train"),
    ],
)
def test_unknown_field_names_the_nearest(path, words):
    with pytest.raises(ConfigError) as error:
        check_field(path)
    assert words in str(error.value)


def test_known_fields_pass():
    check_field("model.moe.num_experts")
    check_field("seed")


def test_unknown_keys_and_wrong_types_in_a_tree_are_refused():
    tree = dataclasses.asdict(Config())
    tree["model"]["d_modle"] = 3
    with pytest.raises(ConfigError, match=r"did you mean model\.d_model"):
        from_config_dict(tree)
    tree = dataclasses.asdict(Config())
    tree["model"]["d_model"] = 3.5
    with pytest.raises(ConfigError, match=r"model.d_model=3.5: must be int, not float"):
        from_config_dict(tree)
    tree["model"]["d_model"] = True
    with pytest.raises(ConfigError, match="must be int, not bool"):
        from_config_dict(tree)


def test_a_resolved_config_survives_the_round_trip():
    config = from_config_dict(base.get_config())
    assert config.model.moe.gate.k == 2  # Mixtral's
    assert config.model.moe.d_ff == config.model.d_ff
    assert from_config_dict(changes_of(config)) == config
    assert from_config_dict(dataclasses.asdict(config)) == config


def test_gate_constants_are_defaults_and_yield_to_overrides():
    switch = from_config_dict(changed(model__moe__gate="switch")).model.moe
    assert (switch.experts_per_token, switch.losses.balance, switch.jitter) == (1, 0.01, 0.01)
    ours = from_config_dict(changed(model__moe__gate="switch", model__moe__jitter=0.0)).model.moe
    assert ours.jitter == 0.0
    mixture = from_config_dict(changed(model__moe__gate="dense_mixture")).model.moe
    assert mixture.experts_per_token == mixture.num_experts


@pytest.mark.parametrize(
    ("sizes", "overrides", "words"),
    [
        ({"expert": 3}, {"train__batch_size": 9}, "model.moe.num_experts=8: must be divisible by mesh.expert = 3"),
        ({"data": 16}, {}, "must be divisible by mesh.data x mesh.fsdp x mesh.expert = 16"),
        ({"tensor": 8}, {}, "model.num_kv_heads=4: must be divisible by mesh.tensor = 8"),
        ({"fsdp": 3}, {"train__batch_size": 9}, "model.d_model=256: must be divisible by mesh.fsdp = 3"),
        (
            {"data": 8},
            {"model__moe__group_size": 512},
            "model.moe.group_size=512: number of groups=4: must be",
        ),
        (
            {"expert": 4},
            {"model__moe__dispatch": "dropless", "model__moe__exchange_hosts": 3},
            "model.moe.exchange_hosts=3: must divide mesh.expert = 4",
        ),
    ],
)
def test_an_impossible_mesh_is_refused(sizes, overrides, words):
    config = from_config_dict(changed(**overrides))
    with pytest.raises(ConfigError) as error:
        validate_mesh(config, {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | sizes)
    assert words in str(error.value)


def test_configs_of_layers_differ_only_by_overrides():
    configs = {name: from_config_dict(importlib.import_module(f"configs.{name}").get_config()) for name in LAYERS}
    assert {c.model.moe.gate_name for c in configs.values()} == {"none", "switch", "gshard", "mixtral"}
    shared = {dataclasses.replace(c.model, d_ff=1, scan_layers=True, moe=MoEConfig()) for c in configs.values()}
    assert len(shared) == 1  # the rest of the model is the same


@pytest.mark.parametrize(
    ("choices", "implemented"),
    [
        (Activation, {*GATED_ACTIVATIONS, *PLAIN_ACTIVATIONS}),
        (Dispatch, set(CONFIG_MODES)),
        (Remat, set(REMAT_POLICIES)),
    ],
)
def test_choices_of_the_schema_match_the_implementations(choices, implemented):
    assert set(typing.get_args(choices)) == implemented


def test_a_config_is_complete_and_valid_once_constructed():
    assert ModelConfig(d_ff=64).moe.d_ff == 64
    pairs = Config(model=ModelConfig(encoder_layers=1), data=DataConfig(sequence_length=128))
    assert (pairs.data.objective, pairs.data.input_length) == ("span_corruption", 128)
    for section, changes in (
        (Config().model, {"num_kv_heads": 3}),
        (Config().model, {"moe": MoEConfig(layers=(9,))}),
        (Config().data, {"weights": (-1.0,)}),
        (Config().mesh, {"fsdp": -1}),
        (Config().optimizer, {"moment_dtype": "bfloat16", "b2": 0.999}),
        (Config().train, {"accumulation_steps": 3}),
        (Config(), {"data": DataConfig(streams=3)}),
        (Config(), {"model": ModelConfig(moe=MoEConfig(group_size=100))}),
    ):
        with pytest.raises(ConfigError):
            dataclasses.replace(section, **changes)


def test_a_derived_field_follows_changes_of_its_source():
    tree = changes_of(Config(model=ModelConfig(d_ff=64)))
    tree.model.d_ff = 96
    assert from_config_dict(tree).model.moe.d_ff == 96
    tree = changes_of(Config(model=ModelConfig(d_ff=64, moe=MoEConfig(d_ff=32))))
    tree.model.d_ff = 96
    assert from_config_dict(tree).model.moe.d_ff == 32
    pairs = Config(model=ModelConfig(encoder_layers=1), data=DataConfig(objective="pairs"))
    assert changes_of(pairs).data.objective == "pairs"
