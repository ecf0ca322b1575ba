"""Cells, means over seeds, and the table in a terminal."""

from __future__ import annotations

import pytest
from report_data import CLASS, finding, make_data
from rich.console import Console

from expunge.report import terminal_table
from expunge.report.table import merged, merged_judgement, method_rows, number

NAME = "accuracy/forget-test"


def rows(*values, **more):
    return [{"method": "m", "findings": {NAME: finding(v, 0.1, **more)}} for v in values]


def test_interval_over_seeds_is_students_t():
    found = merged(rows(0.10, 0.20, 0.30), NAME)
    # mean 0.2, standard deviation 0.1, t(2) = 4.302653
    assert found["value"] == pytest.approx(0.2)
    assert found["gap"] == pytest.approx(0.1)
    assert (found["low"], found["high"]) == pytest.approx(
        (0.0, 0.2 + 4.302653 * 0.1 / 3**0.5), abs=1e-6
    )


def test_seeds_that_agree_do_not_shrink_the_interval_over_samples():
    found = merged(rows(0.2, 0.2, 0.2, low=0.15, high=0.25), NAME)
    assert (found["low"], found["high"]) == pytest.approx((0.15, 0.25))


def test_a_single_value_keeps_its_own_interval():
    found = merged([*rows(0.2, low=0.1, high=0.4), *rows(None, reason="broken")], NAME)
    assert (found["value"], found["low"], found["high"]) == (0.2, 0.1, 0.4)
    assert merged(rows(None, reason="broken"), NAME)["reason"] == "broken"
    assert merged(rows(0.2), "accuracy/other") is None


def test_range_of_a_share_is_kept():
    found = merged(rows(0.0, 1.0), NAME)
    assert (found["low"], found["high"]) == (0.0, 1.0)


def test_a_mean_does_not_hide_a_seed_that_failed():
    one = rows(0.1, 0.1, 0.6, original=0.97)
    judged = merged_judgement(one, NAME)
    assert judged.state == "short"
    assert judged.sentence.startswith("in 1 of 3 seeds: ")


def test_one_row_a_method_in_order():
    found = method_rows(make_data(1, seeds=2)["comparisons"][0])
    assert [r.method for r in found] == list(CLASS)
    assert [r.seeds for r in found] == [1, 1] + [2] * 8
    assert [r.word for r in found[:2]] == ["before", "reference"]
    assert found[0].ratio == "–"
    assert found[2].claims == "removal · empirical · faithful"


def test_cells_hold_value_reference_gap_and_interval():
    cell = next(r for r in method_rows(make_data(1)["comparisons"][0]) if r.method == "finetune").cells[NAME]  # fmt: skip
    assert (cell.value, cell.reference, cell.gap) == ("0.600", "0.010", "+0.590")
    assert cell.interval == "0.504 … 0.696"
    assert cell.mark == "▲"


@pytest.mark.parametrize(
    ("value", "name", "words"),
    [
        (None, "", "–"), (float("nan"), "", "–"), (0.5, "", "0.500"), (12.345, "", "12.3"),
        (1234567.0, "cost/samples", "1\u202f234\u202f567"), (40, "cost/samples", "40"), (0.0123, "cost/seconds", "0.0123 s"),
        (42_000_000, "cost/peak-memory", "42 MB"), (999, "cost/peak-memory", "999 B"), (3.2e9, "cost/peak-memory", "3.2 GB"),
        (0.071, "cost/ratio", "0.071"), (-0.25, "", "-0.250"),
    ],
)  # fmt: skip
def test_numbers_for_people(value, name, words):
    assert number(value, name) == words


def printed(comparison, width=120):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table(comparison))
    console.file.close()
    return console.export_text()


def test_terminal_table_has_the_columns_and_a_word_each():
    text = printed(make_data(1)["comparisons"][0])
    for head in ("method", "forget, test", "rest, test", "forget, train", "membership AUC", "ratio", "verdict"):  # fmt: skip
        assert head in text
    line = next(part for part in text.splitlines() if part.startswith("finetune"))
    assert line.split()[:9] == ["finetune", "0.600", "(0.010)", "0.960", "(0.960)", "0.720", "(0.010)", "0.610", "(0.500)"]  # fmt: skip
    assert line.rstrip().endswith("0.21×  ▲ not forgotten")


def test_terminal_table_without_references_and_with_odd_names():
    comparison = make_data(1, references=0)["comparisons"][0]
    comparison["rows"][2]["method"] = "[red]x[/red]"
    comparison["title"] = "forget [bold]"
    text = printed(comparison)
    assert "[red]x[/red]" in text
    assert "forget [bold]" in text
    assert "no verdict" in text
    assert "0.600 (–)" in text
