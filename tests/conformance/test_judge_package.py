"""The judge as a package of its own: what it imports, the recorder for PyTorch, the check of a test."""

import ast
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import moe.conformance.judge
from moe.conformance.judge import equations, evidence
from moe.conformance.judge.checking import check
from moe.conformance.judge.errors import InputError
from moe.conformance.judge.named_rules import RULES, find_rule
from moe.conformance.judge.rule import Variant, check_rule
from moe.conformance.judge.torch_recorder import record

FOLDER = Path(moe.conformance.judge.__file__).parent


def test_it_imports_its_own_modules_numpy_and_jax_only():
    """Others at the top of a file would break ``pip install moe-conform``; torch and pytest are the caller's."""
    found = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).split(".")[0])
            elif isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
    assert found - sys.stdlib_module_names == {"numpy", "jax", "torch", "pytest"}


def test_a_check_passes_or_fails_with_the_diagnosis():
    layer = evidence.random_layer(RULES["mixtral"], groups=2, tokens=8, num_experts=4)
    exact = equations.compute(find_rule("mixtral"), Variant(), layer)
    arrays = evidence.arrays_of(layer, {name: exact[name] for name in ("y", "grad_up")})
    check(arrays, "mixtral")
    with pytest.raises(AssertionError, match="the oracle computes if 2 experts per token instead of 1"):
        check(arrays, "mixtral", k=1)
    with pytest.raises(InputError, match="did you mean 'mixtral'"):
        check(arrays, "mixtrall")
    with pytest.raises(InputError, match="capacity: no field of a rule"):
        check(arrays, "mixtral", capacity=1)


def test_named_rules_fit_their_models():
    """E of Mixtral, Switch, Qwen2-MoE, Qwen3-MoE, OLMoE, gpt-oss and DeepSeek-V3."""
    experts = (8, 8, 60, 128, 64, 32, 256)
    for rule, number in zip(RULES.values(), experts, strict=True):
        check_rule(rule, number)


def test_the_recorder_records_a_router_without_gradient(monkeypatch):
    """torch has None where no gradient arrives; an earlier recorder ended in an AttributeError."""

    class Tensor(np.ndarray):
        grad = None
        device = None

        def requires_grad_(self, _):
            inputs.append(self)
            return self

        def transpose(self, first, second):
            return np.swapaxes(self, first, second)

        clone = detach = float = cpu = lambda self: self
        to = lambda self, **_: self  # noqa: E731

        def chunk(self, parts, axis):
            return [tensor(part) for part in np.split(self, parts, axis)]

        def numpy(self):
            return np.asarray(self)

        def backward(self):
            inputs[-1].grad = tensor(np.ones(inputs[-1].shape))

    def tensor(array):
        return np.asarray(array, np.float64).view(Tensor)

    torch = types.ModuleType("torch")
    generator = types.SimpleNamespace(manual_seed=lambda seed: None)
    names = {"zeros_like": lambda array: tensor(np.zeros(array.shape)), "Generator": lambda: generator}
    names["randn"] = lambda *shape, generator: tensor(np.ones(shape[0] if isinstance(shape[0], tuple) else shape))
    for name, function in names.items():
        setattr(torch, name, function)
    monkeypatch.setitem(sys.modules, "torch", torch)
    inputs = []

    class Block:
        gate = types.SimpleNamespace(weight=tensor(np.ones((2, 3))))  # [E,D]
        experts = types.SimpleNamespace(gate_up_proj=tensor(np.ones((2, 8, 3))), down_proj=tensor(np.ones((2, 3, 4))))

        def zero_grad(self, set_to_none):
            assert set_to_none

        def __call__(self, x):
            return x * 1

    layer, results = evidence.from_arrays(record(Block()), "recorded")
    assert layer.router.shape == (3, 2)
    assert layer.gate.shape == (2, 3, 4)
    assert not results["grad_router"].any()
    assert results["grad_up"].shape == (2, 3, 4)
