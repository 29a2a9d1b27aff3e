"""Records from elsewhere: what is taken, what is refused, and what the page says about it."""

import dataclasses

import pytest

from moe.config import ConfigError
from moe.lab import merging
from moe.lab.records import PRIMARY, read_all, write_table
from moe.lab.suite import Sweep
from tests.lab_helpers import DENSE, SWITCH, claim_of, keyed, record, suite_of

LOSSES = {"literature": (4.0, 4.2), "python": (5.0, 5.4)}


def _suite():
    suite = suite_of({"a": DENSE, "b": SWITCH}, horizons=(20,), heldout_rows=2)
    suite.base.data.domains = tuple(LOSSES)
    return suite


def _run(arm, seed, version="1.2.0", **fields):
    """A run whose rows have means of 4.1 and 5.2, hence a primary loss of 4.65."""
    rows = [(20, "loss", name, "", sum(values) / 2) for name, values in LOSSES.items()]
    own = {
        "rows": [*rows, (20, "loss", PRIMARY, "", 4.65)],
        "row_domains": [name for name in LOSSES for _ in range(2)],
        "row_losses": [loss for values in LOSSES.values() for loss in values],
    }
    return dataclasses.replace(record(arm, seed, 4.65, **(own | fields)), data=dict.fromkeys(LOSSES, version))


@pytest.fixture
def version(monkeypatch):
    monkeypatch.setattr(merging.EmbeddedCorpus, "VERSION", "1.2.0")


def _merge(folder, runs, suite=None, claims=()):
    suite = suite or _suite()
    write_table(folder / "foreign.parquet", keyed(suite, runs))
    return merging.merge(folder, folder / "foreign.parquet", suite, claims)


def test_new_runs_are_taken_and_repeated_ones_compared(tmp_path, version):
    claim = claim_of()
    known = keyed(_suite(), [_run("a", 0)])[0]
    known.write(tmp_path)
    shifted = _run("a", 0)
    shifted = dataclasses.replace(
        shifted,
        rows=[(*row[:4], row[4] + 0.01) for row in shifted.rows],
        row_losses=[loss + 0.01 for loss in shifted.row_losses],
    )
    runs = [shifted, _run("a", 1, claims={"1": claim.hash}), _run("b", 1, claims={"1": claim.hash})]
    entry = _merge(tmp_path, runs, claims=[claim])
    assert entry.runs == {"a": (1,), "b": (1,)}
    assert (entry.repeated, entry.largest_difference) == (1, pytest.approx(0.01))
    assert entry.post_hoc == (1,)  # the repeated run has no hash of the claim
    found = read_all(tmp_path)
    assert [(r.variant, r.seed) for r in found] == [("a", 0), ("a", 1), ("b", 1)]
    assert found[0].primary_loss == 4.65, "the record that was there is kept"
    page = (tmp_path / merging.PAGE).read_text()
    assert "| test | a: 1; b: 1 | 1, at most 0.0100 apart | 1 |" in page
    _merge(tmp_path, runs)
    assert (tmp_path / merging.PAGE).read_text().count("| test |") == 1, "the same file is one entry"


def test_runs_of_a_sweep_are_taken(tmp_path, version):
    suite = dataclasses.replace(_suite(), sweep=Sweep((1e-3, 3e-3), (9,)))
    assert _merge(tmp_path, [_run("a", 9, rate=1e-3)], suite).runs == {"a": (9,)}


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (_run("a", 7), "seed 7 is none of suite 'test': an arm, seed, rate, text or evaluation differs"),
        (_run("a", 0, rate=1e-3), "is none of suite 'test'"),
        (_run("a", 0, version="1.1.0"), "read the text .*'1.1.0'.*this version reads 1.2.0"),
        (_run("a", 0, row_domains=["python"] * 4), "has held-out rows {'python': 4}; must have at most 2 of each"),
        (
            _run("a", 0, row_losses=[4.0, 4.0, 5.0, 5.4]),
            "has a loss of 4.1 on 'literature', and its held-out rows have a mean of 4.000000",
        ),
    ],
)
def test_a_record_that_is_not_of_the_suite_is_refused_and_nothing_is_taken(tmp_path, version, run, message):
    with pytest.raises(ConfigError, match=message):
        _merge(tmp_path, [_run("b", 0), run])
    assert read_all(tmp_path / "records") == []
    assert not (tmp_path / merging.PAGE).exists()
