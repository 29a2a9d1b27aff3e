"""Hostile folders: open checkpoints and text, each imported and trained, or refused in one sentence.

Cases are drawn by hypothesis, the same in every run. See tests/test_fuzz.py for the command.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest
from etils import epath
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from moe.config import Config, ConfigError, DataConfig, OptimizerConfig, TrainConfig, to_dict
from moe.configs import base
from moe.data import folder_index
from moe.interop import export_checkpoint, import_checkpoint
from moe.parallel.mesh import make_mesh
from moe.training.step import build
from tests.fuzz_helpers import at_most, is_one_sentence, listing, set_field, trains_or_refuses, two_steps
from tests.run_helpers import ONE, tiny
from tests.test_fuzz import SETTINGS
from tests.tiny_text import random_text

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), pytest.mark.usefixtures("compilation_cache")]
HERE = Path(__file__).parent / "data" / "checkpoints"
FAMILIES = sorted(path.name for path in HERE.iterdir())
FOLDERS, TEXTS = int(os.environ.get("FUZZ_N", 200)), 100


def fuzzed(count: int):
    """Hypothesis settings: this many cases, the same in every run."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )


# --- Open checkpoints ------------------------------------------------------------------------------------------------
NUMBERS = st.one_of(st.sampled_from([0, 1, -1, 2, 3, 2**31, 2**63, 10**30, True, False]), st.integers(), st.floats())
SCALARS = st.one_of(st.none(), NUMBERS, st.text(max_size=8), st.sampled_from(["\ud800", "\0", "../x", "x" * 9999]))
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
ROPE = st.dictionaries(
    st.sampled_from(["rope_type", "type", "rope_theta", "factor", "beta_fast", "mscale", "attention_factor", "x"]),
    st.one_of(st.sampled_from(["default", "linear", "yarn", "llama3", "dynamic"]), NUMBERS, JSON),
)
BYTES = st.one_of(st.binary(max_size=64), JSON.map(lambda tree: json.dumps(tree).encode()))


@st.composite
def config_edits(draw):
    """Wrong values of one to three fields of a family's config.json."""
    family = draw(st.sampled_from(FAMILIES))
    names = sorted(json.loads((HERE / family / "config.json").read_text()))
    fields = st.sampled_from([*names, "rope_scaling", "rope_parameters", "layer_types", "quantization_config"])
    edits = draw(st.dictionaries(fields, st.one_of(JSON, NUMBERS, ROPE), min_size=1, max_size=3))
    return family, edits


@st.composite
def file_edits(draw):
    """(family, file, kind of damage, bytes, position as a share of the file)."""
    files = ("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json")
    files += ("tokenizer_config.json", "generation_config.json", "tokenizer.model", "chat_template.jinja")
    kinds = ("replace", "cut", "overwrite", "fifo", "folder", "device", "loop", "weights")
    where = draw(st.floats(0, 1))
    return (
        draw(st.sampled_from(FAMILIES)),
        draw(st.sampled_from(files)),
        draw(st.sampled_from(kinds)),
        draw(BYTES),
        where,
    )


def damage(path: Path, kind: str, content: bytes, where: float) -> None:
    before = path.read_bytes() if path.exists() else b"{}"
    at = int(where * len(before))
    special = {
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
    }
    if kind in special:
        path.unlink(missing_ok=True)
        special[kind]()
        return
    after = {
        "replace": content,
        "cut": before[:at],
        "overwrite": before[:at] + content + before[at + len(content) :],
        # An index with a wrong entry, for a family with one file.
        "weights": json.dumps({"weight_map": {"lm_head.weight": content.decode("latin-1")}}).encode(),
    }
    path.write_bytes(after[kind])


def imports_or_refuses(source: Path, folder: Path) -> None:
    """Assert that a folder imports, trains two steps and exports, or is refused in one sentence with nothing left
    behind."""
    try:
        with at_most(60):
            config = import_checkpoint(source, folder / "out")
    except ConfigError as error:
        is_one_sentence(error, left=listing(folder / "out"))
        return
    _trains(config)
    try:
        with at_most(60):
            export_checkpoint(folder / "out", folder / "exported")
    except ConfigError as error:
        is_one_sentence(error)


_TRAINED = set()


def _trains(config: Config) -> None:
    """Assert that the imported config trains on rows of 8 tokens; each model is trained once."""
    if config.model not in _TRAINED:
        _TRAINED.add(config.model)
        run = Config(
            model=config.model,
            data=DataConfig(sequence_length=8, input_length=8 if config.model.encoder_layers else 0),
            train=TrainConfig(num_steps=2, batch_size=1),
            optimizer=OptimizerConfig(warmup_steps=1),
        )
        with at_most(180):
            two_steps(build(run, make_mesh(config.mesh, ONE)))


@fuzzed(FOLDERS)
@given(config_edits())
def test_configs_of_open_checkpoints(case):
    family, edits = case
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source"
        shutil.copytree(HERE / family, source)
        tree = json.loads((source / "config.json").read_text()) | edits
        (source / "config.json").write_text(json.dumps(tree))
        imports_or_refuses(source, Path(name))


@fuzzed(FOLDERS)
@given(file_edits())
def test_files_of_open_checkpoints(case):
    family, file, kind, content, where = case
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source"
        shutil.copytree(HERE / family, source)
        damage(source / file, kind, content, where)
        imports_or_refuses(source, Path(name))


# --- Text ------------------------------------------------------------------------------------------------------------
NAMES = st.one_of(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=12),
    st.sampled_from(
        ["-rf", " ", "\n", "a,b", "$_$", "all", "[x]", "*", "\udcff", "x" * 200, ".hidden", "a:b", "%s", "~"]
    ),
)
LINES = st.one_of(
    JSON.map(lambda tree: json.dumps(tree).encode()),
    JSON.map(lambda text: json.dumps({"text": text}).encode()),
    st.tuples(st.text(), NAMES).map(lambda pair: json.dumps({"text": pair[0], "domain": pair[1]}).encode()),
    st.binary(max_size=40),
    st.sampled_from([b'{"text": "\\ud800"}', b'{"text": "x", "text": 3}', b"[" * 100_000, b'{"text": NaN}', b""]),
)
TEXT = st.one_of(
    st.text().map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.binary(max_size=100),
    st.sampled_from(
        [b"", b" \n\t", b"\0" * 50_000, b"x" * 300_000, b"\xef\xbb\xbftext", "\u2581\u2028\u0085\r\n".encode() * 99]
    ),
)
CONTENTS = st.one_of(
    st.tuples(st.just(".txt"), TEXT),
    st.tuples(st.just(".jsonl"), st.lists(LINES, max_size=3).map(b"\n".join)),
    st.tuples(st.sampled_from([".parquet", ".arrow"]), st.binary(max_size=64)),
    st.tuples(st.sampled_from([".txt", ".jsonl", ".parquet"]), st.sampled_from(["fifo", "folder", "device", "loop"])),
)


def lay(folder: Path, file: tuple[str, str, tuple[str, bytes | str]]) -> None:
    """Write a file of the case, or create a FIFO, folder or link in its place."""
    below, name, (suffix, content) = file
    parent = folder / below if below not in (".", "..") else folder
    path = parent / (name + suffix)
    try:
        parent.mkdir(exist_ok=True)
        if isinstance(content, str):
            damage(path, content, b"", 0)
        else:
            path.write_bytes(content)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        return  # two files of the case share a name


@pytest.fixture(scope="module")
def tree(directory):
    return to_dict(tiny(directory, base.get_config(), **SETTINGS))


@fuzzed(TEXTS)
@given(st.lists(st.tuples(NAMES, NAMES, CONTENTS), min_size=1, max_size=3), st.booleans())
def test_folders_of_text(tree, files, beside_good_text):
    # The index of a folder whose text is too short for the tokenizer stays: it is whole, and serves a smaller one.
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as cache:
        text = Path(name) / "text"
        text.mkdir()
        for file in files:
            lay(text, file)
        if beside_good_text:
            (text / "good.txt").write_text("\n\n".join(random_text(seed, words=200) for seed in range(40)))
        before = listing(Path(name))
        for field, value in (("data.dataset", str(text)), ("data.directory", cache)):
            tree = set_field(tree, field, value)
        with at_most(240):
            trained = trains_or_refuses(tree, Path(name), jax.devices()[:1])
        assert trained or listing(Path(name)) == before
        if not trained:
            assert {path.name for path in Path(cache).iterdir()} <= {".lock", "folders"}
            for index in Path(cache).glob("folders/*"):
                folder_index.read_index(epath.Path(text), epath.Path(index))  # checks it
