"""Analysis from text to files: documents, syntax classes, the explorer page, the report."""

import base64
import dataclasses
import itertools
import json
import re

import jax
import numpy as np
import pytest
from etils import epath

from moe.analysis import analyse, explorer, markdown, summary
from moe.analysis.documents import Document, document_batches, read_document
from moe.analysis.passages import Passage, colours, pieces_of
from moe.analysis.record import Recorder
from moe.analysis.syntax import CLASSES, byte_classes, token_classes
from moe.config import ConfigError
from moe.data.preparation import Prepared
from moe.data.tokenizer import train_tokenizer
from moe.programs import cli
from tests.analysis_helpers import tiny_program
from tests.helpers import fill_disk

# --- Documents and syntax --------------------------------------------------------------------------------------------

SOURCE = 'def f(x):\n    """Grüße."""\n    return x + 10  # é\n'
LETTERS = {"k": "keyword", "n": "name", "o": "operator", "1": "number", "s": "string", "c": "comment", ".": "layout"}
#          def f(x):⏎    """Grüße."""⏎    return x + 10  # é⏎, a letter per character
EXPECTED = "kkk.nonoo.....ssssssssssss.....kkkkkk.n.o.11..ccc."


def per_byte(letters, text):
    return [CLASSES.index(LETTERS[kind]) for kind, c in zip(letters, text, strict=True) for _ in c.encode()]


def test_syntax_classes_of_a_small_source():
    assert byte_classes(SOURCE).tolist() == per_byte(EXPECTED, SOURCE)
    fstring = "y = f'a{x}b' if é else -1\n"
    assert byte_classes(fstring).tolist() == per_byte("n.o.sssonoss.kk.n.kkkk.o1.", fstring)
    assert byte_classes("x = (1,\n") is None  # an unclosed bracket
    assert byte_classes("if x:\n        y\n    z\n") is None  # a dedent to no outer level
    assert byte_classes("Once upon a time it isn't so\n") is None  # an unterminated string


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([SOURCE * 5, "red green blue fox and the über fox\n" * 9], 320)


def test_tokens_get_the_class_of_their_first_non_blank_byte(tokenizer):
    document = Document("x  +=\n1", np.zeros(5, np.int32), np.array([[0, 0], [0, 1], [1, 5], [5, 7], [7, 7]]))
    kinds = [CLASSES.index(kind) for kind in ("name", "operator", "number")]
    assert token_classes(document).tolist() == [-1, *kinds, -1]
    document = read_document(SOURCE, tokenizer)
    classes = token_classes(document)
    assert classes[0] == classes[-1] == -1  # bos and eos
    raw, by_byte = SOURCE.encode(), byte_classes(SOURCE)
    for kind, (start, end) in zip(classes[1:-1], document.spans[1:-1], strict=True):
        visible = [i for i in range(start, end) if not raw[i : i + 1].isspace()] or [start]
        assert kind == by_byte[visible[0]]
    assert set(classes[1:-1]) == set(range(len(CLASSES)))
    for source in ("x = (", "x = 1\0\ny = 2", " =\n\0"):  # the last one: a SystemError of Python 3.13
        assert token_classes(read_document(source, tokenizer)) is None


def test_spans_cover_the_text_byte_for_byte(tokenizer):
    text = "red ✈ über\n  fox"  # the aeroplane is in no piece: three bytes
    document = read_document(text, tokenizer)
    raw = text.encode()
    spans = document.spans
    assert (spans[0].tolist(), spans[-1].tolist()) == ([0, 0], [len(raw)] * 2)
    assert b"".join(raw[start:end] for start, end in spans) == raw
    assert (document.tokens[0], document.tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    pieces = pieces_of(text, spans)
    assert "".join(pieces) == text
    assert pieces.count("✈") == 1  # on the first of its three tokens
    np.testing.assert_array_equal(document.tokens[1:-1], np.concatenate([tokenizer.encode(text)]))

    class SpaceFirst:  # as Mixtral's: "ab c" is "▁ab", "▁c"
        bos_id, eos_id, token_bytes = -1, 9, np.array([3, 2, 1])

        def encode(self, text):
            return np.array([0, 1]) if text == "ab c" else np.array([2, 2, 2, 2])

    assert read_document("ab c", SpaceFirst()).spans.tolist() == [[0, 2], [2, 4], [4, 4]]
    assert read_document("ab", SpaceFirst()) is None  # four bytes of tokens for two of text


def test_documents_are_packed_into_rows():
    documents = [Document("", np.arange(1, 6, dtype=np.int32), np.zeros((5, 2), np.int32)) for _ in range(2)]
    marks = {"kind": [np.full(5, 1), np.full(5, 2)]}
    batches = document_batches(documents, marks, sequence_length=4, batch_size=2)
    joined = {name: np.concatenate([batch[name] for batch in batches]).tolist() for name in batches[0]}
    assert joined == {
        "tokens": [[1, 2, 3, 4], [5, 1, 2, 3], [4, 5, 0, 0], [0, 0, 0, 0]],
        "document": [[0, 0, 0, 0], [0, 1, 1, 1], [1, 1, -1, -1], [-1, -1, -1, -1]],
        "kind": [[1, 1, 1, 1], [1, 2, 2, 2], [2, 2, -1, -1], [-1, -1, -1, -1]],
        "segment_ids": [[1, 1, 1, 1], [1, 2, 2, 2], [1, 1, 0, 0], [0, 0, 0, 0]],
        "positions": [[0, 1, 2, 3], [0, 0, 1, 2], [0, 1, 0, 1], [0, 1, 2, 3]],
    }
    (kept,) = document_batches(documents, marks, sequence_length=4, batch_size=2, keep=2)
    assert kept["tokens"].tolist() == [[1, 2, 3, 4], [4, 5, 0, 0]]  # the first and the last of three


# --- Files -----------------------------------------------------------------------------------------------------------


def passage(title, pieces, experts):
    """A passage of one choice per token, with weights 1/2."""
    experts = np.array(experts)[..., None]
    return Passage(title, pieces, experts, np.full(experts.shape, 0.5))


def explorer_summary(layers, num_experts, **more):
    return {
        "experts_per_token": 1,
        "num_experts": num_experts,
        "layers": layers,
        "domains": ["text"],
        "load": np.full((len(layers), 1, num_experts), 1 / num_experts).tolist(),
        "top_tokens": [[[] for _ in range(num_experts)] for _ in layers],
        **more,
    }


def test_the_explorer_is_one_file_and_escapes_its_data():
    pieces = ["<b>", "</script><script>alert(1)</script>", '"é"', "\u2028"]
    page = explorer.explorer_page(
        [passage("<code>", pieces, [[0, 1, 0, 0]])], explorer_summary([5], 2), [0], "a < b & </title>"
    )
    assert page.count("<script") == page.count("</script") == 2
    inside = page.partition('id="data">')[2].partition("</script>")[0]
    data = json.loads(inside)
    assert data["passages"][0]["pieces"] == pieces
    assert data["title"] == "a < b & </title>"
    assert np.frombuffer(base64.b64decode(data["passages"][0]["experts"]), "<u2").tolist() == [0, 1, 0, 0]
    assert np.frombuffer(base64.b64decode(data["passages"][0]["weights"]), "<u2").tolist() == [32768] * 4
    assert not re.search(r"""(src|href)=|url\(|@import|fetch\(""", page.replace(inside, ""))
    assert len(set(colours(8))) == 8
    assert len(set(colours(64))) == 64


def test_the_explorer_keeps_weights_above_1_and_tiny_ones():
    """A sigmoid gate's scale may be 2.5; weights are stored relative to the passage's largest, if that is above 1."""
    stored = []
    for weights in ([2.5, 1.25, 1e-9, 0.0], [0.5, 1e-9, 0.0, 0.0]):
        pieces, experts = ["a", "b", "c", "d"], np.zeros((1, 4, 1), int)
        shown = Passage("text", pieces, experts, np.array(weights, np.float32).reshape(1, 4, 1))
        page = explorer.explorer_page([shown], explorer_summary([5], 2), [0], "title")
        (kept,) = json.loads(page.partition('id="data">')[2].partition("</script>")[0])["passages"]
        stored.append((np.frombuffer(base64.b64decode(kept["weights"]), "<u2").tolist(), kept["unit"]))
    # 1.25 / 2.5 and 0.5 / 1 of 65,535 are 32,767.5, which is rounded to even.
    assert stored == [([65_535, 32_768, 1, 0], 2.5), ([32_768, 1, 0, 0], 1.0)]


def test_an_analysis_from_text_to_files(tokenizer, tmp_path):
    program, variables = tiny_program(vocab_size=320, num_layers=2)
    words = np.random.default_rng(0).choice(["red", "green", "blue", "fox", "über"], 400)
    prepared = Prepared(
        tokenizer, ("words", "$_$ |"), {}, {"words": [" ".join(words)], "$_$ |": [SOURCE * 30, "x = (\n" * 30]}
    )
    recorder = Recorder(program)
    other = jax.tree.map(lambda x: 0.5 * x, variables)

    def run():
        return analyse.analyse(
            recorder,
            variables,
            prepared,
            tokens=400,
            shuffles=5,
            seed=3,
            code_domain="$_$ |",
            step=12,
            characters=1000,
            earlier={4: lambda: other, 8: lambda: variables},
        )

    analysis = run()
    found = analysis.summary
    assert found == run().summary, "the same seed, the same numbers"
    assert all(392 < tokens <= 400 for tokens in found["tokens"]), "50 rows of 8, the last one padded"
    assert found["documents_without_syntax"] == 1
    assert set(found["dependence"]) == {
        "domain",
        "domain_matched",
        "lexical_matched",
        "token",
        "syntax",
        "token_in_code",
    }
    assert set(found["controls"]) == {"untrained", "hash"}
    for control in found["controls"].values():
        assert set(control["dependence"]) == set(found["dependence"])
        assert set(control["repetition"]["first"]) == {"words", "$_$ |"}
    # A hash of the token is explained by the token, and repeats as often as tokens do.
    hashed = found["controls"]["hash"]
    for layer in hashed["dependence"]["token"]:
        assert layer["information"] == pytest.approx(layer["x_entropy"])
    for layer in hashed["repetition"]["first"]["words"]:
        assert layer["token_mean"] == pytest.approx(layer["observed"])
    matched = [found["dependence"][label][0] for label in ("domain_matched", "lexical_matched")]
    assert matched[0]["samples"] == matched[1]["samples"] == pytest.approx(400, abs=12)  # odd ones of 100 rows
    assert matched[0]["values"] == matched[1]["values"] == 2
    assert found["load_over_training"]["steps"] == [4, 8, 12]
    np.testing.assert_allclose(np.sum(found["load_over_training"]["load"], axis=-1), 1)
    np.testing.assert_allclose(np.sum(found["load"], axis=-1), 1)
    # A checkpoint equal to the last one agrees in all choices; another one does not.
    assert found["saturation"]["top_k"][1] == found["saturation"]["top_1"][1] == [1.0, 1.0]
    assert max(found["saturation"]["top_1"][0]) < 1
    assert found["saturation"]["chance_top_k"] == 2 / 4
    shares, excess = (np.array(found["saturation"][name]) for name in ("top_k", "excess_top_k"))
    np.testing.assert_allclose(excess, (shares - 0.5) / 0.5)
    assert len(found["saturation"]["untrained_top_k"]) == 2
    for shown, text in zip(analysis.passages, (" ".join(words), SOURCE * 30), strict=True):
        assert "".join(shown.pieces) == text[:1000]
        assert shown.experts.shape == shown.weights.shape == (2, len(shown.pieces), 2)

    code = dataclasses.replace(prepared, domains=prepared.domains[1:])
    (passage,) = analyse._passages(recorder, variables, code, 14, 1)
    assert "".join(passage.pieces) == "x = (\nx = (\nx "
    with pytest.raises(ConfigError, match=r"document=1: must be from 0 to 0, the last held out of 'words'"):
        analyse.analyse(recorder, variables, prepared, tokens=8, shuffles=1, seed=0, document=1)

    names = analyse.write(analysis, epath.Path(tmp_path), "Tiny | model")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert json.loads((tmp_path / "analysis.json").read_text()) == found
    for name in ("load", "depth", "coactivation", "saturation", "experts"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "analysis.md").read_text()
    for before, line in itertools.pairwise(text.splitlines()):
        if before.startswith("|") and line.startswith("|"):  # rows of one table have equal numbers of cells
            assert line.replace(r"\|", "").count("|") == before.replace(r"\|", "").count("|")
    assert r"\$\_\$ \|" in text
    for room, name in enumerate(names[:4]):  # texts, and the first figure: a full disk is said with file and advice
        with fill_disk(room), pytest.raises(OSError, match="No space left") as caught:
            analyse.write(analysis, epath.Path(tmp_path), "Tiny | model")
        advice = "No space left on device; free space, and run the same command again"
        assert cli._refusal(caught.value) == f"{tmp_path / name}: {advice}"
    assert "\x1b" not in markdown.markdown(found, "evil \x1b[31m\nname")
    first = found["repetition"]["first"]["words"][1]
    assert f"{100 * first['observed']:.1f} ({100 * first['shuffled_mean']:.1f} ± " in text
    valid = {"tokens": 8, "shuffles": 1, "seed": 0, "characters": 100}
    for name, value in [
        *((name, 0) for name in analyse.LARGEST),
        ("shuffles", 10**6),
        ("tokens", 10**12),
        ("seed", -1),
    ]:
        with pytest.raises(ConfigError, match=f"{name}={value}: must be"):
            analyse.analyse(recorder, variables, prepared, **valid | {name: value})


def test_pieces_of_tokens(tokenizer):
    piece = summary.piece_of(tokenizer)
    ids = tokenizer.encode(" fox")
    assert "".join(piece(int(i)) for i in ids) == " fox"
    assert piece(tokenizer.eos_id) == f"«{tokenizer.eos_id}»"
    plane = tokenizer.encode("✈")
    assert piece(int(plane[0])) == f"«{plane[0]}»"
