"""Hostile files of workdirs, suites, claims, records, tables and tokenizers: each read, or refused in one sentence.

Cases are drawn by hypothesis, the same in every run. See tests/test_fuzz.py for the command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from moe.checkpoints import pinned, workdir
from moe.config import Config, ConfigError, build_layers, inherited, to_dict
from moe.config.parse import Changes
from moe.data import columns, folders
from moe.data.json_tokenizer import JsonTokenizer
from moe.lab import loading, records, suite
from moe.lab.claims import registration
from moe.system.atomic_files import to_checked_json
from moe.system.metrics_files import read_rows
from tests.fuzz_helpers import at_most, is_one_sentence
from tests.lab_helpers import DENSE, SWITCH, keyed, record, suite_of
from tests.test_fuzz_files import BYTES, FOLDERS, JSON, NUMBERS, fuzzed
from tests.tiny_text import random_text

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@contextlib.contextmanager
def read_or_refused():
    """Assert that reading in its body succeeds or is refused in one sentence, within a minute."""
    try:
        with at_most(60):
            yield
    except ConfigError as error:
        is_one_sentence(error)


def paths(tree, prefix=()):
    """Every path to a value of a JSON tree."""
    found = [prefix]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        found += paths(value, (*prefix, name))
    return found


def replaced(tree, path, value):
    if not path:
        return value
    first, *rest = path
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[first] = replaced(copy[first], rest, value)
    return copy


@st.composite
def edits(draw, trees):
    """(name, content): one of the trees with one wrong value, or arbitrary bytes."""
    name = draw(st.sampled_from(sorted(trees)))
    if draw(st.integers(0, 4)) == 0:
        return name, draw(BYTES)
    path = draw(st.sampled_from(paths(trees[name])))
    return name, json.dumps(replaced(trees[name], path, draw(st.one_of(JSON, NUMBERS)))).encode()


# --- Workdirs --------------------------------------------------------------------------------------------------------
LOADS = [[0.5, 0.5], [0.25, 0.75]]
WORKDIR = {
    "config.json": json.loads(json.dumps(to_dict(Config()))),
    "metrics.jsonl": {
        "step": 2, "kind": "heldout/all", "loss": 2.5, "targets": 9, "expert_load": LOADS, "router_entropy": [0.1, 0.2],
    },
    "changes.jsonl": {"step": 2, "changes": {"train.num_steps": [2, 4]}},
    "base.json": {"step": 3},
}  # fmt: skip


def _read_workdir(folder: Path, name: str) -> None:
    if name == "metrics.jsonl":
        for row in read_rows(folder / name):
            np.asarray(row.get("expert_load", []), float)  # as readers do
    elif name == "changes.jsonl":
        workdir.latest_change(epath.Path(folder))
    elif name == "base.json":
        pinned.read_note(epath.Path(folder) / name)
    else:
        workdir.read_config(folder)
        started = Changes()
        started.start.checkpoint = str(folder)
        build_layers(inherited(started.settings), started.settings)


@fuzzed(FOLDERS)
@given(edits(WORKDIR))
def test_files_of_a_workdir(case):
    name, content = case
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(content + b"\n")
        with read_or_refused():
            _read_workdir(Path(folder), name)


# --- The lab ---------------------------------------------------------------------------------------------------------
SUITE = suite_of({"a": DENSE, "b": SWITCH}, horizons=(20,))
RECORD = {"record": json.loads(json.dumps(dataclasses.asdict(keyed(SUITE, [record("a", 0, 5.0)])[0])))}
CLAIM = """[[claim]]
number = {number}
suite = {suite}
text = {text}
source = "paper"
min_steps = {min_steps}
[[claim.part]]
what = "loss"
rule = {rule}
value = {value}
margin = {margin}
"""
GOOD_CLAIM = {
    "number": 1, "suite": "test", "text": "t", "min_steps": 0, "rule": "below", "value": "loss[b]", "margin": 0.1,
}  # fmt: skip
ODD = st.one_of(
    SCALARS := st.one_of(st.none(), NUMBERS, st.text(max_size=8)),
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.text(max_size=4), SCALARS, max_size=2),
)


@fuzzed(FOLDERS)
@given(edits(RECORD))
def test_records(case):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / records.RECORDS).mkdir()
        (Path(folder) / records.RECORDS / "a.json").write_bytes(case[1])
        with read_or_refused():
            records.read_all(Path(folder))


@fuzzed(FOLDERS)
@given(st.sampled_from(sorted(GOOD_CLAIM)), st.one_of(JSON, st.text(max_size=20)), st.one_of(st.none(), BYTES))
def test_claims(field, value, content):
    text = CLAIM.format(**{name: json.dumps(entry) for name, entry in (GOOD_CLAIM | {field: value}).items()})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "claims.toml"
        path.write_bytes(text.encode("utf-8", "surrogatepass") if content is None else content)
        with read_or_refused():
            registration.read_claims(path)


SUITE_FILE = """
from moe.configs import base
from moe.lab.suite import Comparison, Suite, Sweep, Variant

def get_suite(size):
    config = base.get_config()
    fields = dict(
        name="test", question="?", base=config, seeds=(0, 1),
        variants={"a": Variant({"model.moe.gate": "none"}), "b": Variant({"model.moe.gate": "switch"})},
        comparisons={"steps": Comparison("a", ("b",), ("steps",))},
    )
    variant, comparison = dict(overrides={}), dict(baseline="a", variants=("b",), equal=("steps",))
    sweep = dict(learning_rates=(config.optimizer.learning_rate, 1.0), seeds=(7,))
    inf, nan = float("inf"), float("nan")
    kind, field, value = EDIT
    if kind == "arm":
        fields["variants"] |= {field: Variant({})}
    elif kind == "override":
        fields["variants"] |= {"c": Variant({field: value})}
    else:
        {"suite": fields, "variant": variant, "comparison": comparison, "sweep": sweep}[kind][field] = value
    if kind == "variant":
        fields["variants"] |= {"c": Variant(**variant)}
    if kind == "comparison":
        fields["comparisons"] = {"c": Comparison(**comparison)}
    if kind == "sweep":
        fields["sweep"] = Sweep(**sweep)
    return Suite(**fields)
"""
FIELDS = {
    "suite": [field.name for field in dataclasses.fields(suite.Suite) if field.init],
    "variant": [field.name for field in dataclasses.fields(suite.Variant)],
    "comparison": [field.name for field in dataclasses.fields(suite.Comparison)],
    "sweep": [field.name for field in dataclasses.fields(suite.Sweep)],
    "arm": ["../x", "a/b", "$\\frac$", "", ".", "a\nb", "x" * 300, "é", "a b", "|", "a", "\udcff"],
    "override": ["model.d_model", "model.moe.gate", "nothing", "model", "", "train.num_steps", "data.domains"],
}


@fuzzed(FOLDERS)
@given(st.sampled_from(sorted(FIELDS)).flatmap(lambda k: st.tuples(st.just(k), st.sampled_from(FIELDS[k]), ODD)))
def test_edited_suites(edit):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edited.py"
        path.write_bytes(SUITE_FILE.replace("EDIT", ascii(edit)).encode())
        with read_or_refused():
            found = loading.load_suite(str(path), "laptop")
            for arm in found.variants:
                found.config(arm)


# --- Text ------------------------------------------------------------------------------------------------------------
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
TEXTS = [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
TYPES = st.sampled_from([*TEXTS, MESSAGES, pa.list_(pa.string()), pa.int64(), pa.float32(), pa.binary(), pa.null()])
NAMES = st.sampled_from(["text", "domain", "messages", "prompt", "response", "source", "target", "x", "", "content"])


@st.composite
def tables(draw):
    count = draw(st.integers(0, 3))
    arrays, names = [], []
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(TYPES)
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)
        cells = st.one_of(st.none(), st.text(max_size=9), st.sampled_from(["all", "a/b", "\n", "x" * 5000, "[1]"]))
        values = [draw(cells) if text else None for _ in range(count)]
        arrays.append(
            pa.array(values, pa.string()).dictionary_encode()
            if pa.types.is_dictionary(kind)
            else pa.array(values, kind)
        )
        names.append(draw(NAMES))
    return pa.Table.from_arrays(arrays, names=names)


@fuzzed(FOLDERS)
@given(tables(), st.sampled_from(["whole", "cut", "noise"]), st.floats(0, 1))
def test_tables(table, kind, where):
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "a.parquet"
        with contextlib.suppress(pa.ArrowException):
            pq.write_table(table, source)
        content = source.read_bytes() if source.exists() else b""
        at = int(where * len(content))
        if kind != "whole":
            source.write_bytes(content[:at] + (b"\xff" * 8 + content[at + 8 :] if kind == "noise" else b""))
        with read_or_refused():
            columns.copy_columns(epath.Path(source), Path(folder) / "copy.arrow")
            list(columns.TextTable(Path(folder) / "copy.arrow").rows("a.parquet"))


@fuzzed(FOLDERS)
@given(st.data())
def test_an_index_of_text(data):
    """Edited and sealed again, so that its checksum holds."""
    with tempfile.TemporaryDirectory() as folder:
        text, index = Path(folder) / "text", Path(folder) / "index"
        text.mkdir()
        for seed in range(20):
            (text / f"{seed}.txt").write_text(random_text(seed))
        opened = folders.open_folder(str(text), epath.Path(index), lambda _: None)
        assert opened
        (found,) = (path for path in index.rglob("index.json"))
        about = json.loads(found.read_text())["content"]
        path = data.draw(st.sampled_from(paths(about)))
        found.write_text(to_checked_json(replaced(about, path, data.draw(st.one_of(JSON, NUMBERS)))))
        with read_or_refused():
            again = folders.open_folder(str(text), epath.Path(index), lambda _: None)
            assert again


# --- Tokenizers ------------------------------------------------------------------------------------------------------
def _tokenizer() -> dict:
    vocab = {"<s>": 0, "</s>": 1, **{chr(97 + i): 2 + i for i in range(26)}, "th": 28}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h")], unk_token="</s>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("a"), normalizers.Replace(" ", "b")])
    made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("x+"), "isolated")
    made.add_special_tokens(["<s>", "</s>"])
    return json.loads(made.to_str())


TOKENIZER = {
    "tokenizer.json": _tokenizer(),
    "tokenizer_config.json": {"eos_token": "</s>", "bos_token": {"content": "<s>"}},
}
REGEXES = st.sampled_from(["", "(", "(a*)*b", "(?=a)", "(?<!x)", "\\p{L}+", "a{1,99999}", "[", "(?:a|a)*$", "\\1"])


@st.composite
def tokenizer_edits(draw):
    if draw(st.booleans()):
        return draw(edits(TOKENIZER))
    tree = TOKENIZER["tokenizer.json"]
    where = draw(st.sampled_from([("pre_tokenizer", "pattern", "Regex"), ("normalizer", "normalizers", 1, "pattern")]))
    regex = draw(REGEXES)
    return "tokenizer.json", json.dumps(
        replaced(tree, where, regex if where[-1] == "Regex" else {"Regex": regex})
    ).encode()


@fuzzed(FOLDERS)
@given(tokenizer_edits())
def test_tokenizers(case):
    name, content = case
    files = {kind: json.dumps(tree).encode() for kind, tree in TOKENIZER.items()} | {name: content}
    with read_or_refused():
        found = JsonTokenizer(files["tokenizer.json"], files["tokenizer_config.json"])
        for text in ("", "the", "a" * 200 + "!", "</s> x"):
            ids = found.encode(text)
            assert ids.dtype == np.int32
            assert ((ids >= 0) & (ids < found.vocab_size)).all()
            found.decode(ids)
        assert found.token_bytes.shape == (found.vocab_size,)
