"""Gates from a user's module: model.moe.gate=module:object."""

import dataclasses
import functools
import importlib
import itertools
import json
import math
import re
import shutil
import signal
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from jax.experimental import io_callback

from moe.analysis import surgery
from moe.checkpoints import noted_code
from moe.checkpoints.parameters import read_biases
from moe.config import (
    Config,
    ConfigError,
    DataConfig,
    Losses,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    TrainConfig,
    references,
)
from moe.config.parse import from_config_dict
from moe.config.registry import find_layer
from moe.configs import base
from moe.layers.extras import Wrapper
from moe.layers.moe_layer import MoELayer
from moe.models import sampling
from moe.models.decoder import Transformer
from moe.models.factory import abstract_parameters
from moe.parallel.mesh import make_mesh
from moe.routing import balancing
from moe.routing.balancing_rules import BalancingRule
from moe.routing.interface import Gate, GateInputs, GateOutput, top_k
from moe.routing.own_gates import probe
from moe.routing.own_rules import probe_rule
from moe.routing.routing import route
from moe.system.fields import setting
from moe.training import evaluation, loop, open_workdir, start_run
from moe.training.own_code import PureCode
from moe.training.own_parts import probe_parts
from moe.training.step import _probe_own_gates
from moe.training.step import build as build_program
from moe.training.train import train
from tests import run_helpers
from tests.helpers import outputs, set_moe
from tests.tiny_text import build

MODULE = """
import dataclasses
import sys
import jax
import jax.numpy as jnp
from moe import Gate, GateOutput
from moe.config import Capacity, Losses, MoEConfig
from moe.routing.interface import top_k

@dataclasses.dataclass(frozen=True, kw_only=True)
class Last(Gate):
    k: int = 3

    def route(self, router_logits, inputs):
        probs = jax.nn.softmax(router_logits)
        weights, index = top_k(probs[..., ::-1], self.k)
        return GateOutput(router_logits.shape[-1] - 1 - index, weights)

@dataclasses.dataclass(frozen=True, kw_only=True)
class Needy(Last):
    table: tuple[int, ...]

layer = MoEConfig(gate=Last(), capacity=Capacity(train=1.5, eval=2.5), losses=Losses())
number = 3
calls = []

class Slots(Last):
    router = "slots"

@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(Last):
    table: object = dataclasses.field(default_factory=lambda: jnp.ones(2))

@dataclasses.dataclass(frozen=True, kw_only=True)
class Function(Last):
    function: object = len

class Half(Last):
    def experts_per_token(self, num_experts):
        return num_experts / 2

@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrong(Gate):
    what: str
    k: int = 2

    def route(self, router_logits, inputs):
        output = Last(k=2).route(router_logits, inputs)
        return {
            "raises": lambda: 1 / 0,
            "logits": lambda: router_logits,
            "none": lambda: None,
            "shape": lambda: output._replace(weights=output.weights[..., :1]),
            "bfloat16": lambda: output._replace(weights=output.weights.astype(jnp.bfloat16)),
            "fraction": lambda: output._replace(expert_index=output.expert_index * 1.0),
            "outside": lambda: output._replace(expert_index=output.expert_index + 1),
            "negative index": lambda: output._replace(expert_index=output.expert_index - 7),
            "twice": lambda: output._replace(expert_index=output.expert_index * 0),
            "negative": lambda: output._replace(weights=-output.weights),
            "exits": lambda: sys.exit(0),
            "probs": lambda: output._replace(probs=router_logits / 0),
            "three": lambda: Last(k=3).route(router_logits, inputs),
            "counts": lambda: calls.append(0) or output._replace(expert_index=(output.expert_index + len(calls)) % 6),
            "future": lambda: output._replace(
                weights=output.weights * jax.nn.sigmoid(jnp.sum(router_logits, axis=(1, 2), keepdims=True))
            ),
            "even": lambda: output._replace(
                weights=output.weights * jnp.max(jnp.abs(router_logits), axis=(1, 2), keepdims=True)
            ),
            "ids": lambda: output._replace(
                expert_index=(output.expert_index + jnp.roll(inputs.token_ids, -1, axis=1)[..., None]) % 6
            ),
            "padding": lambda: output._replace(weights=output.weights * jnp.mean(inputs.mask, axis=1)[:, None, None]),
            "batch": lambda: Last(k=2).route(router_logits - jnp.mean(router_logits, axis=0), inputs),
            "first": lambda: output._replace(
                weights=jnp.where(inputs.segment_ids[..., None] > 1, output.weights[:, :1], output.weights)
            ),
            "before": lambda: Last(k=2).route(jnp.cumsum(router_logits, axis=1), inputs),
            "place": lambda: output._replace(
                expert_index=(output.expert_index + jnp.arange(router_logits.shape[1])[:, None]) % 6
            ),
            "mesh": lambda: output._replace(
                weights=output.weights / jax.sharding.get_abstract_mesh().shape.get("data", 1)
            ),
            "alone": lambda: output._replace(weights=output.weights / router_logits.shape[1]),
        }[self.what]()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The folder with my_gates.py, on sys.path."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "my_gates.py").write_text(MODULE)
    (folder / "broken_gates.py").write_text("import my_gates\n1 / 0\n")
    (folder / "needy_gates.py").write_text("import not_installed\n")
    (folder / "exiting_gates.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in ("my_gates", "broken_gates", "needy_gates"):
        sys.modules.pop(name, None)


def tree_with(gate, **moe):
    tree = base.get_config()
    set_moe(tree, gate=gate, **moe)
    return tree


def test_a_gate_and_a_layer_resolve(module):
    layer = find_layer("my_gates:layer")
    moe = from_config_dict(tree_with("my_gates:layer")).model.moe
    assert (moe.gate_name, moe.experts_per_token, moe.capacity.train) == ("my_gates:layer", 3, 1.5)
    assert dataclasses.replace(find_layer("my_gates:Last").gate, name="my_gates:layer") == layer.gate
    moe = from_config_dict(tree_with("my_gates:Last", experts_per_token=2)).model.moe
    assert (moe.experts_per_token, moe.capacity.train, moe.losses.balance) == (2, 1.25, 0.01)
    routing = route(moe.gate, jnp.log(jnp.asarray([[[0.5, 0.2, 0.3]]])), GateInputs(jnp.ones((1, 1), bool)))
    np.testing.assert_array_equal(routing.expert_index, [[[0, 2]]])


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("no_such_gates:rule", "no module 'no_such_gates' on PYTHONPATH, in the current directory, or beside"),
        ("my_gates:lsyer", "module 'my_gates' has no 'lsyer'; did you mean 'layer'"),
        ("my_gates:number", "must be a Gate, not int"),
        ("my_gates:Slots", "its router='slots': must be one of linear, noisy, none"),
        ("my_gates:Half", r"its K=524288\.0: must be an integer"),
        ("my_gates:Table", r"its table: must be a number, a text or a tuple of them, .* \(unhashable type"),
        ("my_gates:Function", "its function: must be a number, a text or a tuple of them, which config.json can hold"),
        ("my_gates:", "must be module:object"),
        (":rule", "must be module:object"),
        ("my gates:rule", "must be module:object"),
        ("exiting_gates:rule", r"importing exiting_gates failed: ImportError: it calls sys\.exit\(0\)"),
        ("my_gates:Needy", r"Needy\(\) raises TypeError: .*missing 1 required .*argument: 'table'"),
        ("broken_gates:rule", "importing broken_gates failed: ZeroDivisionError: division by zero"),
        ("needy_gates:rule", "importing needy_gates failed: No module named 'not_installed'"),
        ("mixtrall", "did you mean 'mixtral'"),
    ],
)
def test_what_cannot_be_a_gate_is_refused_in_one_sentence(module, gate, message):
    with pytest.raises(ConfigError, match=message) as error:
        from_config_dict(tree_with(gate))
    assert str(error.value).startswith(f"model.moe.gate={gate!r}: ")
    assert "\n" not in str(error.value)


OTHERS = "the experts, weights or carry of a token depend on other tokens: read its own numbers alone, or set looks_a"
GENERATED = "gives a token of a text that is generated other experts, weights or carry than in evaluation: use the"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("raises", "route raises ZeroDivisionError: division by zero"),
        ("logits", "route must return a GateOutput, not "),
        ("none", "route must return a GateOutput, not NoneType"),
        ("shape", r"weights is float32\[2, 8, 1\], must be float32\[2, 8, 2\]"),
        ("bfloat16", r"weights is bfloat16\[2, 8, 2\], must be float32"),
        ("fraction", r"expert_index is float32\[2, 8, 2\], must be integers"),
        ("outside", "expert_index must be different experts from 0 to 5"),
        ("negative index", "expert_index must be different experts from 0 to 5"),
        ("twice", "expert_index must be different experts from 0 to 5"),
        ("negative", "weights must be finite and not negative"),
        ("exits", r"route raises ImportError: it calls sys\.exit\(0\)"),
        ("probs", "probs must be finite and not negative"),
        ("three", "returns 3 experts a token, must be K = 2"),
        ("counts", "route returns other experts or weights when it is called again, or on one device: it must be a"),
        ("future", OTHERS),
        ("even", OTHERS),
        ("ids", OTHERS),
        ("padding", OTHERS),
        ("batch", OTHERS),
        ("first", OTHERS),
        ("before", OTHERS),
        ("place", GENERATED),
        ("alone", GENERATED),
    ],
)
def test_a_wrong_rule_is_refused_in_one_sentence(module, what, message):
    wrong = importlib.import_module("my_gates").Wrong(what=what)
    with pytest.raises(ConfigError, match=f"^gate Wrong: .*{message}"):
        probe(wrong, 6)


def test_a_rule_that_reads_the_mesh_is_refused(module):
    """A run that is resumed on another mesh would follow another rule."""
    wrong = importlib.import_module("my_gates").Wrong(what="mesh")
    probe(wrong, 6)
    with (
        jax.set_mesh(make_mesh(MeshConfig(data=2), jax.devices()[:2])),
        pytest.raises(ConfigError, match=r"^gate Wrong: route returns other .* or on one device: .* read the mesh$"),
    ):
        probe(wrong, 6)


def test_a_rule_that_reverses_the_experts_is_accepted(module):
    probe(importlib.import_module("my_gates").Last(), 6)


def test_a_run_refuses_a_wrong_rule_before_anything_is_compiled(module, monkeypatch):
    monkeypatch.setattr(
        importlib.import_module("my_gates"),
        "bad",
        importlib.import_module("my_gates").Wrong(what="twice"),
        raising=False,
    )
    config = from_config_dict(tree_with("my_gates:bad"))
    with pytest.raises(ConfigError, match="gate Wrong: expert_index must be different experts"):
        build_program(config, make_mesh(config.mesh, jax.devices()[:1]))


def test_the_recipe_of_the_guide_for_contributors():
    """The class and the line of the table in CONTRIBUTING.md work as written."""
    text = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()
    recipe, line = re.findall(r"```python\n(.*?)```", text.partition("## Adding a gate")[2], re.DOTALL)[:2]
    names = {"dataclasses": dataclasses, "jax": jax, "setting": setting, "top_k": top_k}
    names |= {"Gate": Gate, "GateOutput": GateOutput, "MoEConfig": MoEConfig, "Losses": Losses}
    exec(recipe, names)
    names["gates"] = types.SimpleNamespace(Nearest=names["Nearest"])
    layer = eval(f"{{{line}}}", names)["nearest"]
    assert layer.losses.balance == 0.01
    probe(layer.gate, 4)
    # Logits ln 3 and ln 1 at a temperature of 1/2: weights 9/10 and 1/10.
    routing = route(layer.gate, jnp.log(jnp.asarray([[[1.0, 3.0, 0.5]]])), GateInputs(jnp.ones((1, 1), bool)))
    np.testing.assert_array_equal(routing.expert_index, [[[1, 0]]])
    np.testing.assert_allclose(routing.combine_weights, [[[0.9, 0.1]]], rtol=1e-5)
    with pytest.raises(ConfigError, match="temperature=0: must be positive"):
        names["Nearest"](temperature=0)


def test_the_recipe_of_a_balancing_rule():
    """The class and the line of the table in CONTRIBUTING.md work as written."""
    text = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()
    recipe, line = re.findall(r"```python\n(.*?)```", text.partition("## Adding a balancing rule")[2], re.DOTALL)[:2]
    names = {"dataclasses": dataclasses, "jnp": jnp, "setting": setting, "BalancingRule": BalancingRule}
    exec(recipe, names)
    rule = eval(f"{{{line}}}", names)["proportional"](0.5)
    report = types.SimpleNamespace(expert_load=jnp.asarray([[0.75, 0.25], [0.5, 0.5]]))  # of two layers
    state = jnp.broadcast_to(rule.first_state(2), (2, 2))
    # 1/2 · (1/2 − 3/4) = −1/8, and nothing at balance.
    np.testing.assert_array_equal(rule.next_state(state, report), [[-0.125, 0.125], [0.0, 0.0]])
    with pytest.raises(ConfigError, match="rate=-1"):
        names["Proportional"](-1)


@pytest.fixture
def guide(tmp_path, monkeypatch):
    """The modules my_gates and my_layers of docs/own_gates.md."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "own_gates.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text.partition("## A training loop")[0], re.DOTALL):
        with (tmp_path / re.search(r"my_\w+\.py", block)[0]).open("a") as file:
            file.write(block)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("my_gates"), importlib.import_module("my_layers")
    for name in ("my_gates", "my_layers"):
        sys.modules.pop(name, None)


def test_a_state_of_the_guide_is_a_moving_average_of_the_load(guide):
    gate = find_layer("my_gates:Damped").gate
    probe(gate, 4)
    logits = jnp.asarray([[[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 5.0, 5.0]]])
    # A bias of 2 moves expert 0, at 3 - 2 = 1, behind experts 1 and 2; the third token is padding.
    mask, state = jnp.asarray([[True, True, False]]), jnp.asarray([2.5, 0.0, 0.0, 0.0])
    routing = jax.jit(lambda logits: route(gate, logits, GateInputs(mask, selection_bias=state)))(logits)
    np.testing.assert_array_equal(routing.expert_index[0, 0], [1, 2])
    report = jax.jit(lambda routing: balancing.report(routing, mask, routing.chosen, k=2))(routing)
    following = gate.balancing.next_state(state, report.sums.bias_target)
    np.testing.assert_allclose(following, [2.25, 0.1, 0.1, 0.0], rtol=1e-6)  # 0.9 · state + 0.1 · (0, 1, 1, 0)


def test_a_rule_of_the_guide_has_momentum(guide):
    rule = find_layer("my_gates:Steered").gate.balancing
    probe_rule(find_layer("my_gates:Steered").gate, 4)
    # Loads 1/2 and 0 of two experts: errors 0 and 1/2. Speed 0.9·0.2 + 0 and 0.9·0 + 1/2; the bias moves by a tenth.
    report = types.SimpleNamespace(expert_load=jnp.asarray([0.5, 0.0]))
    state = rule.next_state({"bias": jnp.asarray([1.0, 1.0]), "speed": jnp.asarray([0.2, 0.0])}, report)
    np.testing.assert_allclose(state["speed"], [0.18, 0.5], rtol=1e-6)
    np.testing.assert_allclose(state["bias"], [1.018, 1.05], rtol=1e-6)


COUNT = itertools.count(1)


def moved(state, by):
    return jax.tree.map(lambda leaf: leaf + by, state)


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("first_state", lambda self, e: {}, "first_state returns no arrays"),
        (
            "first_state",
            lambda self, e: {"bias": jnp.zeros(e), "speed": jnp.zeros(())},
            "first_state returns float32[4], float32[]: ",
        ),
        ("next_state", lambda self, state, report: state["bias"], "next_state returns float32[2, 4]: must be the"),
        ("next_state", lambda self, state, report: 1 / 0, "it raises ZeroDivisionError"),
        ("selection_bias", lambda self, state: jnp.zeros(3), "selection_bias returns float32[3]"),
        ("first_state", lambda self, e: dict.fromkeys(("bias", "speed"), np.zeros(e, np.float32)), "first_state ret"),
        ("penalty", lambda self, state: jnp.nan, "penalty returns nan: must be a number of at least 0, or None"),
        ("next_state", lambda self, state, report: moved(state, jnp.log(report.expert_load)), "next_state returns"),
        ("next_state", lambda self, state, report: moved(state, next(COUNT)), "it returns another state when it is"),
        (
            "next_state",
            lambda self, state, report: jax.tree.map(lambda leaf: leaf - jnp.mean(leaf, 0, keepdims=True), state),
            "next_state depends on which layers it is given together",
        ),
        (
            "next_state",
            lambda self, state, report: moved(state, jnp.max(report.expert_load)),
            "next_state depends on which layers it is given together",
        ),
    ],
)
def test_a_wrong_rule_is_refused(guide, monkeypatch, name, method, message):
    monkeypatch.setattr(guide[0].Momentum, name, method)
    with pytest.raises(ConfigError, match=f"balancing rule Momentum: {re.escape(message)}"):
        probe_rule(find_layer("my_gates:Steered").gate, 4)


def test_a_balancing_rule_that_reads_the_mesh_is_refused(guide, monkeypatch):
    gate = find_layer("my_gates:Steered").gate
    monkeypatch.setattr(
        type(gate.balancing),
        "next_state",
        lambda self, state, report: moved(state, jax.sharding.get_abstract_mesh().size),
    )
    with (
        jax.set_mesh(make_mesh(MeshConfig(data=2), jax.devices()[:2])),
        pytest.raises(ConfigError, match=r"it returns another state .* or on one device: .* do not read the mesh$"),
    ):
        probe_rule(gate, 4)


def test_a_gate_with_a_state_of_before_is_refused(guide, monkeypatch):
    monkeypatch.setattr(guide[0].Steered, "state", ("sign", 0.1), raising=False)
    with pytest.raises(ConfigError, match="its state is not read; return a BalancingRule"):
        find_layer("my_gates:Steered")


def test_a_gate_may_route_by_document():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class ByDocument(Gate):
        router = "none"
        chooses = False
        k: int = 1

        def route(self, router_logits, inputs):
            index = inputs.segment_ids[..., None] % router_logits.shape[-1]
            return GateOutput(index, jnp.ones(index.shape, jnp.float32))

    moe = MoEConfig(gate=ByDocument(), num_experts=4, losses=Losses(), dispatch="dropless", group_size=8)
    model = Transformer(ModelConfig(vocab_size=32, d_model=8, num_layers=2, d_ff=8, moe=moe), rngs=nnx.Rngs(0))
    documents = jnp.asarray([[1, 1, 1, 2], [1, 2, 3, 0]])  # two rows in a group; 0 is padding
    load = nnx.jit(lambda model: model(jnp.ones((2, 4), jnp.int32), documents).layers.expert_load)(model)
    # Of seven tokens, documents 1, 2 and 3 have 4, 2 and 1.
    np.testing.assert_allclose(load, [[0, 4 / 7, 2 / 7, 1 / 7]] * 2, rtol=1e-6)


SIZES = {"d_model": 8, "d_ff": 12, "num_experts": 4}


def test_a_layer_of_the_guide_has_a_parameter_and_a_loss(guide):
    gate = find_layer("my_layers:Tempered").gate
    layer, plain = gate.layer(**SIZES, gate=gate, rngs=nnx.Rngs(0)), MoELayer(**SIZES, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 6, 8))
    layer.router.log_scale[...] = jnp.log(jnp.asarray([2.0, 1.0, 1.0, 1.0]))

    @jax.jit
    def run(x):
        _, report, routing = layer(x)
        return routing.router_logits, report.sparsity_penalty, plain.router(x)

    logits, penalty, expected = run(x)
    np.testing.assert_allclose(logits, expected * np.asarray([2.0, 1.0, 1.0, 1.0]), rtol=1e-5)
    # ln 2 once and 0 thrice: variance 3/16 · (ln 2)²
    np.testing.assert_allclose(penalty, 0.01 * 3 / 16 * np.log(2) ** 2, rtol=1e-5)


def test_a_layer_of_the_guide_adds_experts_that_groups_share(guide):
    gate = find_layer("my_layers:Grove").gate
    layer = gate.layer(**SIZES, gate=gate, dispatch="dropless", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 3, 8))
    (y, routing), plain = jax.jit(lambda x: (layer(x)[::2], MoELayer.__call__(layer, x)[0]))(x)
    w, added = layer.adjugate.experts.weights, np.asarray(y - plain)
    gate_proj, up, down, weights, experts, x = map(
        np.asarray, (w.gate, w.up, w.down, routing.combine_weights, routing.expert_index, x)
    )
    for token in range(3):
        hidden = [x[0, token] @ gate_proj[i] for i in range(2)]
        ffn = [(h / (1 + np.exp(-h)) * (x[0, token] @ up[i])) @ down[i] for i, h in enumerate(hidden)]
        expected = sum(weights[0, token, k] * ffn[experts[0, token, k] // 2] for k in range(2))
        np.testing.assert_allclose(added[0, token], expected, rtol=1e-3, atol=1e-5)


def test_a_layer_class_lists_the_parts_around_its_experts():
    class Doubled(Wrapper):
        name = "doubled"

        @classmethod
        def is_in(cls, moe):
            return moe.num_experts == 4

        def around(self, experts):
            def run(x, routing):
                y, kept = experts(x, routing)
                return 2 * y, kept

            return run

    class DoubledMoE(MoELayer):
        wrappers = (*MoELayer.wrappers, Doubled)

    x = jax.random.normal(jax.random.key(1), (1, 6, 8))
    y, plain = (outputs(kind(**SIZES, rngs=nnx.Rngs(0)))(x)[0] for kind in (DoubledMoE, MoELayer))
    np.testing.assert_array_equal(y, 2 * plain)


def test_models_have_the_layer_that_a_gate_names(guide):
    layer = dataclasses.replace(find_layer("my_layers:Tempered"), num_experts=4)
    model = ModelConfig(vocab_size=32, d_model=8, num_layers=2, moe=layer)
    router = nnx.to_pure_dict(abstract_parameters(model))["segment_0"]["block_0"]["moe"]["router"]
    assert router["log_scale"].shape == (2, 4)
    with pytest.raises(ConfigError, match=r"surgery does not know the parameters of .*, TemperedMoE"):
        surgery.check(model)
    with pytest.raises(ConfigError, match="gate='my_layers:Tempered': needs a TemperedMoE, not a MoELayer"):
        MoELayer(**SIZES, gate="my_layers:Tempered", rngs=nnx.Rngs(0))


def test_a_layer_that_cannot_be_made_is_one_sentence(guide, monkeypatch):
    def init(self, *arguments, **settings):
        MoELayer.__init__(self, *arguments, **settings)
        raise KeyError("scale")

    monkeypatch.setattr(guide[1].TemperedMoE, "__init__", init)
    model = ModelConfig(vocab_size=32, d_model=8, num_layers=2, moe=find_layer("my_layers:Tempered"))
    with pytest.raises(ConfigError, match=r"gate my_layers:Tempered: its layer raises KeyError: 'scale'"):
        abstract_parameters(model)


@pytest.mark.parametrize("layer", [3, dict])
def test_a_layer_that_is_no_moe_layer_is_refused(guide, monkeypatch, layer):
    monkeypatch.setattr(guide[1].Grove, "layer", layer)
    model = ModelConfig(vocab_size=32, d_model=8, num_layers=2, moe=find_layer("my_layers:Grove"))
    with pytest.raises(ConfigError, match=r"gate Grove: its layer=.* must be a class derived from moe\.MoELayer"):
        abstract_parameters(model)


def test_a_layer_gate_that_looks_ahead_is_refused_as_the_models_gate_is():
    class Ahead(Gate):
        k: int = 2
        looks_ahead = True

    moe = MoEConfig(layer_gates=(Ahead(name="ahead"),), dispatch="dropless")
    with pytest.raises(ConfigError, match=r"layer_gates='ahead': chooses the experts of a token by looking at later"):
        Config(model=ModelConfig(moe=moe))
    accepted = ModelConfig(moe=dataclasses.replace(moe, accept_future_leak=True, group_size=8))
    assert Config(model=accepted).model == accepted
    assert sampling.looks_ahead(accepted).startswith(
        "model.moe.layer_gates='ahead': routes by the other tokens of a group"
    )
    assert sampling.one_group_a_row(accepted) == accepted


@pytest.mark.slow
def test_a_users_rule_trains_and_continues_in_a_pipeline(guide, tmp_path):
    """Two steps on one device; the second again from the checkpoint, in two stages: losses and state agree."""
    settings = {
        "model.moe.gate": "my_gates:Steered",
        "model.moe.num_experts": 4,
        "train.num_steps": 2,
        "train.log_every": 1,
        "train.save_every": 1,
        "train.accumulation_steps": 2,
        "train.sample_tokens": 0,
        "optimizer.warmup_steps": 1,
    }
    config = run_helpers.tiny(build(tmp_path / "data"), **settings)
    train(config, str(tmp_path / "run"), jax.devices()[:1])
    alone = read_biases(tmp_path / "run", config.model)
    (router,) = (block["moe"]["router"] for block in alone["segment_0"].values())
    assert {name: array.shape for name, array in router["bias"].items()} == {"bias": (2, 4), "speed": (2, 4)}
    assert np.abs(router["bias"]["speed"]).max() > 0
    losses = [row["cross_entropy"] for row in run_helpers.rows(tmp_path / "run", "train")]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    staged = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1, pipeline=2))
    train(staged, str(tmp_path / "run"), jax.devices()[:2])
    again = [row["cross_entropy"] for row in run_helpers.rows(tmp_path / "run", "train")]
    np.testing.assert_allclose(again, losses, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        read_biases(tmp_path / "run", config.model),
        alone,
    )


def test_a_users_gate_trains_resumes_and_evaluates(module, tmp_path):
    directory = build(tmp_path / "data")
    tree = tree_with("my_gates:layer", dispatch="einsum")
    tree.model.update(
        {"vocab_size": 400, "d_model": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8}
    )
    tree.model.d_ff = tree.model.moe.d_ff = 16
    tree.data.update(
        {"dataset": "tiny_text/split", "directory": str(directory), "sequence_length": 16, "heldout_rows": 8}
    )
    tree.train.update(
        {
            "batch_size": 8,
            "num_steps": 2,
            "log_every": 1,
            "eval_every": 2,
            "save_every": 1,
            "sample_tokens": 0,
        }
    )
    tree.optimizer.warmup_steps = 1
    workdir = tmp_path / "run"
    config, programs = from_config_dict(tree), run_helpers.compile_once()
    train(config, str(workdir), jax.devices()[:1], make_program=programs)
    assert json.loads((workdir / "config.json").read_text())["model"]["moe"]["gate"] == {
        "name": "my_gates:layer",
        "k": 3,
    }
    rows = (workdir / "metrics.jsonl").read_bytes()
    shutil.rmtree(workdir / "checkpoints" / "2")
    (workdir / noted_code.NOTE).write_text(json.dumps({"sha256": "before"}))
    train(config, str(workdir), jax.devices()[:1], make_program=programs)  # from step 1, with edited code
    assert (workdir / "metrics.jsonl").read_bytes() == rows
    assert json.loads((workdir / "changes.jsonl").read_text())["changes"].keys() == {"code of the user's modules"}
    assert not noted_code.edited_code(config, epath.Path(workdir))
    opened = open_workdir.open_workdir(str(workdir), {})
    with jax.set_mesh(opened.program.mesh):
        heldout = evaluation.load_heldout(opened.program, opened.prepared)
        results = evaluation.evaluate(opened.program, opened.variables(), heldout)
    (last,) = (row for row in run_helpers.rows(workdir, "heldout/all") if row["step"] == 2)
    np.testing.assert_allclose(results["all"]["loss"], last["loss"], rtol=1e-5)


CHANGED = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changing(Gate):
    """Another rule after something has changed, as of a counter."""

    k: int = 2

    def route(self, router_logits, inputs):
        values, index = top_k(router_logits, self.k)
        return GateOutput(index, jax.nn.softmax(values * (1.0 + len(CHANGED)), axis=-1))


@pytest.mark.slow
def test_a_rule_that_changed_before_the_programs_were_traced_ends_the_first_step(monkeypatch, tmp_path):
    def placed(batch, mesh, place=loop.place):
        CHANGED.append(1)
        return place(batch, mesh)

    monkeypatch.setattr(loop, "place", placed)
    settings = run_helpers.SETTINGS | {"model.moe.gate": f"{__name__}:Changing", "train.num_steps": 3}
    config = run_helpers.tiny(build(tmp_path / "data"), **settings)
    with pytest.raises(ConfigError, match=r"tests\.routing\.test_own_gates: the model computes something else when"):
        train(config, str(tmp_path / "run"), jax.devices()[:1], quiet=True)
    assert not (tmp_path / "run" / "checkpoints" / "1").exists()


def test_code_that_is_traced_as_something_else_is_refused(tmp_path):
    """Programs are traced once: a counter, or a file that is read, makes other rules in training and evaluation."""
    tree = tree_with(f"{__name__}:Changing")
    tree.model.update({"vocab_size": 32, "d_model": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1})
    config = from_config_dict(tree)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    CHANGED.clear()
    with jax.set_mesh(mesh):
        pure = PureCode(build_program(config, mesh), config)
        pure.check()
        CHANGED.append(1)
        with pytest.raises(ConfigError, match="the model computes something else when its code is called again"):
            pure.check()
    CHANGED.clear()

    def refused(function, message):
        program = types.SimpleNamespace(traced=lambda: (jax.make_jaxpr(function)(1.0),))
        with pytest.raises(ConfigError, match=message):
            PureCode(program, config)

    answer = jax.ShapeDtypeStruct((), jnp.float32)
    refused(
        lambda x: jax.lax.cond(x > 0, lambda: jax.pure_callback(np.float32, answer, x), lambda: x), r"\(pure_callback\)"
    )
    refused(lambda x: x + io_callback(np.float32, answer, x), r"calls back into Python \(io_callback\)")
    elsewhere = types.SimpleNamespace(traced=functools.partial(jax.make_jaxpr(jnp.reshape), 1.0))
    with pytest.raises(ConfigError, match=r"tests\.routing\.test_own_gates: tracing the model with its code: TypeErr"):
        PureCode(elsewhere, config)
    kept = []
    jax.make_jaxpr(kept.append)(1.0)
    refused(lambda x: x + kept[0], "computes with an array that it kept of an earlier call")
    refused(lambda x: x + [][0], rf"{re.escape(__file__)}, line \d+: IndexError: list index out of range")
    constants = types.SimpleNamespace(traced=lambda: (jax.make_jaxpr(lambda x: x + np.arange(9) * len(CHANGED))(1.0),))
    pure = PureCode(constants, config)
    folder = epath.Path(tmp_path)
    first = pure.computed()
    assert not noted_code.other_values(first, folder)
    noted_code.note_code(config, folder, first)
    assert not noted_code.other_values(first, folder)
    longer = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=8))
    assert not noted_code.other_values(PureCode(constants, longer).computed(), folder)
    CHANGED.append(1)
    later = PureCode(constants, config).computed()  # as after a resume, with another file or environment
    ((name, changed),) = noted_code.other_values(later, folder).items()
    assert (name, changed) == ("what the user's modules compute", [first["computed"], later["computed"]])
    ((name, _),) = noted_code.other_values(PureCode(constants, longer).computed(), folder).items()
    assert name == "what the user's modules compute, as other settings or versions may"
    with pytest.raises(ConfigError, match="the model computes something else"):
        pure.check()
    CHANGED.clear()


class PerDevice(Gate):
    """Weights that the number of devices decides."""

    k: int = 2

    def route(self, router_logits, inputs):
        values, index = top_k(router_logits, self.k)
        return GateOutput(index, jax.nn.softmax(values, axis=-1) / jax.device_count())


def test_a_gate_that_reads_the_devices_is_said_on_another_mesh(monkeypatch, tmp_path):
    """Another mesh splits the same operations otherwise: what is compared is traced for one device."""
    tree = tree_with(f"{__name__}:PerDevice")
    tree.model.update({"vocab_size": 32, "d_model": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1})
    folder = epath.Path(tmp_path)

    def computed(**sizes):
        tree.mesh.update(sizes)
        config = from_config_dict(tree)
        mesh = make_mesh(config.mesh, jax.devices()[: math.prod(sizes.values())])
        with jax.set_mesh(mesh):
            return config, PureCode(build_program(config, mesh), config).computed()

    config, alone = computed(data=1, expert=1)
    noted_code.note_code(config, folder, alone)
    assert not noted_code.other_values(computed(data=2, expert=2)[1], folder)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert list(noted_code.other_values(computed(data=2, expert=2)[1], folder)) == ["what the user's modules compute"]


@pytest.mark.parametrize(
    "after",
    [
        lambda y, x: y + jnp.mean(y, axis=1, keepdims=True),
        lambda y, x: y - x[::-1],
        lambda y, x: y + jax.lax.cummax(x, 0),
        lambda y, x: y * jnp.nan,
    ],
)
def test_a_layer_that_reads_other_tokens_is_refused(guide, monkeypatch, after):
    layer = dataclasses.replace(find_layer("my_layers:Tempered"), num_experts=4, d_ff=8)
    config = Config(model=ModelConfig(vocab_size=32, d_model=8, num_layers=2, moe=layer))
    probe_parts(config)

    def call(self, x, mask=None, **options):
        y, report, routing = MoELayer.__call__(self, x, mask, **options)
        return after(y, x), report, routing

    monkeypatch.setattr(guide[1].TemperedMoE, "__call__", call)
    with pytest.raises(ConfigError, match=r"gate 'my_layers:Tempered': the output of its layer (for a|is not finite)"):
        probe_parts(config)
    monkeypatch.setattr(guide[1].TemperedMoE, "__call__", lambda self, x, *_, **__: (x, None, None))
    with pytest.raises(ConfigError, match="its layer must return y, a LayerReport and a Routing, not Array, NoneType"):
        probe_parts(config)


def test_a_layers_penalty_is_a_number(guide, monkeypatch):
    """An array would be summed into the loss."""
    layer = dataclasses.replace(find_layer("my_layers:Tempered"), num_experts=4, d_ff=8)

    def call(self, x, mask=None, **options):
        y, report, routing = MoELayer.__call__(self, x, mask, **options)
        return y, dataclasses.replace(report, sparsity_penalty=jnp.ones(3)), routing

    monkeypatch.setattr(guide[1].TemperedMoE, "__call__", call)
    with pytest.raises(
        ConfigError, match=r"sparsity_penalty that its layer reports must be a number, not an array \[3"
    ):
        probe_parts(Config(model=ModelConfig(vocab_size=32, d_model=8, num_layers=2, moe=layer)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Late(Gate):
    """Right for the first tokens of a group, or in training alone."""

    k: int = 2
    where: str = "later"

    def route(self, router_logits, inputs):
        values, index = top_k(router_logits, self.k)
        wrong = {
            "later": jnp.arange(index.shape[1])[None, :, None] >= 8,
            "many groups": jnp.arange(index.shape[0])[:, None, None] >= 2,
            "evaluation": jnp.asarray(not inputs.train),
            "generation": jnp.asarray(inputs.positions is not None),
            "high": values[..., :1] > 8,
        }[self.where]
        return GateOutput(jnp.where(wrong, index[..., :1], index), jax.nn.softmax(values))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("later", "each token; it is not for 4 groups of 16 tokens in evaluation"),
        ("many groups", "each token; it is not for 4 groups of 16 tokens in evaluation"),
        ("evaluation", "each token; it is not for 2 groups of 8 tokens in evaluation"),
        ("generation", "each token; it is not for 14 groups of 1 tokens in generation"),
    ],
)
def test_a_gate_is_probed_in_the_shapes_of_the_run_and_outside_of_training(where, message):
    """Two groups of 8 tokens alone let an expert repeat for all later tokens."""
    config = Config(
        model=ModelConfig(
            d_model=16, num_layers=1, vocab_size=32, moe=MoEConfig(gate=Late(where=where), num_experts=8)
        ),
        data=DataConfig(sequence_length=16),
        train=TrainConfig(batch_size=4),
    )
    with pytest.raises(ConfigError, match=f"gate Late: expert_index must be different experts .*{message}"):
        _probe_own_gates(config)


def test_wrong_choices_of_a_step_are_found_inside_the_program():
    """Token 1 has expert 0 twice; it is not sent, and the first step ends with the layer's number."""
    gate, mask = Late(where="high"), jnp.asarray([[True, True, True]])
    probe(gate, 8)  # whose logits are lower
    logits = jnp.asarray([[[3.0, 1.0, 2.0], [9.0, 1.0, 2.0], [0.0, 5.0, 4.0]]])
    routing = jax.jit(lambda logits: route(gate, logits, GateInputs(mask)))(logits)
    assert routing.broken.tolist() == [[False, True, False]]
    assert routing.chosen.tolist() == [[[True] * 2, [False] * 2, [True] * 2]]
    assert routing.combine_weights[0, 1].tolist() == [0, 0]
    for output in (
        GateOutput(jnp.asarray([[[0, 3]]]), jnp.ones((1, 1, 2))),  # there is no expert 3
        GateOutput(jnp.asarray([[[0, -1]]]), jnp.ones((1, 1, 2))),
        GateOutput(jnp.asarray([[[0, 1]]]), jnp.asarray([[[1.0, -1.0]]])),
        GateOutput(jnp.asarray([[[0, 1]]]), jnp.asarray([[[1.0, jnp.nan]]])),
    ):
        fixed = type("Fixed", (Gate,), {"route": lambda self, logits, inputs, output=output: output, "k": 2})()
        assert route(fixed, logits[:, :1], GateInputs(mask[:, :1])).broken.all()
        unsent = output._replace(accepted=jnp.asarray([[[True, False]]]))  # what is not sent may be anything
        fixed = type("Fixed", (Gate,), {"route": lambda self, logits, inputs, output=unsent: output, "k": 2})()
        assert not route(fixed, logits[:, :1], GateInputs(mask[:, :1])).broken.any()
    right = GateOutput(jnp.asarray([[[0, 1]]]), jnp.ones((1, 1, 2)))
    negative = right._replace(probs=jnp.asarray([[[1.0, -1.0, 1.0]]]))
    fixed = type("Fixed", (Gate,), {"route": lambda self, logits, inputs: negative, "k": 2})()
    assert route(fixed, logits[:, :1], GateInputs(mask[:, :1])).broken.all()
    fixed = type("Fixed", (Gate,), {"route": lambda self, logits, inputs: right, "k": 2})()
    for bias, broken in ((0.0, False), (-jnp.inf, True)):  # a balancing rule's, such as the logarithm of a load of 0
        inputs = GateInputs(mask[:, :1], selection_bias=jnp.asarray([0.0, bias, 0.0]))
        assert route(fixed, logits[:, :1], inputs).broken.item() is broken
    config = types.SimpleNamespace(model=types.SimpleNamespace(moe=types.SimpleNamespace(gates=(gate,))))
    metrics = types.SimpleNamespace(layers=types.SimpleNamespace(broken_tokens=np.asarray([0.0, 1.0])))
    with pytest.raises(ConfigError, match=r"gate Late: step 1 has .* expert twice.*, per MoE layer: \[0, 1\]$"):
        loop.refuse_wrong_choices(config, metrics, 1)
    config.model.moe.gates = (find_layer("mixtral").gate,)
    loop.refuse_wrong_choices(config, metrics, 1)  # non-finite logits of a built-in gate are logged


def test_errors_of_a_gate_that_appear_when_it_is_traced_name_it():
    """sys.exit(0) ended a run with exit code 0 and no step; a leaked tracer was a traceback."""
    leaked = []

    def traced(rule):
        gate = type("Traced", (Gate,), {"route": lambda self, logits, inputs: rule(logits), "k": 2})()
        return jax.jit(lambda logits: route(gate, logits, GateInputs(jnp.ones((1, 4), bool))).combine_weights)

    def leaks(logits):
        leaked.append(jax.nn.softmax(top_k(logits, 2)[0]))
        return GateOutput(top_k(logits, 2)[1], leaked[0])

    def exits(logits):
        return sys.exit(0)

    class Odd(BaseException):
        pass

    def odd(logits):
        raise Odd("x")

    logits = jnp.ones((1, 4, 3))
    with pytest.raises(ConfigError, match=r"^gate Leaks: route raises UnexpectedTracerError"):
        probe(type("Leaks", (Gate,), {"route": lambda self, logits, inputs: leaks(logits), "k": 2})(), 3)
    for rule, message in (
        (exits, r"ImportError: it calls sys\.exit\(0\)"),
        (odd, "ImportError: it raises Odd: x"),
        (lambda logits: GateOutput(*(logits,) * 2) if logits[0, 0, 0] > 0 else None, "TracerBoolConversionError"),
    ):
        with pytest.raises(ConfigError, match=f"^gate Traced: route raises {message}"):
            traced(rule)(logits)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("parameter_loss", lambda *_: 1 / 0, "gate Late: parameter_loss raises ZeroDivisionError: division by zero"),
        (
            "parameter_loss",
            lambda gate, router, *_: router[0],
            r"parameter_loss returns an array \[4\]: must be a number",
        ),
        ("experts_per_token", lambda *_: 0, r"model\.moe\.gate\.k=0: must be at least 1"),
    ],
)
def test_wrong_methods_of_a_gate_are_refused(monkeypatch, attribute, value, message):
    monkeypatch.setattr(Late, attribute, value)

    def apply(x):
        layer = MoELayer(d_model=8, d_ff=8, num_experts=4, gate=Late(), rngs=nnx.Rngs(0))
        return layer(x, train=True, rng=jax.random.key(0))[0]

    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(apply, jnp.zeros((1, 4, 8)))


def test_an_import_that_raises_no_exception_is_one_sentence(module, monkeypatch):
    """KeyboardInterrupt of a module, where Ctrl-C itself has a handler that ends the program."""
    for number, line in enumerate(("raise KeyboardInterrupt", "raise BaseException('x')")):
        (module / f"odd_gates{number}.py").write_text(line + "\n")
    with pytest.raises(ConfigError, match="importing odd_gates1 failed: ImportError: it raises BaseException: x"):
        from_config_dict(tree_with("odd_gates1:rule"))
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.default_int_handler)  # ignored in the background
    with pytest.raises(KeyboardInterrupt):  # perhaps the user's, in a notebook
        from_config_dict(tree_with("odd_gates0:rule"))
    monkeypatch.setattr(signal, "getsignal", lambda _: lambda *_: None)
    with pytest.raises(ConfigError, match="importing odd_gates0 failed: ImportError: it raises KeyboardInterrupt"):
        from_config_dict(tree_with("odd_gates0:rule"))


def test_an_edited_gate_is_said_on_resume(module, tmp_path):
    config = from_config_dict(tree_with("my_gates:Last"))
    folder = epath.Path(tmp_path)
    assert not noted_code.edited_code(config, folder)
    noted_code.note_code(config, folder)
    assert not noted_code.edited_code(config, folder)
    (folder / noted_code.NOTE).write_text(json.dumps({"sha256": "before"}))
    ((name, (old, new)),) = noted_code.edited_code(config, folder).items()
    assert (name, old, len(new)) == ("code of the user's modules", "before", 16)
    start_run._apply_changes(config, {}, 3, folder, (said := []).append)
    assert said == [f"changed from step 3 on: code of the user's modules 'before' to {new!r}"]
    assert json.loads((folder / "changes.jsonl").read_text()) == {"step": 3, "changes": {name: [old, new]}}
    plain = from_config_dict(tree_with("mixtral"))
    (folder / noted_code.NOTE).unlink()
    noted_code.note_code(plain, folder)
    assert not (folder / noted_code.NOTE).exists()


def test_a_refused_module_comes_with_all_that_the_command_needs(module, tmp_path, monkeypatch):
    """First --allow_module was asked for, and then PYTHONPATH."""
    allow = r"if you trust it, add --allow_module=far\.gates"
    with pytest.raises(
        ConfigError, match=allow + ", and begin the command with PYTHONPATH=DIR, where DIR is the folder"
    ):
        references.refuse_modules({"model.moe.gate": "far.gates:Rule"})
    (module / "fresh_gates.py").touch()
    with pytest.raises(ConfigError, match=r"add --allow_module=fresh_gates$"):
        references.refuse_modules({"model.moe.gate": "fresh_gates:Rule"})
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "far").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError, match=allow + "$"):
        references.refuse_modules({"model.moe.gate": "far.gates:Rule"})
