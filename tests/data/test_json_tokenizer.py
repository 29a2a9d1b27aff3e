"""Tokenizers of open checkpoints: round trips, bytes counted once, and the files that a workdir keeps."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from moe.analysis.summary import piece_of
from moe.config import ConfigError
from moe.data.json_tokenizer import JsonTokenizer
from moe.data.tokenizer import train_tokenizer
from moe.data.tokenizer_files import find_tokenizer, read_tokenizer

TEXTS = ["hello wörld — 漢字\n", "  two  spaces\tand a tab", "", "a<|endoftext|>b"]


def byte_level() -> bytes:
    """A byte-level BPE tokenizer.json, like those of Qwen and OLMoE."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["hello two spaces and a tab"] * 10, trainer)
    return tokenizer.to_str().encode()


def byte_fallback() -> bytes:
    """A BPE tokenizer.json like Mixtral's: spaces are "▁", characters outside the vocabulary become byte tokens."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": i + 3 for i in range(256)}, "▁": 259, "a": 260}
    merges = [("▁", "a")]
    vocab["▁a"] = 261
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer.to_str().encode()


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_text_survives_the_round_trip_and_bytes_are_counted(make):
    tokenizer = JsonTokenizer(make())
    for text in TEXTS[:3]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes[tokenizer.eos_id] == 0
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)


@pytest.mark.parametrize(
    ("template", "settings", "ids"),
    [
        (None, {}, [260]),  # names <s>, and adds nothing
        ("<s> $A", {}, [1, 260]),
        ("$A </s>", {}, [260, 2]),
        ("<s> $A </s>", {}, [1, 260, 2]),
        ("<s> $A", {"add_bos_token": False, "add_eos_token": True}, [1, 260]),
        (None, {"add_bos_token": True}, [260]),
        ("<s> $A", {"bos_token": None}, [1, 260]),
    ],
)
def test_special_tokens_are_added_as_transformers_does(template, settings, ids):
    """All seven were read by AutoTokenizer of transformers 5.24."""
    tokenizer = tokenizers.Tokenizer.from_str(byte_fallback().decode())
    if template:
        special = [("<s>", 1), ("</s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    found = JsonTokenizer(tokenizer.to_str().encode(), json.dumps(settings | {"eos_token": "</s>"}).encode())
    assert found.encode_with_special("a", added=True).tolist() == ids
    assert found.encode_with_special("a").tolist() == [260]
    assert found.encode("a").tolist() == [260]  # in training the pipeline puts bos in front


def test_special_tokens_are_read_on_request_only():
    """A document's ``<s>`` is text; the same text in another library's tokenizer is the token."""
    name, (bos, eos) = "<s>a</s>", (1, 2)
    for tokenizer in (JsonTokenizer(byte_fallback()), train_tokenizer(["some text\n" * 99], 272)):
        a = tokenizer.encode("a").tolist()
        assert tokenizer.encode_with_special(name).tolist() == [bos, *a, eos]
        assert tokenizer.encode_with_special(f"a{name}").tolist() == [*a, bos, *a, eos]
        assert not {bos, eos} & {*tokenizer.encode(name).tolist()}
        assert tokenizer.encode_with_special("").size == 0


def test_marks_of_words_are_no_text():
    """WordPiece marks what continues a word, older BPE models its end: ``##ing`` is 3 bytes, ``b</w>`` is b and a
    blank."""
    pieces = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "play": 2, "##ing": 3}, unk_token="[UNK]"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    pieces.add_special_tokens(["[SEP]"])
    tokenizer = JsonTokenizer(pieces.to_str().encode(), b'{"eos_token": "[SEP]"}')
    ids = tokenizer.encode("playing")
    assert tokenizer.token_bytes[ids].tolist() == [4, 3]
    assert [piece_of(tokenizer)(int(i)) for i in ids] == ["play", "ing"]
    ends = {"a": 0, "b": 1, "a</w>": 2, "b</w>": 3, "ab</w>": 4, "</s>": 5}
    pairs = tokenizers.Tokenizer(models.BPE(ends, [("a", "b</w>")], end_of_word_suffix="</w>"))
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    pairs.add_special_tokens(["</s>"])
    tokenizer = JsonTokenizer(pairs.to_str().encode())
    ids = tokenizer.encode("ab aab")
    assert tokenizer.token_bytes[ids].tolist() == [3, 1, 3]
    assert [piece_of(tokenizer)(int(i)) for i in ids] == [" ab", "a", " ab"]


def test_special_tokens():
    assert (JsonTokenizer(byte_level()).bos_id, JsonTokenizer(byte_level()).eos_id) == (-1, 0)
    assert (JsonTokenizer(byte_fallback()).bos_id, JsonTokenizer(byte_fallback()).eos_id) == (1, 2)
    # tokenizer_config.json takes precedence, as a string or an object; null means no token.
    settings = json.dumps({"eos_token": {"content": "<s>"}, "bos_token": None, "pad_token": "</s>"}).encode()
    told = JsonTokenizer(byte_fallback(), settings)
    assert (told.bos_id, told.eos_id, told.pad_id) == (-1, 1, 2)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_a_document_is_neither_truncated_nor_padded(make):
    source = json.loads(make())
    text = "a tab and two spaces " * 30
    whole = JsonTokenizer(make()).encode(text)
    source["truncation"] = {"max_length": 64, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    source["padding"] = {
        **{"strategy": {"Fixed": 2048}, "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"},
    }
    tokenizer = JsonTokenizer(json.dumps(source).encode())
    np.testing.assert_array_equal(tokenizer.encode(text), whole)
    assert tokenizer.decode(whole) == text


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("model", "dropout"), 0.5, r"drops merges at random \(model\.dropout=0\.5\)"),
        (("model", "vocab", "!"), 70, "has a token twice, or two of one id"),
        (("added_tokens", 0, "id"), 5, r"has the added token '<\|endoftext\|>' with id 5, but its id is 0"),
        (("model", "continuing_subword_prefix"), "##", "not a tokenizer.json"),  # the library panics
        (
            ("normalizer",),
            {"type": "Replace", "pattern": {"Regex": "."}, "content": ""},
            "gives no ids for most text",
        ),
        (
            ("post_processor",),
            {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
            "gives no ids for most text",
        ),
    ],
)
def test_tokenizers_with_ambiguous_or_random_ids_are_refused(path, value, says):
    source = json.loads(byte_level())
    if value == 70:
        assert 70 in source["model"]["vocab"].values()
    *before, last = path
    functools.reduce(lambda node, key: node[key], before, source)[last] = value
    with pytest.raises(ConfigError, match=rf"^data\.tokenizer: .*{says}"):
        JsonTokenizer(json.dumps(source).encode())


def unigram() -> bytes:
    """A Unigram tokenizer.json like T5's, with pieces for the special tokens and for characters, but none for "<"."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("<extra_id_0>", 0.0), ("▁", -2.0)]
    pieces += [(character, -3.0) for character in "abdeipsxtr_0/>"]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_0>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer.to_str().encode()


def test_text_that_looks_like_a_special_token_is_text():
    for make, names in ((byte_level, ["<|endoftext|>"]), (byte_fallback, ["<s>", "</s>"])):
        tokenizer = JsonTokenizer(make())
        for name in names:
            ids = tokenizer.encode(f"a{name}b {name}")
            assert tokenizer.piece_id(name) not in ids
            assert tokenizer.decode(ids) == f"a{name}b {name}"
    tokenizer = JsonTokenizer(unigram())
    for name in ("<pad>", "</s>", "<extra_id_0>"):
        assert tokenizer.piece_id(name) not in tokenizer.encode(f"a {name} b{name}{name}")
    # Only "<" is not in the vocabulary; other text is encoded as usual.
    assert tokenizer.encode("</s>").tolist() == [4, 2, *(tokenizer.piece_id(c) for c in "/s>")]
    assert tokenizer.encode("as t").tolist() == [4, *(tokenizer.piece_id(c) for c in "as"), 4, tokenizer.piece_id("t")]


def test_normalizers_that_multiply_text_without_bound_are_refused():
    source = json.loads(byte_fallback())
    twice = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    source["normalizer"] = {"type": "Sequence", "normalizers": [twice] * 40}  # 2^40 = 1.1e12
    with pytest.raises(ConfigError, match=r"may make 1\.1e\+12 characters of one; at most 1024"):
        JsonTokenizer(json.dumps(source).encode())
    source["normalizer"]["normalizers"] = [twice] * 3
    assert len(JsonTokenizer(json.dumps(source).encode()).encode("a")) == 8


def test_a_regex_that_exceeds_its_limit_is_reported_in_one_sentence():
    source = json.loads(byte_fallback())
    pattern = {"Regex": "(a+)+$"}
    source["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    with pytest.raises(ConfigError, match=r"tokenizer\.json fails on the text 'aaa.*retry-limit"):
        JsonTokenizer(json.dumps(source).encode()).encode("a" * 34 + "!")


def test_a_tokenizer_is_found_beside_a_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match=r"has neither tokenizer\.model, tokenizer\.json nor spiece\.model"):
        find_tokenizer(tmp_path)
    settings = json.dumps({"eos_token": "<s>"}).encode()
    for name, content in JsonTokenizer(byte_fallback(), settings).files.items():
        (tmp_path / name).write_bytes(content)
    assert find_tokenizer(tmp_path).eos_id == 1
    own = train_tokenizer([f"word {i} of some text\n" * 9 for i in range(99)], 320)
    for name, content in own.files.items():
        (tmp_path / name).write_bytes(content)
    assert find_tokenizer(tmp_path).vocab_size == 320
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "spiece.model").write_bytes(own.model_bytes)  # as beside T5's checkpoints
    assert find_tokenizer(tmp_path / "t5").vocab_size == 320


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("[]", r"tokenizer_config\.json must be an object"),
        ("null", r"tokenizer_config\.json must be an object"),
        ("{", "not a tokenizer.json with a valid"),
        ('{"eos_token": 3}', "eos_token in tokenizer_config.json must be a string, not 3"),
        ('{"bos_token": true}', "bos_token in tokenizer_config.json must be a string, not True"),
        ('{"pad_token": {"content": [1]}}', "pad_token in tokenizer_config.json must be a string"),
    ],
)
def test_malformed_settings_are_refused(tmp_path, settings, message):
    (tmp_path / "tokenizer.json").write_bytes(byte_fallback())
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ConfigError, match=message) as caught:
        read_tokenizer(tmp_path / "tokenizer.json")
    assert str(tmp_path) in str(caught.value)


def test_an_excessive_id_is_refused():
    source = json.loads(byte_fallback())
    source["model"]["vocab"]["far"] = 2**31
    with pytest.raises(ConfigError, match="has an id of 2147483648; ids must be below"):
        JsonTokenizer(json.dumps(source).encode())


def test_unusable_tokenizers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"not a tokenizer\.json"):
        read_tokenizer(tmp_path / "tokenizer.json")
    without = json.loads(byte_level())
    without["added_tokens"] = []
    del without["model"]["vocab"]["<|endoftext|>"]
    with pytest.raises(ConfigError, match="no end-of-text token"):
        JsonTokenizer(json.dumps(without).encode())
    without["model"].update(vocab={}, merges=[])
    with pytest.raises(ConfigError, match="has an empty vocabulary"):
        JsonTokenizer(json.dumps(without).encode())
    with pytest.raises(ConfigError, match="text 'a' in a document becomes the special token 'a'"):
        JsonTokenizer(byte_fallback(), b'{"eos_token": "a"}')
