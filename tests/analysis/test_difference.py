"""The difference between two models' routing and losses: by hand, for a planted permutation, and from two runs."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from moe.analysis import difference, difference_page
from moe.analysis.record import Recorder, Records
from moe.config import ConfigError
from moe.training.batches import forward
from moe.training.losses import cross_entropy
from tests.analysis_helpers import random_batch, tiny_program

ROWS, LENGTH, E = 40, 30, 4


def _records(first, row=None, probs=None):
    n = first.shape[-1]
    index = np.broadcast_to(first, (1, n))[..., None].astype(np.int32)
    given = np.zeros((1, n, E), np.float32) if probs is None else probs
    row = np.repeat(np.arange(ROWS), LENGTH) if row is None else row
    flat = {"domain": np.zeros(n, np.int32), "segment_ids": np.ones(n, np.int32), "positions": np.arange(n) % LENGTH}
    return Records(
        ("text",), (1,), E, tokens=np.arange(n) % 7, row=row, expert_index=index, combine_weights=np.ones(index.shape),
        chosen=np.ones(index.shape, bool), router_probs=given, marks={}, **flat,
    )  # fmt: skip


def test_a_planted_permutation_is_found_and_the_rest_counted(rng):
    """Every fourth token goes to another expert: 3/4 agree under the permutation."""
    first = rng.integers(0, E, ROWS * LENGTH)
    planted = np.array([2, 3, 0, 1])
    second = planted[first]
    moved = np.arange(len(first)) % 4 == 3
    second = np.where(moved, planted[(first + 1) % E], second)
    probs = np.zeros((1, len(first), E), np.float32)
    probs[0, :, 0] = np.where(moved, 0.1, 0.9)  # the moved tokens have small margins
    (found,) = difference.agreements(_records(first, probs=probs), _records(second), shuffles=50, seed=0)
    assert found.permutation == planted.tolist()
    assert found.first == found.sets == 0.75 - (0.75 - np.mean(~moved[np.repeat(np.arange(ROWS), LENGTH) % 2 == 1]))
    assert found.by_margin[0] == 0
    assert found.by_margin[-1] == 1
    assert found.p_value == 1 / 51
    assert abs(found.null - found.chance) < 4 * found.null_std + 0.01
    same = difference.same_layers(_records(first), _records(second), [found])
    assert np.array_equal(same == 1, ~moved)


def test_agreement_by_hand():
    """Even rows show that the other model's expert e + 2 is the first's e; eight tokens of odd rows are measured. They
    choose two experts each, but the first of them declines its second choice in the first model."""
    planted = np.array([2, 3, 0, 1])
    one = np.array([[0, 1]] * 4 + [[1, 0]] * 2 + [[2, 0], [3, 0]])
    other = np.array([[0, 2]] * 2 + [[1, 0]] * 6)
    margins = np.array([0.8, 0.7, 0.1, 0.2, 0.6, 0.5, 0.3, 0.4])
    seen = np.array([[0, 1], [1, 2], [2, 3], [3, 0]] * 2)
    row = np.repeat([0, 1, 2, 3], 4)
    probs = np.zeros((1, 16, E), np.float32)
    probs[0, :, 0] = 0.9
    probs[0, :, 1] = 0.9 - np.concatenate([margins[:4] * 0 + 0.5, margins[:4], margins[4:] * 0 + 0.5, margins[4:]])

    def placed(measured):
        index = np.concatenate([seen[:4], measured[:4], seen[4:], measured[4:]])[None]
        return {"expert_index": index, "combine_weights": np.ones(index.shape), "chosen": np.ones(index.shape, bool)}

    records = _records(np.zeros(16, int), row=row, probs=probs)
    first, second = (dataclasses.replace(records, **placed(each)) for each in (one, other))
    second = dataclasses.replace(second, expert_index=planted[second.expert_index])
    first.chosen[0, 4, 1] = False
    (found,) = difference.agreements(first, second, shuffles=9, seed=0)
    assert found.permutation == planted.tolist()
    assert found.first == 4 / 8
    # {0} of {0,2}, half of {0,1}, twice all of {0,1}, twice all of {1,0}, half of {2,0} and of {3,0}.
    assert found.sets == (1 + 1 / 2 + 4 + 1 / 2 + 1 / 2) / 8
    # Loads of 4/8, 2/8, 1/8, 1/8 and of 2/8, 6/8.
    assert found.chance == 1 / 2 * 1 / 4 + 1 / 4 * 3 / 4
    assert found.load_distance == (1 / 4 + 1 / 2 + 1 / 8 + 1 / 8) / 2
    assert found.by_margin == [0, 0, 1, 1]


def test_tokens_without_an_expert_have_none_in_common(rng):
    """Under expert choice no expert may take a token: a model has all experts in common with itself."""
    records = _records(rng.integers(0, E, ROWS * LENGTH))
    records = dataclasses.replace(records, chosen=records.chosen & (np.arange(ROWS * LENGTH) % 3 > 0)[:, None])
    (found,) = difference.agreements(records, records, shuffles=2, seed=0)
    assert found.sets == 1
    none = dataclasses.replace(records, chosen=np.zeros_like(records.chosen))
    assert difference.agreements(none, records, shuffles=2, seed=0)[0].sets == 0


def test_odd_rows_do_not_decide_which_experts_match():
    """In two tokens of an even row the experts are the same, in six of an odd one they are exchanged."""
    row = np.array([0, 0, 1, 1, 1, 1, 1, 1])
    first, second = (_records(np.array(each), row=row) for each in ([0, 1] * 4, [0, 1] + [1, 0] * 3))
    (found,) = difference.agreements(first, second, shuffles=1, seed=0)
    assert (found.permutation[:2], found.first) == ([0, 1], 0)


def test_independent_choices_agree_by_chance(rng):
    """Choices are constant within a row in both models; by design at most 5 % of draws have p of at most 0.05."""
    low = 0
    for draw in range(40):
        first, second = (np.repeat(rng.integers(0, E, ROWS), LENGTH) for _ in range(2))
        (found,) = difference.agreements(_records(first), _records(second), shuffles=39, seed=draw)
        low += found.p_value <= 0.05
    assert low <= 6  # P(more than 6 of 40 at 0.05) = 0.003


def test_loss_differences_by_hand(rng):
    """Rows of 1, 1 and 4, 2 nats: mean 2; residuals of the sums -2 and 2; error sqrt(2/1 x 8) / 4 = 1; t is 12.7."""
    found = difference.loss_difference(np.array([1.0, 1, 4, 2, np.nan]), np.array([0, 0, 1, 1, 2]))
    assert (found.mean, found.tokens) == (2, 4)
    assert found.high - found.mean == pytest.approx(12.7062, rel=1e-5)
    assert difference.loss_difference(np.array([1.0, np.nan]), np.array([0, 1])) is None
    assert list(difference._quarters(np.array([8, 1, 2, 3, 4, 5, 6, 7]))) == ["1 to 2", "3 to 4", "5 to 6", "7 to 8"]
    records = _records(rng.integers(0, E, ROWS * LENGTH))
    records = dataclasses.replace(records, tokens=3 * records.tokens)
    first = rng.random(ROWS * LENGTH)
    groups = difference.loss_differences(
        records, first, first + 0.5, np.arange(ROWS * LENGTH) % 2, lambda token: " a" if token % 2 else "1"
    )
    assert set(groups["token class"]) == {"word", "number"}
    assert set(groups["layers with the same first expert"]) == {"0 of 1", "1 of 1"}
    # Of 1200 tokens with 7 ids, the first three ids have 172 each.
    assert {name: value.tokens for name, value in groups["occurrences of the token"].items()} == {
        "171 to 171": 4 * 171, "172 to 172": 3 * 172,
    }  # fmt: skip
    for values in groups.values():
        assert sum(value.tokens for value in values.values()) == ROWS * LENGTH
        assert all(value.mean == pytest.approx(0.5) for value in values.values())


@pytest.fixture(scope="module")
def tiny():
    """(program, variables, recorder, per-token losses)."""
    program, variables = tiny_program(dispatch="einsum")
    return program, variables, Recorder(program), difference.TokenLosses(program)


def test_losses_of_tokens_are_those_of_the_model(rng, tiny):
    program, variables, recorder, losses = tiny
    batch = random_batch(rng, program.config.model.vocab_size, real=13)
    found = losses(variables, {"text": [batch]})
    total = jax.jit(lambda batch: cross_entropy(forward(program.model(variables), batch).logits, batch["targets"]))
    nll, count = total(batch)
    assert found.shape == (13,)
    domain, row = difference.places({"other": [batch], "text": [batch]})
    records = recorder(variables, {"other": [batch], "text": [batch]})
    assert np.array_equal(domain, records.domain)
    assert np.array_equal(row, records.row)
    assert np.sum(~np.isnan(found)) == count
    np.testing.assert_allclose(np.nansum(found), nll, rtol=1e-5)


def test_what_cannot_be_compared_is_refused(rng):
    one = _records(rng.integers(0, E, ROWS * LENGTH))
    for changes, message in (
        ({"tokens": one.tokens + 1}, "read different tokens"),
        ({"layers": (1, 2)}, "1 MoE layers, the other 2"),
        ({"num_experts": 8}, "4 experts"),
    ):
        with pytest.raises(ConfigError, match=message):
            difference.agreements(one, dataclasses.replace(one, **changes), shuffles=1, seed=0)
    with pytest.raises(ConfigError, match="single row"):
        difference.agreements(*[dataclasses.replace(one, row=0 * one.row)] * 2, shuffles=1, seed=0)


def test_the_page_says_what_was_found(rng, tiny, tmp_path):
    program, variables, recorder, losses_of = tiny
    batches = {"a|b": [random_batch(rng, program.config.model.vocab_size) for _ in range(2)]}
    records, losses = recorder(variables, batches), losses_of(variables, batches)
    found = difference.agreements(records, records, shuffles=9, seed=0)
    assert all(each.first == each.sets == 1 and each.load_distance == 0 for each in found)
    groups = difference.loss_differences(records, losses, losses, np.zeros(len(losses), int), lambda token: " a")
    page = difference_page.Difference(("one", "other"), records.layers, {"": found, "hash": found}, groups, 9, 0)
    assert difference_page.write(page, tmp_path) == ["difference.md", "difference.json", "difference.png"]
    text = (tmp_path / "difference.md").read_text()
    assert "100.0 % of tokens have the same first expert" in text
    assert "differs by +0.0000 nats per token, from +0.0000 to +0.0000, which includes 0" in text
    assert r"a\|b" in text
    assert json.loads((tmp_path / "difference.json").read_text())["agreements"]["hash"][0]["first"] == 1
    assert "| 4 | 50.0 |" in difference_page.settling((0,), {4: [0.5]}, 8)
