"""Hostile rollouts, records of engines, chat templates, arrays and plans: each read, or refused in one sentence.

Cases are drawn by hypothesis, the same in every run. See tests/test_fuzz.py for the command.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from moe.config import ConfigError
from moe.conformance import recorded
from moe.conformance.judge import evidence
from moe.conformance.judge.rule import Rule
from moe.data import chat, chat_rendering, documents
from moe.data.engines import EngineName, read_experts
from moe.objectives.policy import Policy
from moe.planner import differences, pages
from moe.playground import packed as weights
from moe.playground import page
from tests.helpers import tiny_model
from tests.playground.test_playground import pack
from tests.test_fuzz_files import FOLDERS, fuzzed
from tests.test_fuzz_foreign import edits, read_or_refused

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


# --- Conversations and rollouts --------------------------------------------------------------------------------------
MODEL = tiny_model(num_layers=3, vocab_size=48, num_experts=5, layers=(1, 2), dispatch="dropless")
POLICY = Policy(model=MODEL, length=16)
COMPLETION = {"tokens": [7, 2], "log_probs": [-0.3, -1.2], "reward": 1.0, "experts": [[[3, 1], [0, 2], [4, 1]]] * 3}
GROUP = {"prompt_tokens": [5, 9], "engine": "vllm", "completions": [COMPLETION, COMPLETION | {"reward": 0.0}]}


@fuzzed(FOLDERS)
@given(edits({"line": GROUP}))
def test_rollouts(case):
    with read_or_refused():
        try:
            text, _ = documents.parse_document(case[1], epath.Path("a.jsonl"))
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for example in POLICY.completions(text):
            assert all(np.isfinite(values).all() for values in example.values())
            assert ((example["experts"] >= 0) & (example["experts"] < 5)).all()


KINDS = st.sampled_from(["int8", "int32", "int64", "uint64", "float32", "bool", "complex64", "U1"])
CHOICES = st.sampled_from([0, 1, 2, 3, 4, 5, -1, -2, 2**31, 2**32 + 1, 2**63])


@fuzzed(FOLDERS)
@given(st.sampled_from(EngineName.__args__), KINDS, st.lists(st.integers(0, 4), max_size=4), st.data())
def test_records_of_engines(engine, kind, shape, data):
    shape = data.draw(st.sampled_from([shape, [4, 3, 2], [4, 2, 2], [1, 3, 4, 2]]))
    count = int(np.prod(shape))
    values = data.draw(st.lists(CHOICES, min_size=count, max_size=count))
    with np.errstate(all="ignore"):
        record = np.array(values, object).astype(kind, copy=False) if kind == "U1" else np.array(values).astype(kind)
    with read_or_refused():
        found = read_experts(engine, record.reshape(shape) if engine == "tunix" else [record.reshape(shape)], MODEL, 5)
        assert set(found.ravel().tolist()) <= {-1, *record.ravel().tolist()}


PIECES = st.sampled_from(
    ["messages", "'x'", "9", "m.content", "messages[0]", "loop", "none", "''.__class__", "range(9)", "namespace(a=1)"]
)
EXPRESSIONS = st.recursive(
    PIECES,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "*", "~", "**", "%", "in", "=="]), inner).map(" ".join),
        st.tuples(inner, st.sampled_from(["|length", "|list", "|tojson", "|join('x')", "|center(9**9)", ".y"])).map(
            "".join
        ),
    ),
    max_leaves=4,
)
TEMPLATES = st.recursive(
    EXPRESSIONS.map("{{{{ {} }}}}".format),
    lambda inner: st.one_of(
        st.tuples(EXPRESSIONS, inner).map(lambda two: f"{{% for m in {two[0]} %}}{two[1]}{{% endfor %}}"),
        st.tuples(EXPRESSIONS, inner).map(lambda two: f"{{% if {two[0]} %}}{two[1]}{{% endif %}}"),
        st.tuples(inner, inner).map("".join),
        inner.map("{{% generation %}}{}{{% endgeneration %}}".format),
        inner.map("{{% for m in range(99999) %}}{}{{% endfor %}}".format),
    ),
    max_leaves=4,
)


@fuzzed(max(1, FOLDERS // 4))
@given(TEMPLATES)
def test_chat_templates(template):
    with mock.patch.object(chat_rendering, "SECONDS", 0.3), read_or_refused():
        text, spans = chat.ChatTemplate(template, {}, "t").render([{"role": "user", "content": "x"}])
        assert all(0 <= start <= end <= len(text) for start, end in spans)


# --- Arrays and plans ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def page_weights():
    packed = pack(tiny_model(dispatch="dropless"))
    return weights.Packed(json.loads(json.dumps(packed.header)), packed.arrays)


@fuzzed(FOLDERS)
@given(st.data())
def test_weights_of_a_page(page_weights, data):
    _, header = data.draw(edits({"header": page_weights.header}))
    arrays = dict(page_weights.arrays)
    name = data.draw(st.sampled_from(sorted(arrays)))
    edit = data.draw(st.sampled_from([None, np.transpose, np.ravel, lambda a: a[:1], lambda a: a * 1.5, np.float64]))
    if edit is not None:
        arrays[name] = edit(arrays[name])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.npz"
        np.savez(path, header=np.frombuffer(header, np.uint8), **arrays)
        with read_or_refused():
            assert page.render(weights.read(path))


LAYER = evidence.random_layer(Rule(), groups=2, tokens=3, d=4, f=3, num_experts=4)


@fuzzed(FOLDERS)
@given(st.data())
def test_recorded_layers(data):
    arrays = {**LAYER.weights, "mask": LAYER.mask, "cotangent": LAYER.cotangent, "y": LAYER.x}
    name = data.draw(st.sampled_from([*sorted(arrays), "bias", "gate_up", "expert_index", "evil"]))
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    kind = data.draw(st.sampled_from(["float32", "int64", "bool", "complex64", "U3", "M8[s]"]))
    value = data.draw(st.sampled_from([0, 1, -1, 0.5, np.nan, np.inf, 1e300]))
    with np.errstate(all="ignore"):
        made = np.zeros(shape, kind) if kind[0] in "UM" else np.full(shape, value).astype(kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.npz"
        np.savez(path, **arrays | {name: made})
        content = path.read_bytes()
        if data.draw(st.integers(0, 3)) == 0:
            path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        with read_or_refused():
            layer, _ = recorded.read(str(path))
            assert all(np.isfinite(array).all() for array in layer.weights.values())


PLAN = {
    "config": {"model": {"d_model": 4}}, "topology": "v5p:2x2x1", "platform": "tpu", "scenario": "", "cost": "x",
    "where": [{"part": "experts", "seconds": 0.1}], "exposed_seconds": 0.0, "step_seconds": 0.2, "counted_seconds": 0.1,
    "step_interval": [0.1, 0.3], "tokens_per_second_per_chip": 10.0, "mfu": 0.4, "memory": {"capacity": 9.0},
    "memory_total": 5.0,
}  # fmt: skip


@fuzzed(FOLDERS)
@given(edits({"plan": PLAN}))
def test_differences_of_plans(case):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        path.write_bytes(case[1])
        with read_or_refused():
            plan = differences.read(path)
            assert pages.difference_text(PLAN, plan)
            assert pages.difference(PLAN, plan, ("a", "b"))
