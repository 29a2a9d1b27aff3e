"""Forms of ``model.moe``: values, sections of a tree, names on the command line, the flat form of older runs."""

import dataclasses
import json
from pathlib import Path

import pytest
from absl import flags
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.checkpoints import workdir
from moe.config import (
    Capacity,
    Changes,
    Config,
    ConfigError,
    Losses,
    ModelConfig,
    MoEConfig,
    build_layers,
    changes_of,
    check_field,
    command_line,
    load_python_file,
    read_run,
    to_dict,
)
from moe.config.names import nested
from moe.config.parse import build, from_config_dict, from_workdir_dict
from moe.config.registry import LAYERS, find_gate
from moe.configs import base
from moe.lab import identity
from moe.models.decoder import Transformer
from moe.routing.gates import Balanced, ScoredHash, SoftMoE, TopK
from scripts import settings_pages
from tests.fuzz_values import PLAUSIBLE

DATA = Path(__file__).parents[1] / "data"
ROOT = Path(__file__).parents[2]
FLAT = json.loads((DATA / "flat_moe_sections.json").read_text())


@pytest.mark.parametrize("name", FLAT)
def test_config_json_of_version_0_2_is_read(name, tmp_path):
    """Complete sections as version 0.2 wrote them, and their present form."""
    ours = from_config_dict({"model": {"moe": FLAT[name]["now"]}})
    assert from_workdir_dict({"model": {"moe": FLAT[name]["flat"]}}) == ours
    again = json.loads(json.dumps(to_dict(ours)))
    assert from_workdir_dict(again) == ours
    (tmp_path / "config.json").write_text(json.dumps({"model": {"moe": FLAT[name]["flat"]}}))
    assert build_layers(read_run(str(tmp_path / "config.json"))) == ours


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gate": "hash", "renormalise": 1}, "renormalise=True: the gate 'hash' does not read it"),
        ({"gate": "gshard", "experts_per_token": 3}, "experts_per_token=3: the gate 'gshard' does not read it"),
        ({"gate": "remoe", "routing_scale": 2.0}, "routing_scale=2.0: the gate 'remoe' does not read it"),
        ({"gate": "balanced", "bias_update": "sign"}, "bias_update='sign': the gate 'balanced' does not read it"),
        ({"gate": "switch", "slots_per_expert": 2}, "slots_per_expert=2: the gate 'switch' does not read it"),
        ({"gate": "mixtral", "experts_per_token": 9}, "model.moe.gate.k=9: must be at most num_experts=8"),
    ],
)
def test_the_flat_form_is_checked(fields, message):
    with pytest.raises(ConfigError, match=message):
        from_workdir_dict({"model": {"moe": fields}})


def test_a_layer_is_a_value_that_is_checked_at_construction():
    mixtral = MoEConfig(gate=TopK(k=2, renormalise=True), capacity=Capacity(1.25, 2.0), losses=Losses(balance=0.02))
    assert dataclasses.replace(mixtral, gate=LAYERS["mixtral"].gate) == LAYERS["mixtral"]
    assert from_config_dict(to_dict(Config(model=ModelConfig(moe=mixtral)))).model.moe.gate == mixtral.gate
    with pytest.raises(ConfigError, match=r"model\.moe\.gate\.k=9: must be at most num_experts=8"):
        Transformer(ModelConfig(moe=MoEConfig(num_experts=8, gate=TopK(k=9))), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=r"model\.num_kv_heads=3: must divide model\.num_heads=8"):
        Transformer(ModelConfig(num_kv_heads=3), rngs=nnx.Rngs(0))
    for make, message in (
        (lambda: Capacity(train=0.0), "model.moe.capacity.train=0.0: must be positive"),
        (lambda: Losses(balance=-1.0), "model.moe.losses.balance=-1.0: must be at least 0"),
        (lambda: MoEConfig(jitter=1.0), "model.moe.jitter=1.0: must be in"),
        (lambda: MoEConfig(gate="switch"), "model.moe.gate='switch': must be a Gate"),
        (lambda: MoEConfig(losses=Losses(load=0.1)), "model.moe.losses.load=0.1: needs the gate noisy_topk"),
        (lambda: MoEConfig(gate=SoftMoE(), losses=Losses()), "model.moe.capacity.train=1.25: must be 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


@pytest.mark.parametrize("gate_first", [True, False])
def test_a_gate_brings_the_constants_that_were_not_set(gate_first):
    tree = base.get_config()
    changes = {"gate": "switch", "jitter": 0.5, "gate.k": 3, "losses.z": 0.1}
    for name, value in changes.items() if gate_first else reversed(changes.items()):
        tree.model.moe.update_from_flattened_dict({name: value})
    moe = from_config_dict(tree).model.moe
    switch = LAYERS["switch"]
    assert moe.gate == dataclasses.replace(switch.gate, k=3)
    assert (moe.jitter, moe.losses) == (0.5, Losses(balance=0.01, z=0.1))
    copied = tree.copy()
    copied.model.moe.gate = "noisy_topk"
    moe = from_config_dict(copied).model.moe
    assert (moe.gate.k, moe.jitter, moe.capacity.train, moe.losses.z) == (3, 0.5, 2.0, 0.1)


@pytest.mark.parametrize("gate", LAYERS)
def test_every_layer_survives_conversion_between_all_forms(gate):
    tree = base.get_config()
    tree.model.moe.update(gate=gate, num_experts=16, accept_future_leak=True)
    tree.model.moe.dispatch = "einsum" if gate == "soft_moe" else "gather"
    config = from_config_dict(tree)
    kept = {"num_experts": 16, "accept_future_leak": True, "dispatch": config.model.moe.dispatch, "d_ff": 512}
    assert config.model.moe == dataclasses.replace(LAYERS[gate], **kept)
    assert from_config_dict(changes_of(config)) == config
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.fixture
def parse():
    """Parse a command line as programs do, and return its config."""

    def run(*words):
        values = flags.FlagValues()
        holder = flags.DEFINE_string("config", None, "", flag_values=values)
        others, texts = command_line.split(words)
        values(["main.py", *others])
        return build_layers(*command_line.layers(holder.value, texts))

    return run


GIVEN = "--config=configs/base.py"


@pytest.mark.parametrize("first", [True, False])
def test_the_command_line_names_a_gate_and_sets_its_fields_in_any_order(parse, first, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["--config.model.moe.gate=soft_moe", "--config.model.moe.gate.slots=3"]
    more = ["--config.model.moe.dispatch=einsum", "--config.model.moe.accept_future_leak=True"]
    moe = parse(GIVEN, *(words if first else words[::-1]), *more).model.moe
    assert moe.gate == SoftMoE(name="soft_moe", slots=3)
    assert moe.losses == Losses()
    assert parse(GIVEN, "--config.model.moe.gate", "none").model.moe.gate is None
    assert parse(GIVEN, "--config.model.moe.gate.k=3").model.moe.gate.k == 3


def test_gates_of_layers_are_parsed_from_names_or_sections(parse, monkeypatch):
    """They take the model's K; the name of the model's own gate stands for that gate with its fields."""
    monkeypatch.chdir(ROOT)
    words = ["--config.model.moe.gate=deepseek_v4", "--config.model.moe.gate.k=2", "--config.model.moe.gate.scale=3.0"]
    config = parse(GIVEN, *words, "--config.model.moe.layer_gates=('deepseek_v4_hash', 'deepseek_v4')")
    moe = config.model.moe
    assert moe.layer_gates == (dataclasses.replace(find_gate("deepseek_v4_hash"), k=2), moe.gate)
    assert moe.gate.scale == 3
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert from_config_dict(changes_of(config)) == config
    assert dataclasses.replace(moe, gate=dataclasses.replace(moe.gate, k=3)).layer_gates[0].k == 3

    def key(gate):
        model = dataclasses.replace(config.model, moe=dataclasses.replace(moe, layer_gates=(gate,)))
        return identity.canonical(dataclasses.replace(config, model=model))["gates"]

    assert key(moe.gate) == "deepseek_v4"
    assert key(find_gate("deepseek_v4_hash"))[:2] == ["deepseek_v4_hash", "deepseek_v4"]
    assert key(dataclasses.replace(moe.gate, scale=2.0))[0]["scale"] == 2.0
    with pytest.raises(ConfigError, match=r"layer_gates\.slots: no such field"):
        build(MoEConfig, {"layer_gates": [{"name": "hash", "slots": 2}]}, "model.moe.")


@pytest.mark.parametrize("gate", [Balanced(k=2), ScoredHash(k=2), TopK(k=2)])
def test_a_gate_as_a_value_has_a_balance_loss_if_it_chooses_by_its_logits(gate):
    assert (build(MoEConfig, {"gate": gate}, "model.moe.").losses.balance > 0) is gate.chooses


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--config.model.moe.gate=hash", "--config.model.moe.gate.score=sigmoid"), "gate.score: no such field"),
        (("--config.model.moe.gate.slot=3",), "gate.slot: no such field"),
        (("--config.model.moe.gate=swich",), "did you mean 'switch'"),
        (("--config.model.moe.gate.name=switch",), r"gate\.name: cannot be set; choose a gate by model\.moe\.gate"),
    ],
)
def test_the_command_line_refuses_what_a_gate_lacks(parse, words, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=message):
        parse(GIVEN, *words)


@pytest.mark.parametrize("word", ["gate.slot=3", "gate.renormalise=True"])
def test_a_config_file_that_sets_what_its_gate_lacks_gets_the_sentence_of_the_command_line(parse, word, tmp_path):
    field, _, value = word.partition("=")
    lines = ["from moe.config import Changes", "changes = Changes()", "changes.model.moe.gate = 'hash'"]
    (tmp_path / "plain.py").write_text("\n".join([*lines, "get_config = lambda: changes"]))
    lines.append(f"changes.model.moe.{field} = {value}")
    (tmp_path / "own.py").write_text("\n".join([*lines, "get_config = lambda: changes"]))
    with pytest.raises(ConfigError) as of_line:
        parse(f"--config={tmp_path}/plain.py", f"--config.model.moe.{word}")
    with pytest.raises(ConfigError) as of_file:
        parse(f"--config={tmp_path}/own.py")
    assert str(of_file.value) == str(of_line.value) == f"model.moe.{field}: no such field; fields here: name, k"


@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if layer.gate and not layer.gate.looks_ahead])
def test_a_name_on_the_command_line_brings_its_whole_layer(name, parse, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert parse(GIVEN, f"--config.model.moe.gate={name}").model.moe == dataclasses.replace(LAYERS[name], d_ff=512)


def test_no_gate_drops_the_fields_of_the_gate_that_it_replaces(parse, monkeypatch):
    monkeypatch.chdir(ROOT)
    dense = parse("--config=configs/upcycle_granular.py", "--config.model.moe.gate=none")
    assert (dense.model.moe.gate, dense.model.moe.num_experts) == (None, 32)
    with pytest.raises(ConfigError, match=r"gate\.k: no such field; a dense model has no gate"):
        parse(GIVEN, "--config.model.moe.gate=none", "--config.model.moe.gate.k=3")
    with pytest.raises(ConfigError, match=r"gate\.k: no such field; a dense model has no gate"):
        from_config_dict(Changes({"model.moe.gate": "none", "model.moe.gate.k": 3}))


def test_settings_of_the_command_line_are_words_of_three_forms(parse, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["--config.model.d_model", "64", "--noconfig.model.scan_layers", "-config.model.tie_embeddings"]
    config = parse(GIVEN, *words, "--config.data.domains", "python", "--config.data.domains=literature")
    model = config.model
    assert (model.d_model, model.scan_layers, model.tie_embeddings) == (64, False, True)
    assert config.data.domains == ("python", "literature")
    for text, value in (("(1, 3)", (1, 3)), ("[1]", (1,)), ("2", (2,)), ("()", ())):
        assert parse(GIVEN, f"--config.model.moe.layers={text}").model.moe.layers == value
    for word, message in (
        ("--config.model.d_model=wide", r"model\.d_model='wide': must be int"),
        ("--config.model.scan_layers=2", r"model\.scan_layers='2': must be bool"),
        ("--config.model.moe.layers=(1, ", r"layers='\(1, ': must be a tuple of int"),
        ("--config.model=3", r"model='3': must be set by its fields: vocab_size"),
        ("--config.model.d_model", r"--config\.model\.d_model: needs a value"),
        ("--noconfig.model.d_model", r"must be --config\.model\.d_model=VALUE"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(GIVEN, word)
    with pytest.raises(ConfigError, match=r"train\.num_steps='1\.5': must be int"):
        parse(GIVEN, "--config.train.num_steps", "1.5")


CHANGED = st.dictionaries(st.sampled_from(sorted(PLAUSIBLE)), st.integers(0, 30), max_size=6)


@settings(max_examples=60, deadline=None)
@given(CHANGED, st.randoms(use_true_random=False))
def test_a_setting_means_the_same_in_every_layer_and_form(drawn, random):
    """In a file, as text on the command line, in a nested dict; in any order; and after a round trip."""
    values = {name: PLAUSIBLE[name][index % len(PLAUSIBLE[name])] for name, index in drawn.items()}
    names = random.sample(list(values), len(values))
    words = [f"--config.{name}={values[name]}" for name in names[len(names) // 2 :]]
    file = {name: values[name] for name in names[: len(names) // 2]}
    made = []
    for form in (
        lambda: from_config_dict(Changes({name: values[name] for name in names})),
        lambda: from_config_dict(nested(values)),
        lambda: build_layers(file, _from_text(words)),
    ):
        try:
            made.append(form())
        except ConfigError:
            made.append(None)
    assert all(config == made[0] for config in made)
    if isinstance(made[0], Config):
        assert from_config_dict(changes_of(made[0])) == made[0]


def _from_text(words):
    return command_line.layers(str(ROOT / "configs" / "base.py"), command_line.split(words)[1])[-1]


def test_the_last_gate_and_the_last_config_file_win(parse, monkeypatch):
    monkeypatch.chdir(ROOT)
    gates = [f"--config.model.moe.gate={name}" for name in ("switch", "deepseek_moe")]
    assert parse(GIVEN, *gates).model.moe.gate == LAYERS["deepseek_moe"].gate
    config = parse(GIVEN, "--config=configs/dense.py", "--config=configs/quickstart.py", gates[0])
    assert config.model.num_layers == load_python_file("configs/quickstart.py").get_config().model.num_layers


def test_another_gate_for_the_config_of_a_run_brings_the_constants_of_its_paper(parse, tmp_path):
    """Constants of the run's old gate are dropped with it; what the run set itself stays."""
    mixtral = MoEConfig(capacity=Capacity(2.0, 2.0))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(Config(model=ModelConfig(moe=mixtral)))))
    given = f"--config={tmp_path}/config.json"
    switch = parse(given, "--config.model.moe.gate=switch").model.moe
    assert (switch.gate, switch.losses, switch.jitter) == (
        LAYERS["switch"].gate, LAYERS["switch"].losses, LAYERS["switch"].jitter,
    )  # fmt: skip
    assert switch.capacity == Capacity(2.0, LAYERS["switch"].capacity.eval)
    assert parse(given, "--config.model.moe.gate=hash").model.moe.gate == LAYERS["hash"].gate
    assert parse(given, "--config.model.moe.gate.k=3").model.moe.gate == dataclasses.replace(
        LAYERS["mixtral"].gate, k=3
    )


def test_errors_about_flat_names_on_the_command_line_give_the_new_name():
    with pytest.raises(ConfigError, match=r"experts_per_token: no such field; did you mean model\.moe\.gate\.k\?"):
        check_field("model.moe.experts_per_token")


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda moe: setattr(moe, "experts_per_token", 2), id="assigned"),
        pytest.param(lambda moe: moe.update(experts_per_token=2), id="updated"),
        pytest.param(lambda moe: build(MoEConfig, {"experts_per_token": 2}, "model.moe."), id="built"),
    ],
)
def test_errors_about_flat_names_in_a_config_give_the_new_name(use):
    with pytest.raises(ConfigError, match=r"experts_per_token: no such field; did you mean model\.moe\.gate\.k\?"):
        use(base.get_config().model.moe)


def test_keys_of_the_runs_of_the_suites_are_unchanged():
    """Records of all arms under the keys of version 0.2 are still found."""
    known = json.loads((DATA / "run_keys.json").read_text())
    found = {}
    for name in {key.split("/")[0] for key in known}:
        module = load_python_file(ROOT / "configs" / "ablations" / f"{name}.py")
        for size in ("laptop", "pod"):
            suite = module.get_suite(size)
            fields = {"steps": suite.longest, "learning_rate": suite.learning_rate, "parents": {}}
            found |= {f"{name}/{size}/{arm}": suite.run(arm, 3, **fields) for arm in suite.variants}
    assert {key: found[key] for key in known} == known


def test_the_pages_of_settings_are_current():
    """``python scripts/settings_pages.py`` writes them."""
    for name, page in settings_pages.pages().items():
        assert (ROOT / "docs" / "settings" / name).read_text() == page


def test_the_pages_of_settings_have_the_defaults_of_a_run():
    """A section's default may differ from its class's: the layer without a name is Mixtral's, with its balance loss."""
    assert (Config().model.moe.losses.balance, Losses().balance) == (0.02, 0.0)
    assert "| `balance` | float | `0.02` |" in settings_pages.pages()["moe.md"]


def test_rules_of_a_setting_are_read_from_its_field():
    assert {"data.directory", "mesh.expert", "model.remat", "train.writers"} <= set(workdir.FREE_FIELDS)
    assert {"optimizer.learning_rate", "train.num_steps"} <= set(workdir.CHANGEABLE_FIELDS)
    assert not {"model.d_model", "seed", "model.moe.gate.k"} & {*workdir.FREE_FIELDS, *workdir.CHANGEABLE_FIELDS}
    for value, message in ((-0.1, r"must be in \[0, 1\]"), (1.1, r"must be in \[0, 1\]")):
        with pytest.raises(ConfigError, match=f"start.drop_share={value}: {message}"):
            from_config_dict({"start": {"drop_share": value}})
    assert from_config_dict({"start": {"drop_share": 1.0}}).start.drop_share == 1
    with pytest.raises(ConfigError, match=r"data\.corruption_rate=0\.0: must be in \(0, 1\)"):
        from_config_dict({"data": {"corruption_rate": 0.0}})
