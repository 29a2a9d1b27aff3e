"""Gates from a user's module: model.moe.gate=module:object."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from moe.config import ConfigError
from moe.routing.interface import Gate
from moe.routing.registry import default_gate, find_gate
from moe.routing.resolve import from_config_dict
from moe.routing.routing import route
from moe.training import evaluation, open_run
from moe.training.loop import train
from tests.tiny_text import build

MODULE = """
import jax
from moe.routing.interface import Gate, GateOutput
from moe.routing.selection import top_k

def last_experts(router_logits, inputs):
    probs = jax.nn.softmax(router_logits)
    weights, index = top_k(probs[..., ::-1], inputs.experts_per_token)
    return GateOutput(router_logits.shape[-1] - 1 - index, weights)

def wrong(router_logits, inputs):
    return router_logits

record = Gate(last_experts, "this file", experts_per_token=3, capacity_factor=1.5, eval_capacity_factor=2.5)
number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The folder with my_gates.py, on sys.path."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "my_gates.py").write_text(MODULE)
    (folder / "broken_gates.py").write_text("import my_gates\n1 / 0\n")
    (folder / "needy_gates.py").write_text("import not_installed\n")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in ("my_gates", "broken_gates", "needy_gates"):
        sys.modules.pop(name, None)


def tree_with(gate, **moe):
    tree = base.get_config()
    tree.model.moe.gate = gate
    for name, value in moe.items():
        tree.model.moe[name] = value
    return tree


def test_a_record_and_a_function_resolve(module):
    record = find_gate("my_gates:record")
    assert isinstance(record, Gate)
    moe = from_config_dict(tree_with("my_gates:record")).model.moe
    assert (moe.gate, moe.experts_per_token, moe.capacity_factor) == ("my_gates:record", 3, 1.5)
    bare = find_gate("my_gates:last_experts")
    assert bare == default_gate(record.choose, "my_gates:last_experts")
    moe = from_config_dict(tree_with("my_gates:last_experts", experts_per_token=1)).model.moe
    assert (moe.experts_per_token, moe.capacity_factor, moe.load_balancing_weight) == (1, 1.25, 0.01)
    routing = route(bare, jnp.log(jnp.asarray([[[0.5, 0.2, 0.3]]])), jnp.ones((1, 1), bool), experts_per_token=2)
    np.testing.assert_array_equal(routing.expert_index, [[[0, 2]]])


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("no_such_gates:rule", "no module 'no_such_gates' on PYTHONPATH, in the current directory, or beside"),
        ("my_gates:recrod", "module 'my_gates' has no 'recrod'; did you mean 'record'"),
        ("my_gates:number", "must be a Gate or a function, not int"),
        ("my_gates:", "must be module:object"),
        (":rule", "must be module:object"),
        ("my gates:rule", "must be module:object"),
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


def test_a_rule_that_returns_something_else_is_refused(module):
    with pytest.raises(ConfigError, match="must return a GateOutput"):
        route(find_gate("my_gates:wrong"), jnp.zeros((1, 2, 3)), jnp.ones((1, 2), bool), experts_per_token=1)


@pytest.fixture
def compilation_cache(tmp_path):
    """The train step is compiled once for both runs."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


def test_it_trains_resumes_and_evaluates(module, compilation_cache, tmp_path):
    directory = build(tmp_path / "data")
    tree = tree_with("my_gates:record", dispatch="einsum")
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
            "sample_tokens": 2,
        }
    )
    tree.optimizer.warmup_steps = 1
    workdir = tmp_path / "run"
    config = from_config_dict(tree)
    train(config, str(workdir), jax.devices()[:1])
    assert json.loads((workdir / "config.json").read_text())["model"]["moe"]["gate"] == "my_gates:record"
    rows = (workdir / "metrics.jsonl").read_bytes()
    shutil.rmtree(workdir / "checkpoints" / "2")
    train(config, str(workdir), jax.devices()[:1])  # from step 1
    assert (workdir / "metrics.jsonl").read_bytes() == rows
    opened = open_run.open_workdir(str(workdir), {})
    with jax.set_mesh(opened.program.mesh):
        heldout = evaluation.load_heldout(opened.program, opened.prepared)
        results = evaluation.evaluate(opened.program, opened.variables(), heldout)
    last = json.loads(rows.splitlines()[-1])
    assert any(np.isclose(results["all"]["loss"], value) for value in _numbers(last))


def _numbers(tree):
    if isinstance(tree, dict):
        return [number for value in tree.values() for number in _numbers(value)]
    return [tree] if isinstance(tree, (int, float)) else []
