"""Measures of routing against hand-computed values and chance."""

import math
import types

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from moe.analysis import dependence as dependence_module
from moe.analysis import lexical, measures
from moe.analysis.dependence import dependence, frequent
from moe.analysis.permutation import permutation_test
from moe.analysis.repetition import repetition, shared_experts, token_null, uniform_repetition
from moe.routing.balancing import max_violation


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
    # Only consecutive pairs count.
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
    """Experts that are a function of the token repeat as often as the tokens; experts by context repeat more often."""
    tokens = rng.integers(0, 3, 600).repeat(2)  # every token appears twice in a row
    consecutive = np.arange(len(tokens) - 1)
    found = token_null(tokens[:, None] % 2, tokens, consecutive, shuffles=20, rng=rng)
    observed = shared_experts(tokens[:, None] % 2, consecutive)
    assert (found.token_mean, found.token_std) == (pytest.approx(observed), 0)
    assert found.token_p_value == 1.0
    # By hand: tokens a a b with experts 0 1 0. Exchanging the experts of the two a's or not gives 0 or 1 repeat of 2.
    tokens, experts = np.array([7, 7, 9]), np.array([[0], [1], [0]])
    found = token_null(experts, tokens, np.arange(2), shuffles=2000, rng=rng)
    assert found.token_mean == pytest.approx(1 / 4, abs=0.03)
    # Each half of a text has its own expert, whatever the token.
    halves = np.arange(400)[:, None] // 200
    found = token_null(halves, rng.integers(0, 3, 400), np.arange(399), shuffles=20, rng=rng)
    assert found.token_p_value == pytest.approx(1 / 21)
    assert found.token_mean == pytest.approx(0.5, abs=0.05)
    assert token_null(halves, halves[:, 0], np.arange(399), shuffles=1, rng=rng).token_std == 0  # of a single one


def test_two_exchanges_of_a_tokens_experts_by_hand():
    """Tokens a a b with experts 0 1 0: left as they are, none repeats; exchanged, one of two does."""
    draws = iter(([0.1, 0.2, 0.3], [0.2, 0.1, 0.3]))
    drawn = types.SimpleNamespace(random=lambda size: np.array(next(draws)))
    experts = np.array([[0], [1], [0]])
    found = token_null(experts, np.array([7, 7, 9]), np.arange(2), shuffles=2, rng=drawn)
    assert (found.token_mean, found.token_std) == (1 / 4, pytest.approx(1 / 2 / math.sqrt(2)))
    assert found.token_p_value == 1


def test_labels_of_rows_are_exchanged_and_rotated(rng):
    labels, rows = np.arange(12), np.repeat(np.arange(3), 4)
    turned = 0
    for found in dependence_module._permuted(labels, rows, 20, rng):
        assert sorted(found.tolist()) == list(range(12))
        for row in found.reshape(3, 4):
            assert np.array_equal(np.roll(row, -int(row.argmin())), row.min() + np.arange(4))
            turned += int(row.argmin() > 0)
    assert 0 < turned < 60


def test_excess_of_information_is_a_share_of_the_experts_entropy(monkeypatch):
    """Four experts and two labels share ln 2; of two permutations one shares as much, the other nothing."""
    x, y = np.array([0, 0, 1, 1, 2, 2, 3, 3]), np.array([0, 0, 0, 0, 1, 1, 1, 1])
    monkeypatch.setattr(dependence_module, "_permuted", lambda *_: iter([y, np.array([0, 1] * 4)]))
    found = dependence(x, y, np.arange(8), shuffles=2, rng=np.random.default_rng(0))
    assert (found.information, found.null_mean) == (pytest.approx(math.log(2)), pytest.approx(math.log(2) / 2))
    assert found.null_std == pytest.approx(math.log(2) / math.sqrt(2))
    assert found.explained == pytest.approx(math.log(2) / 2 / math.log(4))
    assert found.p_value == pytest.approx(2 / 3)


def test_all_permutations_of_three_values_by_hand(rng):
    """The first of 3, 1 and 2 is 3 in two of six orders; the null is 1, 1, 2, 2, 3, 3."""
    found = permutation_test(np.array([3.0, 1, 2]), lambda values: values[0], permutations=100, rng=rng)
    assert (found.observed, found.mean, found.p_value) == (3, 2, pytest.approx(2 / 6))
    assert found.std == pytest.approx(math.sqrt(4 / 5))
    assert permutation_test(np.arange(9.0), lambda values: values[0], permutations=1, rng=rng).std == 0


def test_lexical_classes():
    texts = [" the", " The", "ing", " 42", ",", "(", "+", "\n  ", "«3»", "é", " «", "»", "«a»"]
    names = ["word", "capitalised word", "word part", "number", "punctuation", "bracket", "symbol", "layout", "other"]
    found = lexical.lexical_classes(np.array([*range(len(texts)), 0]), texts.__getitem__)
    assert [lexical.CLASSES[i] for i in found] == [*names, "word part", *["punctuation"] * 3, "word"]


def test_labels_are_merged_where_the_least_information_is_lost():
    # Labels 0 and 2 always go to expert 0, label 1 to expert 1, label 3 to both alike; label 4 has no token.
    labels = np.array([0, 0, 2, 2, 2, 1, 1, 1, 3, 3])
    experts = np.array([0, 0, 0, 0, 0, 1, 1, 1, 0, 1])
    three = lexical.merge_labels(labels, experts, num_labels=5, values=3)
    assert three[0] == three[2]
    assert len({three[0], three[1], three[3]}) == 3
    two = lexical.merge_labels(labels, experts, num_labels=5, values=2)
    # 3 joins expert 1's or expert 0's: 5 + 2 tokens of (6, 1) lose less than 3 + 2 of (1, 4)? By hand, in nats:
    # 7 H(1/7) = 2.87 and 5 H(1/5) = 2.50, each less 2 ln 2 = 1.39 that label 3 has already: 1 takes it.
    assert two[3] == two[1] != two[0] == two[2]
    assert lexical.merge_labels(labels, experts, num_labels=5, values=9).tolist() == [0, 1, 2, 3, 4]


def test_only_pairs_with_the_new_group_are_measured_after_a_merge(monkeypatch):
    """20 labels: 20 alone and 190 pairs, then for each of 18 merges the new group, and with the n that are left."""
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(20), rng.integers(0, 20, 1_000)])
    experts = (7 * labels + rng.integers(0, 3, len(labels))) % 8
    measured, uncertainty = [], lexical._uncertainty
    monkeypatch.setattr(lexical, "_uncertainty", lambda counts: measured.append(1) or uncertainty(counts))
    found = lexical.merge_labels(labels, experts, num_labels=20, values=2)
    assert len(measured) == 20 + 190 + sum(1 + left - 1 for left in range(2, 20))
    tables = [np.bincount(experts[labels == label], minlength=8).astype(float) for label in range(20)]
    groups = [{label} for label in range(20)]
    while len(groups) > 2:  # every pair measured anew
        pairs = [(a, b) for a in range(len(groups)) for b in range(a + 1, len(groups))]
        costs = [uncertainty(tables[a] + tables[b]) - uncertainty(tables[a]) - uncertainty(tables[b]) for a, b in pairs]
        a, b = pairs[int(np.argmin(costs))]
        groups[a] |= groups.pop(b)
        tables[a] = tables[a] + tables.pop(b)
    assert [set(np.flatnonzero(found == number)) for number in range(2)] == groups


def test_mutual_information_by_hand(rng):
    x, y = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    # H(x) = ¾ ln 4/3 + ¼ ln 4, H(y) = ln 2, joint (2, 1, 1)/4: H = ½ ln 2 + ½ ln 4
    h_x, h_y, h_xy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4), math.log(2), 1.5 * math.log(2)
    found = dependence(x, y, np.arange(4), shuffles=2000, rng=rng)
    assert found.information == pytest.approx(h_x + h_y - h_xy)
    assert found.nmi == pytest.approx((h_x + h_y - h_xy) / ((h_x + h_y) / 2))
    # Every permutation of y pairs the one x = 1 with one of two equally frequent values: the table is always this one.
    assert found.null_mean == pytest.approx(found.information)
    assert found.explained == pytest.approx(0, abs=1e-12)
    assert found.p_value == 1.0
    assert found.information == pytest.approx(mutual_info_score(x, y))
    same = dependence(np.repeat([5, 9], 50), np.repeat([2, 0], 50), np.arange(100), shuffles=20, rng=rng)
    assert (same.nmi, same.information, same.values) == (pytest.approx(1), pytest.approx(math.log(2)), 2)
    assert same.p_value == pytest.approx(1 / 21)
    # Both entropies are ln 2.
    assert same.null_std > 0
    shares = (same.nmi_null, same.nmi_null_std, same.nmi_debiased)
    assert shares == pytest.approx((same.null_mean / math.log(2), same.null_std / math.log(2), 1 - same.nmi_null))
    assert dependence(np.zeros(4, int), y, np.arange(4), shuffles=2, rng=rng).nmi == 0


def test_the_null_takes_the_bias_of_rare_labels_away(rng):
    x, y = rng.integers(0, 8, 2000), rng.integers(0, 500, 2000)
    found = dependence(x, y, np.arange(2000) // 50, shuffles=40, rng=rng)
    assert found.information > 0.5 * 7 * 499 / (2 * 2000)  # independent, yet the plug-in estimate is near (7·499)/2n
    assert abs(found.information - found.null_mean) < 4 * found.null_std
    assert abs(found.explained) < 0.05
    assert frequent(np.array([7, 7, 3, 7, 3]), 3).tolist() == [True, True, False, True, False]


def test_labels_are_permuted_over_rows(rng):
    """Experts that differ from row to row are independent of domains; permuting tokens would call them dependent."""
    rows = np.repeat(np.arange(40), 50)
    experts, domain = rng.integers(0, 8, 40)[rows], (np.arange(40) // 20)[rows]
    by_token = dependence(experts, domain, np.arange(2000), shuffles=40, rng=rng)
    by_row = dependence(experts, domain, rows, shuffles=40, rng=rng)
    assert by_token.p_value == pytest.approx(1 / 41)
    assert by_row.p_value > 0.04
    assert by_row.null_mean > 10 * by_token.null_mean
    # Two rows, one of each domain: exchanging them gives equivalent tables, so that nothing can be concluded.
    assert (
        dependence(np.repeat([3, 5], 50), np.repeat([0, 1], 50), np.arange(100) // 50, shuffles=9, rng=rng).p_value == 1
    )


def test_tokens_without_a_label_do_not_count(rng):
    x, y, rows = rng.integers(0, 4, 300), rng.integers(0, 3, 300), np.arange(300) // 30
    y[200:] = -1
    found = dependence(x, y, rows, shuffles=5, rng=rng)
    assert (found.samples, found.values) == (200, 3)
    assert found.information == pytest.approx(mutual_info_score(x[:200], y[:200]))
    # A single label has no information, in the observed order or another.
    assert dependence(x, np.minimum(y, 0), np.arange(300) // 40, shuffles=5, rng=rng).null_mean == 0
    with pytest.raises(ValueError, match="a token with a label"):
        dependence(x, np.full(300, -1), rows, shuffles=1, rng=rng)


def _sticky(rng, values, rows, length, stay):
    """Rows of a Markov chain that keeps its value with probability `stay`; each row has its own distribution."""
    favourites = rng.dirichlet(np.ones(values), rows)
    drawn = np.stack([rng.choice(values, length, p=own) for own in favourites])
    keep = rng.random((rows, length)) < stay
    keep[:, 0] = False
    last = np.maximum.accumulate(np.where(keep, 0, np.arange(length)), axis=1)
    return np.take_along_axis(drawn, last, axis=1).reshape(-1)


def test_independent_sequences_are_found_independent_however_alike_neighbours_are(rng):
    """Independent sticky experts and labels have p <= 0.05 in about 5 % of draws, and explain nothing on average."""
    rows, length, draws = 16, 64, 200
    row = np.repeat(np.arange(rows), length)
    found = [
        dependence(_sticky(rng, 4, rows, length, 0.8), _sticky(rng, 6, rows, length, 0.8), row, shuffles=19, rng=rng)
        for _ in range(draws)
    ]
    share = np.mean([one.p_value <= 0.05 for one in found])
    explained = np.array([one.explained for one in found])
    assert 0.01 < share < 0.11  # four standard errors of 200 draws are 0.06; exchanging tokens gives 1.0
    assert abs(explained.mean()) < 4 * explained.std() / draws**0.5 < 0.006  # exchanging tokens gives 0.03
    # A label that follows the experts half of the time is detected.
    x = _sticky(rng, 4, rows, length, 0.8)
    y = np.where(rng.random(rows * length) < 0.5, x, _sticky(rng, 4, rows, length, 0.8))
    assert dependence(x, y, row, shuffles=39, rng=rng).p_value == pytest.approx(1 / 40)


INDEX = np.array([[[0, 1], [0, 2], [1, 0], [3, 0]]])  # [L,n,K]
CHOSEN = np.array([[[True, True], [True, True], [True, False], [True, True]]])


def test_load_coactivation_saturation_and_top_tokens_by_hand():
    load = measures.expert_load(INDEX, CHOSEN, np.array([0, 0, 1, 1]), 2, 4)
    np.testing.assert_allclose(load, [[[2 / 4, 1 / 4, 1 / 4, 0], [1 / 3, 1 / 3, 0, 1 / 3]]])
    np.testing.assert_allclose(np.asarray(max_violation(load)), [[(1 / 2) / (1 / 4) - 1, (1 / 3) / (1 / 4) - 1]])
    probs = np.array([[[0.25] * 4, [1.0, 0, 0, 0]]])
    np.testing.assert_allclose(measures.mean_entropy(probs), [0.5])  # (ln 4 + 0) / 2 over ln 4
    np.testing.assert_array_equal(measures.mean_entropy(np.ones((1, 3, 1))), [0])
    np.testing.assert_allclose(measures.mean_entropy(np.full((1, 3, 2), 0.5)), [1])

    pairs = measures.coactivation(INDEX, CHOSEN, 4)
    # Tokens: {0,1}, {0,2}, {1}, {0,3}; the third token's second choice was declined.
    np.testing.assert_array_equal(pairs, [[[3, 1, 1, 1], [1, 2, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]])

    observed, by_load = measures.most_frequent_partner(pairs)
    # Partners' shares 1/3, 1/2, 1, 1. By load: 3 other choices of 3 tokens, a load of 2 of the others' 2 + 1 + 1; then
    # 1 of 2, 3 of 3 + 1 + 1; 1 of 1, 3 of 3 + 2 + 1; and the same.
    np.testing.assert_allclose(observed, [(1 / 3 + 1 / 2 + 1 + 1) / 4])
    np.testing.assert_allclose(by_load, [(2 / 4 + 1 / 2 * 3 / 5 + 3 / 6 + 3 / 6) / 4])
    # Two tokens choose all three experts: 2 other choices, each of which is the partner in half of the draws.
    _, by_load = measures.most_frequent_partner(np.array([[[2, 2, 2], [2, 2, 2], [2, 2, 2]]]))
    np.testing.assert_allclose(by_load, [1.0])
    _, by_load = measures.most_frequent_partner(np.array([[[2, 2, 2], [2, 9, 2], [2, 2, 2]]]))
    np.testing.assert_allclose(by_load, [(1 + 4 / 9 * 2 / 4 + 1) / 3])  # 2 · 9 / 11 counts as 1
    _, by_load = measures.most_frequent_partner(np.ones((1, 2, 2)))  # one token chooses both experts
    np.testing.assert_allclose(by_load, [1.0])
    alone, _ = measures.most_frequent_partner(np.diag([2, 0, 1])[None])  # K = 1, and an unused expert
    np.testing.assert_allclose(alone, [0.0])

    final = measures.membership(INDEX, CHOSEN, 4)
    earlier = measures.membership(np.array([[[0, 3], [2, 0], [1, 2], [1, 2]]]), np.ones((1, 4, 2), bool), 4)
    # Of {0,1} one was already chosen, of {0,2} both, of {1} all, of {0,3} none.
    np.testing.assert_allclose(measures.saturation(earlier, final), [(1 / 2 + 1 + 1 + 0) / 4])

    # A token without a final assignment is left out.
    final[0, 3] = False
    np.testing.assert_allclose(measures.saturation(earlier, final), [(1 / 2 + 1 + 1) / 3])

    # ReMoE may use no expert of a layer.
    assert measures.saturation(earlier, np.zeros_like(final)).tolist() == [0]
    assert [part.tolist() for part in measures.most_frequent_partner(np.zeros((1, 4, 4)))] == [[0], [0]]

    first, tokens = np.array([0, 0, 1, 0, 1, 1]), np.array([7, 7, 7, 8, 8, 9])
    found = measures.top_tokens(first, tokens, 3, at_least=2, number=5)
    # Expert 0 gets half of all tokens, 2/3 of token 7 and 1/2 of 8; 9 is too rare; expert 2 gets no token.
    assert [(t.token, t.count, t.total) for t in found[0]] == [(7, 2, 3), (8, 1, 2)]
    assert [t.lift for t in found[0]] == pytest.approx([(2 / 3) / (1 / 2), 1.0])
    assert [t.token for t in found[1]] == [8, 7]
    assert found[2] == []
    # The higher lift comes first, whatever the count: all of one token before two of three. No more than are asked for.
    often = measures.top_tokens(np.array([0, 0, 1, 0]), np.array([7, 7, 7, 8]), 2, at_least=1, number=5)
    assert [(t.token, t.count) for t in often[0]] == [(8, 1), (7, 2)]
    # At equal lifts the higher count comes first.
    equal = measures.top_tokens(np.array([0, 0, 0]), np.array([8, 8, 7]), 1, at_least=1, number=5)
    assert [(t.token, t.count) for t in equal[0]] == [(8, 2), (7, 1)]
    assert [t.token for t in measures.top_tokens(first, tokens, 3, at_least=1, number=2)[1]] == [9, 8]
