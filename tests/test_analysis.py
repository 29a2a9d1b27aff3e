"""Analysis of routing: hand-computed measures, chance, syntax classes, records, probes, and the files at the end."""

import base64
import dataclasses
import itertools
import json
import math
import re

import jax
import numpy as np
import pytest
from etils import epath
from sklearn.metrics import mutual_info_score

from moe.analysis import analyse, controls, explorer, lexical, markdown, measures, probes, summary
from moe.analysis.dependence import dependence, frequent
from moe.analysis.documents import Document, document_batches, read_document
from moe.analysis.passages import Passage, colours, pieces_of
from moe.analysis.record import Recorder
from moe.analysis.repetition import repetition, shared_experts, token_null, uniform_repetition
from moe.analysis.syntax import CLASSES, byte_classes, token_classes
from moe.config import Config, ConfigError, DataConfig, MeshConfig, TrainConfig
from moe.data.preparation import Prepared
from moe.data.tokenizer import train_tokenizer
from moe.parallel.mesh import make_mesh
from moe.routing.balancing import max_violation
from moe.routing.registry import find_gate
from moe.routing.routing import route
from moe.training.evaluation import Heldout, evaluate
from moe.training.step import build
from tests.helpers import random_parameters, tiny_model

B, T = 2, 8


# --- Measures --------------------------------------------------------------------------------------------------------
def test_first_choice_repetition_by_hand(rng):
    experts = np.array([0, 0, 1, 1, 1, 0])[:, None]
    # Equal neighbours: 00 yes, 01 no, 11 yes, 11 yes, 10 no.
    found = repetition(experts, np.arange(5), 4, shuffles=3000, rng=rng)
    assert found.observed == pytest.approx(3 / 5)
    assert found.uniform == pytest.approx(1 / 4)
    assert found.load == pytest.approx((3 / 6) ** 2 + (3 / 6) ** 2)
    # A shuffle puts two of the same expert side by side with probability (3·2 + 3·2) / (6·5).
    assert found.shuffled_mean == pytest.approx(12 / 30, abs=0.02)
    # At least 3 of 5 neighbours are equal in orders of at most 3 runs. Of C(6,3) = 20 orders, 2 have two runs (000111),
    # and 2 + 2 have three: one expert in one run, the other's three tokens split 1 + 2 or 2 + 1 around it.
    assert found.p_value == pytest.approx(6 / 20, abs=0.04)
    # Pairs that are not consecutive are not looked at.
    assert repetition(experts, np.array([0, 2]), 4, shuffles=1, rng=rng).observed == 1.0


def test_first_or_second_choice_repetition_by_hand(rng):
    sets = np.array([[0, 1], [2, 1], [3, 0]])
    found = repetition(sets, np.arange(2), 4, shuffles=10, rng=rng)
    assert found.observed == pytest.approx(1 / 2)  # {0,1} meets {1,2}; {1,2} does not meet {0,3}
    assert found.uniform == pytest.approx(1 - 1 / 6)  # C(2,2) / C(4,2)
    # Of 9 ordered pairs of these sets only ({1,2},{0,3}) and its mirror do not meet.
    assert found.load == pytest.approx(7 / 9)
    # Mixtral 2024, Table 5: 12.5 % and "about 46 %".
    assert uniform_repetition(8, 1) == pytest.approx(1 / 8)
    assert uniform_repetition(8, 2) == pytest.approx(1 - 15 / 28)
    with pytest.raises(ValueError, match="3 choices"):
        repetition(np.zeros((4, 3), int), np.arange(3), 8, shuffles=1, rng=rng)


def test_repetition_that_repeated_tokens_explain(rng):
    """Experts that are a function of the token repeat as often as tokens do; experts that follow the context more."""
    tokens = rng.integers(0, 3, 600).repeat(2)  # every token stands twice in a row
    consecutive = np.arange(len(tokens) - 1)
    found = token_null(tokens[:, None] % 2, tokens, consecutive, shuffles=20, rng=rng)
    observed = shared_experts(tokens[:, None] % 2, consecutive)
    assert (found.token_mean, found.token_std) == (pytest.approx(observed), 0)
    assert found.token_p_value == 1.0
    # By hand: tokens a a b with experts 0 1 0. The two a's exchange or not: 0 1 0 and 1 0 0 repeat 0 and 1 of 2.
    tokens, experts = np.array([7, 7, 9]), np.array([[0], [1], [0]])
    found = token_null(experts, tokens, np.arange(2), shuffles=2000, rng=rng)
    assert found.token_mean == pytest.approx(1 / 4, abs=0.03)
    # The first and the second half of a text have an expert each, whatever the token.
    halves = np.arange(400)[:, None] // 200
    found = token_null(halves, rng.integers(0, 3, 400), np.arange(399), shuffles=20, rng=rng)
    assert found.token_p_value == pytest.approx(1 / 21)
    assert found.token_mean == pytest.approx(0.5, abs=0.05)


def test_lexical_classes_and_merged_labels():
    texts = [" the", " The", "ing", " 42", ",", "(", "+", "\n  ", "«3»", "é"]
    names = ["word", "capitalised word", "word part", "number", "punctuation", "bracket", "symbol", "layout", "other"]
    found = lexical.lexical_classes(np.array([*range(10), 0]), texts.__getitem__)
    assert [lexical.CLASSES[i] for i in found] == [*names, "word part", "word"]
    labels = np.array([5, 5, 5, 2, 2, 9, 7])
    assert lexical.merge_labels(labels, 2).tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert lexical.merge_labels(labels, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert lexical.merge_labels(labels, 9).tolist() == [0, 0, 0, 1, 1, 3, 2]


def test_mutual_information_by_hand(rng):
    x, y = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    # H(x) = ¾ ln 4/3 + ¼ ln 4, H(y) = ln 2, joint (2, 1, 1)/4: H = ½ ln 2 + ½ ln 4
    h_x, h_y, h_xy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4), math.log(2), 1.5 * math.log(2)
    found = dependence(x, y, shuffles=2000, rng=rng)
    assert found.information == pytest.approx(h_x + h_y - h_xy)
    assert found.nmi == pytest.approx((h_x + h_y - h_xy) / ((h_x + h_y) / 2))
    # Any order of y puts its one lone partner of x = 1 with one of the two values: always this table.
    assert found.null_mean == pytest.approx(found.information)
    assert found.explained == pytest.approx(0, abs=1e-12)
    assert found.p_value == 1.0
    assert found.information == pytest.approx(mutual_info_score(x, y))
    same = dependence(np.repeat([5, 9], 50), np.repeat([2, 0], 50), shuffles=20, rng=rng)
    assert (same.nmi, same.information, same.values) == (pytest.approx(1), pytest.approx(math.log(2)), 2)
    assert same.p_value == pytest.approx(1 / 21)
    assert dependence(np.zeros(4, int), y, shuffles=2, rng=rng).nmi == 0


def test_the_null_takes_the_bias_of_rare_labels_away(rng):
    x, y = rng.integers(0, 8, 2000), rng.integers(0, 500, 2000)
    found = dependence(x, y, shuffles=40, rng=rng)
    assert found.information > 0.5 * 7 * 499 / (2 * 2000)  # independent, yet the plug-in estimate is near (7·499)/2n
    assert abs(found.information - found.null_mean) < 4 * found.null_std
    assert abs(found.explained) < 0.05
    assert frequent(np.array([7, 7, 3, 7, 3]), 3).tolist() == [True, True, False, True, False]


def test_labels_of_rows_are_permuted_over_rows(rng):
    """Experts that differ from row to row have nothing to do with domains: a null over tokens would say they have."""
    rows = np.repeat(np.arange(40), 50)
    experts, domain = rng.integers(0, 8, 40)[rows], (np.arange(40) // 20)[rows]
    by_token = dependence(experts, domain, shuffles=40, rng=rng)
    by_row = dependence(experts, domain, shuffles=40, rng=rng, units=rows)
    assert by_token.p_value == pytest.approx(1 / 41)
    assert by_row.p_value > 0.04
    assert by_row.null_mean > 10 * by_token.null_mean
    with pytest.raises(ValueError, match="same label"):
        dependence(experts, np.arange(2000), shuffles=1, rng=rng, units=rows)


INDEX = np.array([[[0, 1], [0, 2], [1, 0], [3, 0]]])  # [L,n,K]
CHOSEN = np.array([[[True, True], [True, True], [True, False], [True, True]]])


def test_load_coactivation_saturation_and_top_tokens_by_hand():
    load = measures.expert_load(INDEX, CHOSEN, np.array([0, 0, 1, 1]), 2, 4)
    np.testing.assert_allclose(load, [[[2 / 4, 1 / 4, 1 / 4, 0], [1 / 3, 1 / 3, 0, 1 / 3]]])
    np.testing.assert_allclose(max_violation(load), [[(1 / 2) / (1 / 4) - 1, (1 / 3) / (1 / 4) - 1]])
    probs = np.array([[[0.25] * 4, [1.0, 0, 0, 0]]])
    np.testing.assert_allclose(measures.mean_entropy(probs), [0.5])  # (ln 4 + 0) / 2 over ln 4

    pairs = measures.coactivation(INDEX, CHOSEN, 4)
    # Tokens: {0,1}, {0,2}, {1}, {0,3}; the third token's second choice was declined.
    np.testing.assert_array_equal(pairs, [[[3, 1, 1, 1], [1, 2, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]])

    final = measures.membership(INDEX, CHOSEN, 4)
    earlier = measures.membership(np.array([[[0, 3], [2, 0], [1, 2], [1, 2]]]), np.ones((1, 4, 2), bool), 4)
    # Of {0,1} one was there, of {0,2} both, of {1} all, of {0,3} none.
    np.testing.assert_allclose(measures.saturation(earlier, final), [(1 / 2 + 1 + 1 + 0) / 4])

    first, tokens = np.array([0, 0, 1, 0, 1, 1]), np.array([7, 7, 7, 8, 8, 9])
    found = measures.top_tokens(first, tokens, 3, at_least=2, number=5)
    # Expert 0 has half of all: 7 has 2/3 of it, 8 has 1/2, 9 is too rare; expert 2 has nothing.
    assert [(t.token, t.count, t.total) for t in found[0]] == [(7, 2, 3), (8, 1, 2)]
    assert [t.lift for t in found[0]] == pytest.approx([(2 / 3) / (1 / 2), 1.0])
    assert [t.token for t in found[1]] == [8, 7]
    assert found[2] == []


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
    assert byte_classes("x = (1,\n") is None  # a bracket that never closes
    assert byte_classes("if x:\n        y\n    z\n") is None  # a dedent to nowhere
    assert byte_classes("Once upon a time it isn't so\n") is None  # a string that never ends


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([SOURCE * 5, "red green blue fox and the über fox\n" * 9], 320)


def test_tokens_get_the_class_of_their_first_byte_that_is_not_blank(tokenizer):
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
    assert token_classes(read_document("x = (", tokenizer)) is None


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


def test_documents_become_rows():
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


# --- Records ---------------------------------------------------------------------------------------------------------
def tiny_program(**overrides):
    model = tiny_model(**overrides)
    config = Config(model=model, data=DataConfig(sequence_length=T), train=TrainConfig(batch_size=B))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return build(config, mesh), random_parameters(model)[1]


def random_batch(rng, vocab_size, real=B * T):
    where = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    segments = (np.arange(B * T).reshape(B, T) < real).astype(np.int32) * (1 + (where >= 5))
    tokens = rng.integers(0, vocab_size, (B, T)).astype(np.int32)
    targets = np.where(segments > 0, rng.integers(0, vocab_size, (B, T)), -1).astype(np.int32)
    return {"tokens": tokens, "segment_ids": segments, "positions": where, "targets": targets, "kind": tokens % 3}


@pytest.fixture(scope="module")
def recorded():
    """A program with one dense and two MoE layers, in groups of half a row; batches; its records."""
    rng = np.random.default_rng(0)
    program, variables = tiny_program(num_layers=3, first_dense=1, group_size=T // 2)
    batches = {
        "one": [random_batch(rng, 48), random_batch(rng, 48, real=11)],
        "two": [random_batch(rng, 48)],
    }
    recorder = Recorder(program)
    return recorder, variables, batches, recorder(variables, batches)


def test_records_are_what_the_routers_did(recorded):
    recorder, variables, batches, records = recorded
    model = recorder.program.model(variables)

    @jax.jit
    def alone(batch):
        return model(batch["tokens"], batch["segment_ids"], batch["positions"], return_routing=True).routing

    start = 0
    for batch in [*batches["one"], *batches["two"]]:
        routing, real = alone(batch), batch["segment_ids"].reshape(-1) > 0
        here = slice(start, start + real.sum())
        start += real.sum()
        for name in ("expert_index", "combine_weights", "chosen", "router_probs"):
            direct = np.asarray(getattr(routing, name))  # [L,G,S,·], groups in row order
            direct = direct.reshape(2, B * T, -1)[:, real]
            np.testing.assert_allclose(getattr(records, name)[:, here], direct, rtol=1e-5, atol=1e-6)
        for name in ("tokens", "segment_ids", "positions"):
            np.testing.assert_array_equal(getattr(records, name)[here], batch[name].reshape(-1)[real])
        np.testing.assert_array_equal(records.marks["kind"][here], batch["kind"].reshape(-1)[real])
    assert start == len(records.tokens) == 16 + 11 + 16
    assert (records.layers, records.domains, records.num_experts) == ((1, 2), ("one", "two"), 4)
    # Mixtral's rule: the two most probable experts, the first one first.
    np.testing.assert_array_equal(records.expert_index, np.argsort(-records.router_probs, axis=-1)[..., :2])
    assert records.domain.tolist() == [0] * 27 + [1] * 16
    assert np.bincount(records.row).tolist() == [8, 8, 8, 3, 8, 8]
    # No pair reaches over a row's end (8, 16, …) or a document's (5 in every row).
    assert 0 in records.consecutive
    assert not {4, 7, 12, 15, 20, 23, 26} & set(records.consecutive.tolist())
    assert len(records.consecutive) == 5 * (4 + 2) + 2
    half = records.select(records.domain == 1)
    np.testing.assert_array_equal(half.first_choice, records.first_choice[:, 27:])


def test_gates_that_list_every_expert_are_ordered_by_probability():
    program, variables = tiny_program(gate="dense_mixture", num_layers=1)
    records = Recorder(program)(variables, {"one": [random_batch(np.random.default_rng(0), 48)]})
    assert records.expert_index.shape == (1, 16, 4)
    np.testing.assert_array_equal(records.first_choice, records.router_probs.argmax(-1))
    assert (np.diff(records.combine_weights, axis=-1) <= 0).all()


def test_a_dense_model_is_refused():
    program, _ = tiny_program(gate="none")
    with pytest.raises(ConfigError, match=r"model.moe.gate='none'.*no routing"):
        Recorder(program)


# --- Controls --------------------------------------------------------------------------------------------------------
def test_hash_routing_depends_on_the_token_alone(recorded):
    _, _, _, records = recorded
    control = controls.hash_routing(records)
    assert control.expert_index.shape == records.expert_index.shape
    for token in np.unique(records.tokens):
        sets = control.expert_index[:, records.tokens == token].reshape(-1, 2)
        assert (sets == sets[0]).all()
        assert sets[0, 0] != sets[0, 1]
    assert len(np.unique(control.first_choice)) == 4


def test_untrained_routers_leave_the_rest_of_the_model(recorded):
    recorder, variables, batches, records = recorded
    model = recorder.program.config.model
    random = controls.untrain_routers(variables, model, seed=0)
    changed = []

    def compare(path, before, after):
        assert before.shape == after.shape
        if not np.array_equal(before, after):
            changed.append([entry.key for entry in path])

    jax.tree_util.tree_map_with_path(compare, variables, random)
    assert len(changed) == 1
    assert changed[0][-2:] == ["router", "kernel"]
    kernel = random["segment_1"]["block_0"]["moe"]["router"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])  # a layer each
    control = recorder(random, batches)
    np.testing.assert_array_equal(control.tokens, records.tokens)
    assert (control.first_choice != records.first_choice).any()
    assert controls.has_router(model)
    assert not controls.has_router(tiny_program(gate="hash")[0].config.model)


# --- Probes ----------------------------------------------------------------------------------------------------------
def test_masking_takes_the_most_probable_experts_of_each_token(rng):
    logits = rng.normal(size=(2, 5, 6)).astype(np.float32)
    order = np.argsort(-logits, axis=-1)
    mask = np.ones((2, 5), bool)

    def masked_route(name, experts, **options):
        gate = probes.masked_gate(find_gate(name), experts)
        return jax.jit(lambda x: route(gate, x, mask, experts_per_token=2, **options))(logits)

    masked = masked_route("mixtral", 3)
    np.testing.assert_array_equal(masked.expert_index, order[..., 3:5])
    two = np.exp(np.take_along_axis(logits, order[..., 3:5], axis=-1))
    np.testing.assert_allclose(masked.combine_weights, two / two.sum(-1, keepdims=True), rtol=1e-5)
    # With a selection bias, the highest of s + b go, however large the bias.
    bias = np.array([0, 0, 3, 0, -1, 0], np.float32)
    biased = np.argsort(-(1 / (1 + np.exp(-logits)) + bias), axis=-1)
    masked = masked_route("deepseek_v3", 2, selection_bias=bias, renormalise=True)
    np.testing.assert_array_equal(masked.expert_index, biased[..., 2:4])


def test_probes_of_a_frozen_model(rng):
    program, variables = tiny_program(gate="deepseek_moe", num_layers=1, experts_per_token=1, shared_d_ff=20)
    config, mesh = program.config, program.mesh
    heldout = Heldout({"text": [random_batch(rng, 48)]}, np.ones(48, np.int32))
    narrow, wide = (probes.eval_capacity(config, mesh, factor)(variables, heldout) for factor in (0.5, 4.0))
    full = probes.masked(config, mesh, 0)(variables, heldout)
    assert set(full) == {"all", "text"}
    assert full["all"] == pytest.approx(wide["all"], rel=1e-5)  # a factor of E drops nothing
    assert abs(wide["all"] - narrow["all"]) > 1e-3  # one of 0.5 drops half
    last = probes.masked(config, mesh, 3)(variables, heldout)["all"]
    assert abs(last - full["all"]) > 1e-3

    # Without its shared expert, and two choices: the same as a shared expert of zeros.
    swapped = probes.shared_for_routed(config, mesh)(variables, heldout)["all"]
    more = dataclasses.replace(config.model.moe, experts_per_token=2, eval_capacity_factor=4.0)
    config_two = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=more))
    silent = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if any(key.key == "shared" for key in path) else x, variables
    )
    with jax.set_mesh(mesh):
        expected = evaluate(build(config_two, mesh), silent, heldout)["all"]["loss"]
    assert swapped == pytest.approx(expected, rel=1e-5)
    assert abs(swapped - full["all"]) > 1e-3


def test_impossible_probes_are_refused():
    program, _ = tiny_program()
    config, mesh = program.config, program.mesh
    with pytest.raises(ConfigError, match="masked experts=3: must be from 0 to num_experts - experts_per_token = 2"):
        probes.masked(config, mesh, 3)
    with pytest.raises(ConfigError, match="no shared expert"):
        probes.shared_for_routed(config, mesh)
    with pytest.raises(ConfigError, match="eval_capacity_factor"):
        probes.eval_capacity(config, mesh, -1.0)
    for gate in ("hash", "none"):
        with pytest.raises(ConfigError, match=f"model.moe.gate='{gate}'"):
            probes.masked(tiny_program(gate=gate)[0].config, mesh, 1)


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
    assert set(found["dependence"]) == {"domain", "lexical_matched", "token", "syntax", "token_in_code"}
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
    assert found["dependence"]["lexical_matched"][0]["values"] == found["dependence"]["domain"][0]["values"] == 2
    assert found["load_over_training"]["steps"] == [4, 8, 12]
    np.testing.assert_allclose(np.sum(found["load_over_training"]["load"], axis=-1), 1)
    np.testing.assert_allclose(np.sum(found["load"], axis=-1), 1)
    # A checkpoint that is the last one has all of its choices; another one has not.
    assert found["saturation"]["top_k"][1] == found["saturation"]["top_1"][1] == [1.0, 1.0]
    assert max(found["saturation"]["top_1"][0]) < 1
    assert found["saturation"]["chance_top_k"] == 2 / 4
    shares, excess = (np.array(found["saturation"][name]) for name in ("top_k", "excess_top_k"))
    np.testing.assert_allclose(excess, (shares - 0.5) / 0.5)
    assert len(found["saturation"]["untrained_top_k"]) == 2
    for shown, text in zip(analysis.passages, (" ".join(words), SOURCE * 30), strict=True):
        assert "".join(shown.pieces) == text[:1000]
        assert shown.experts.shape == shown.weights.shape == (2, len(shown.pieces), 2)

    names = analyse.write(analysis, epath.Path(tmp_path), "Tiny | model")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert json.loads((tmp_path / "analysis.json").read_text()) == found
    for name in ("load", "depth", "coactivation", "saturation", "experts"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "analysis.md").read_text()
    for before, line in itertools.pairwise(text.splitlines()):
        if before.startswith("|") and line.startswith("|"):  # of one table: as many cells
            assert line.replace(r"\|", "").count("|") == before.replace(r"\|", "").count("|")
    assert r"$_$ \|" in text
    assert "\x1b" not in markdown.markdown(found, "evil \x1b[31m\nname")
    first = found["repetition"]["first"]["words"][1]
    assert f"{100 * first['observed']:.1f} ({100 * first['shuffled_mean']:.1f} ± " in text
    with pytest.raises(ConfigError, match="shuffles=0"):
        analyse.analyse(recorder, variables, prepared, tokens=8, shuffles=0, seed=0)


def test_pieces_of_tokens(tokenizer):
    piece = summary.piece_of(tokenizer)
    ids = tokenizer.encode(" fox")
    assert "".join(piece(int(i)) for i in ids) == " fox"
    assert piece(tokenizer.eos_id) == f"«{tokenizer.eos_id}»"
    plane = tokenizer.encode("✈")
    assert piece(int(plane[0])) == f"«{plane[0]}»"
