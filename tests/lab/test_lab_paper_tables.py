"""Tables of the papers beside a suite's records."""

from pathlib import Path

import pytest

from moe.config import ConfigError
from moe.lab.expressions import parse
from moe.lab.report.paper_tables import TABLES_FILE, PaperTable, Row, read_tables, write_page
from tests.lab_helpers import shipped_suite, table_of

SUITES = Path(__file__).resolve().parents[2] / "configs/ablations"


def page_of(path, *rows, **suites):
    write_page(path / "page.md", (PaperTable("T", "test", "paper", "loss", rows),), suites)
    return (path / "page.md").read_text()


@pytest.mark.parametrize(
    ("published", "comparison"),
    [
        (-0.1, "same direction; contains the paper's"),
        (-0.3, "same direction; excludes the paper's"),
        (0.1, "other direction; excludes the paper's"),
        (None, "below 0"),
    ],
)
def test_a_row_compares_its_interval_with_the_published_number(tmp_path, published, comparison):
    """b - a is -0.1, -0.11 and -0.09: t(0.975, 2) · 0.01 / √3 = 4.303 · 0.00577 = 0.0248."""
    text = page_of(tmp_path, Row("b", "loss[b] - loss[a]", published), test=table_of((4.9, 4.89, 4.91)))
    paper = "–" if published is None else f"{published:+.3f}"
    assert f"| b | {paper} | -0.1000 [-0.1248, -0.0752], n = 3 at 20 steps | {comparison} |" in text


def test_an_interval_on_both_sides_of_zero_is_open(tmp_path):
    text = page_of(tmp_path, Row("b", "loss[b] - loss[a]", 0.01), test=table_of((4.9, 5.12, 4.95)))
    assert "| not significant; contains the paper's |" in text


def test_missing_runs_and_quantities_are_named(tmp_path):
    rows = (Row("c", "loss[c] - loss[a]"), Row("d", "dead_experts[b]"), Row("e", "loss[b] - loss[a]", -1.0))
    text = page_of(tmp_path, *rows, test=table_of((4.9,)))
    assert "| c | – | – | no runs |" in text
    assert "| d | – | – | no dead_experts of b |" in text
    assert "one seed" in text
    assert "| e | -1.000 | – | no runs |" in page_of(tmp_path, *rows)


def test_a_row_of_another_suite_names_it(tmp_path):
    rows = (Row("b", "loss[b] - loss[a]"), Row("c", "loss[b] - loss[a]", suite="more"))
    text = page_of(tmp_path, *rows, test=table_of((4.9,) * 5), more=table_of((4.8,) * 5))
    assert "| b | – | -0.1000 [-0.1000, -0.1000], n = 5" in text
    assert "| c (suite `more`) | – | -0.2000 [-0.2000, -0.2000], n = 5" in text


def test_a_row_with_a_diverged_run_has_no_number(tmp_path):
    found = table_of((4.9, float("inf"), 4.9))
    assert "| a run diverged |" in page_of(tmp_path, Row("b", "loss[b] - loss[a]"), test=found)


def test_every_row_of_the_file_names_arms_of_its_suite():
    tables = read_tables(SUITES / TABLES_FILE)
    assert len(tables) == 12
    names = {row.suite or entry.suite for entry in tables for row in entry.rows}
    arms = {name: set(shipped_suite(name).variants) for name in names}
    for entry in tables:
        for row in entry.rows:
            used = {term.variant for term in parse(row.value) if term.quantity}
            assert used <= arms[row.suite or entry.suite], row.what


HEAD = "[[table]]\nname = 'T'\nsuite = 's'\nsource = ''\nunit = ''\n"
ROW = "[[table.row]]\nwhat = 'w'\n"


@pytest.mark.parametrize(
    "text",
    [
        "table = 3",
        "[[table]]\nname = 'T'",
        f"{HEAD}{ROW}value = 'nothing'",
        f"{HEAD}extra = 1\n{ROW}value = 'loss[a]'",
        f"tables = []\n{HEAD}{ROW}value = 'loss[a]'",
        "\x00",
    ],
)
def test_a_malformed_file_is_refused_in_one_sentence(tmp_path, text):
    path = tmp_path / TABLES_FILE
    path.write_text(text)
    with pytest.raises(ConfigError, match="not a list of tables"):
        read_tables(path)
