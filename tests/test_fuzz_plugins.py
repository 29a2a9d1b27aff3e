"""Random gates, optimizers and writers of a user: each is refused in one sentence, or works once accepted.

Nothing is trained: only the checks at the start of a run are executed. Cases are drawn by hypothesis, the same in every
run. See tests/test_fuzz.py for the command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.checkpoints.integrity import checksums
from moe.config import Config, ConfigError, OptimizerConfig
from moe.config.parse import from_config_dict
from moe.configs import base
from moe.routing.balancing_rules import Momentum, Penalty, Quantile, Sign, Threshold
from moe.routing.interface import Gate, GateInputs, GateOutput, top_k
from moe.routing.own_gates import probe
from moe.routing.routing import route
from moe.training.metric_writers import find_writers
from moe.training.optimizer import make_optimizer, probe_own
from tests.fuzz_helpers import at_most, is_one_sentence
from tests.helpers import set_moe
from tests.test_fuzz_files import FOLDERS, JSON, fuzzed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

E = 6
ERRORS = st.sampled_from(
    [ZeroDivisionError("0"), KeyError(1), ValueError(), RuntimeError("two\nlines"), SystemExit(0), Exception("x" * 999)]
)  # fmt: skip
#: Wrong values that a user's function may return.
ODD = st.one_of(JSON, ERRORS, st.sampled_from([object(), print, int, (), {1: 2, "a": 3}, {1, 2}]))


def mostly_none(strategy):
    """None in three of four cases."""
    return st.integers(0, 3).flatmap(lambda number: st.none() if number else strategy)


@pytest.fixture(scope="module", autouse=True)
def outcomes():
    """Counts of accepted and refused cases of each test; asserts that both occur."""
    counts: Counter[tuple[str, bool]] = Counter()
    yield counts
    for name in {name for name, _ in counts}:
        assert counts[name, True] >= 5, (name, counts)
        assert counts[name, False] >= 5, (name, counts)


@contextlib.contextmanager
def module_with(**names: Any):
    """Provide a user's module ``plugins`` with these names."""
    sys.modules["plugins"] = types.ModuleType("plugins")
    vars(sys.modules["plugins"]).update(names)
    try:
        yield
    finally:
        del sys.modules["plugins"]


@contextlib.contextmanager
def accepted_or_refused(outcomes, name):
    try:
        with at_most(60):
            yield
    except ConfigError as error:
        refusal = error
    else:
        outcomes[name, True] += 1
        return
    is_one_sentence(refusal)
    assert any(word in str(refusal) for word in ("plugins", "Own", "model.moe.gate")), refusal
    outcomes[name, False] += 1


def returned(value: Any) -> Any:
    """Return the value, or raise it if it is an exception."""
    if isinstance(value, BaseException):
        raise value
    return value


# --- Gates -----------------------------------------------------------------------------------------------------------
ARRAY_EDITS = {
    "as it is": lambda array: array,
    "absent": lambda array: None,
    "numpy": np.asarray,
    "list": lambda array: np.asarray(array).tolist(),
    "number": lambda array: 1.0,
    "narrow": lambda array: array[..., :1],
    "flat": lambda array: array.reshape(-1),
    "transposed": lambda array: jnp.swapaxes(array, 0, 1),
    "float32": lambda array: array.astype(jnp.float32),
    "bfloat16": lambda array: array.astype(jnp.bfloat16),
    "int32": lambda array: array.astype(jnp.int32),
    "int8": lambda array: array.astype(jnp.int8),
    "bool": lambda array: array.astype(bool),
    "negative": lambda array: -array,
    "zero": lambda array: array * 0,
    "shifted": lambda array: array + 1,
    "large": lambda array: array + 1e9,
    "nan": lambda array: array * jnp.nan,
    "infinite": lambda array: array / 0,
}
RULES = (Sign, Quantile, Momentum, Threshold, Penalty)
FACTS = {
    "k": st.one_of(st.integers(-1, E + 1), JSON),
    "router": st.one_of(st.sampled_from(["linear", "noisy", "slots", "none"]), JSON),
    "balancing": st.one_of(st.sampled_from(RULES).flatmap(lambda rule: st.builds(rule, st.floats(0, 1))), ODD),
    **{name: st.one_of(st.booleans(), JSON) for name in ("looks_ahead", "experts_choose", "lists_all", "reweighs")},
    "experts_per_token": ODD,
}


@st.composite
def gates(draw):
    """(attributes of the class, edits of its rule's output, a value returned instead of the output)."""
    names = draw(st.lists(st.sampled_from(sorted(FACTS)), max_size=1, unique=True))
    fields = draw(st.lists(st.sampled_from(GateOutput._fields), max_size=1))
    edits = {field: draw(st.sampled_from(sorted(ARRAY_EDITS))) for field in fields}
    return {name: draw(FACTS[name]) for name in names}, edits, draw(mostly_none(ODD))


def made_gate(facts, edits, instead):
    def rule(self, router_logits: Any, inputs: GateInputs) -> Any:
        if instead is not None:
            return returned(instead)
        probs = jax.nn.softmax(router_logits)
        weights, index = top_k(probs, 2)
        output = GateOutput(index, weights, weights > 0, probs, probs, probs)
        return output._replace(**{field: ARRAY_EDITS[edit](getattr(output, field)) for field, edit in edits.items()})

    body: dict[str, Any] = {"k": 2, "route": rule, "__annotations__": {}, **facts}
    for name in ("balancing", "experts_per_token"):
        if name in facts:
            body[name] = lambda self, *_, value=facts[name]: returned(value)
    if "balancing" in facts:
        body["balancing"] = property(body["balancing"])
    return dataclasses.dataclass(frozen=True, kw_only=True)(type("Own", (Gate,), body))


@fuzzed(FOLDERS)
@given(case=gates())
def test_gates(case, outcomes):
    with module_with(Own=made_gate(*case)), accepted_or_refused(outcomes, "gates"):
        tree = base.get_config()
        set_moe(tree, gate="plugins:Own", num_experts=E, accept_future_leak=True)
        moe = from_config_dict(tree).model.moe
        probe(moe.gate, E)
        logits = jax.random.normal(jax.random.key(3), (1, 4, E))
        noise = logits if moe.gate.router == "noisy" else None
        rule = moe.gate.balancing
        bias = None if rule is None else rule.selection_bias(rule.first_state(E))
        routing = route(moe.gate, logits, GateInputs(jnp.ones((1, 4), bool), noise_logits=noise, selection_bias=bias))
        k = E if moe.gate.lists_all else moe.experts_per_token
        assert routing.expert_index.shape == routing.combine_weights.shape == (1, 4, k)
        for row in np.asarray(routing.expert_index).reshape(-1, k):
            assert len({*row.tolist()} & set(range(E))) == k
        for array in (routing.combine_weights, routing.router_probs, routing.smooth_load):
            assert array is None or (np.isfinite(array).all() and np.min(array) >= 0)
        assert routing.needed_bias is None or not np.isnan(routing.needed_bias).any()


# --- Optimizers ------------------------------------------------------------------------------------------------------
PARAMETERS = {
    "dense": {"up": jax.ShapeDtypeStruct((2, 3), jnp.float32)},
    "norm": {"scale": jax.ShapeDtypeStruct((3,), jnp.float32)},
}
SETTINGS = ({}, {"gradient_clip": 0.0}, {"frozen": ("dense",)}, {"ema_decay": 0.5}, {"moment_dtype": "bfloat16"})
GOOD = st.sampled_from([optax.EmptyState(), jnp.zeros(3), (jnp.zeros(2, jnp.int32), {"mu": jnp.zeros((2, 3))})])
LEAVES = st.one_of(
    st.sampled_from(["float32", "bfloat16", "int32", "bool", "uint8", "complex64", "int4"]).map(
        lambda dtype: jnp.zeros((2,), dtype)
    ),
    st.sampled_from([np.zeros(3), jax.random.key(0), np.array(["a"]), np.zeros(2, "datetime64[s]"), 3, 2.5, True]),
    ODD,
)
STATES = st.one_of(LEAVES, st.tuples(LEAVES, LEAVES), st.dictionaries(st.text(max_size=3), LEAVES, max_size=2))
UPDATES = {
    "as it is": lambda updates, state: (updates, state),
    "one": lambda updates, state: updates,
    "three": lambda updates, state: (updates, state, state),
    "none": lambda updates, state: None,
    "no updates": lambda updates, state: (None, state),
    "no state": lambda updates, state: (updates, None),
    "cast": lambda updates, state: (jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), updates), state),
    "number": lambda updates, state: (jax.tree.map(lambda leaf: 0.0, updates), state),
    "sums": lambda updates, state: (jax.tree.map(jnp.sum, updates), state),
    "part": lambda updates, state: ({"dense": updates["dense"]}, state),
    "float": lambda updates, state: (updates, jax.tree.map(lambda leaf: leaf * 1.5, state)),
    "python": lambda updates, state: (updates, jax.tree.map(float, state)),
    "branch": lambda updates, state: (updates if updates["dense"]["up"].sum() > 0 else {}, state),
}


@fuzzed(FOLDERS)
@given(
    mostly_none(ODD),
    st.booleans().flatmap(lambda good: GOOD if good else STATES),
    st.sampled_from(sorted(UPDATES)),
    mostly_none(ODD),
    st.sampled_from(SETTINGS),
)
def test_optimizers(outcomes, instead, state, update, raised, settings):
    def make(config, schedule):
        if instead is not None:
            return returned(instead)

        def updated(updates, state, params=None):
            return returned(raised) if raised is not None else UPDATES[update](updates, state)

        return optax.GradientTransformation(lambda params: returned(state), updated)

    with module_with(make=make), accepted_or_refused(outcomes, "optimizers"):
        config = OptimizerConfig(name="plugins:make", **settings)
        optimizer = make_optimizer(config, 100)
        probe_own(config, optimizer, PARAMETERS, jax.eval_shape(optimizer.init, PARAMETERS))
        weights = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), PARAMETERS)
        made = jax.jit(optimizer.init)(weights)
        updates, after = jax.jit(optimizer.update)(weights, made, weights, norm=jnp.ones(()))
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, weights)
        assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, made)
        checksums(after)  # as a checkpoint does


# --- Writers ---------------------------------------------------------------------------------------------------------
@fuzzed(FOLDERS)
@given(*[mostly_none(ODD)] * 3, st.sampled_from([3, 4, 3, 4, 0, 1, 2]))
def test_writers(outcomes, instead, written, closed, arguments):
    def write(step, kind, values):
        return returned(written)

    writer = types.SimpleNamespace(write=write, close=lambda: returned(closed))
    made = writer if instead is None else instead
    factories = [
        lambda: returned(made), lambda a: returned(made), lambda a, b: returned(made), lambda a, b, c: returned(made),
        lambda *a: returned(made),
    ]  # fmt: skip
    with module_with(make=factories[arguments]), accepted_or_refused(outcomes, "writers"):
        (factory,) = find_writers(("plugins:make",))
        opened = factory(Path("nowhere"), dataclasses.asdict(Config()), 0)
        opened.write(1, "train", {"loss": 1.0})
        opened.close()


@fuzzed(FOLDERS)
@given(st.sampled_from(["gate", "optimizer", "writer"]), ODD.filter(lambda value: value not in (print, int)))
def test_objects_that_are_none_of_these(kind, value):
    with module_with(it=value), pytest.raises(ConfigError) as caught:  # noqa: PT012
        if kind == "gate":
            tree = base.get_config()
            set_moe(tree, gate="plugins:it")
            from_config_dict(tree)
        elif kind == "optimizer":
            make_optimizer(OptimizerConfig(name="plugins:it"), 100)
        else:
            find_writers(("plugins:it",))
    is_one_sentence(caught.value)
    assert "plugins:it" in str(caught.value)
