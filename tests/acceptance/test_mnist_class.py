"""The main job on real data: three digits to forget, two of them never looked at in tuning.

Writes benchmarks/results/mnist_class.json and .md with the command that made them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from expunge.cli.demo import METHODS
from expunge.core.request import forget
from expunge.core.runtime import Runtime
from expunge.store import Store
from expunge.suite.bench import Bench
from expunge.suite.compare import compare, join

pytestmark = pytest.mark.acceptance
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
DIGITS = (3, 2, 4)  # tuned on 7, 1, 5, 6 and 8; 2 and 4 were not looked at either
COMMAND = "make acceptance"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of one comparison a digit, in one run."""
    store = Store.open(
        os.environ.get("EXPUNGE_ACCEPTANCE_STORE") or tmp_path_factory.mktemp("store")
    )
    bench = Bench(store, Runtime())
    problem = bench.workload("mnist-class")
    found = [
        compare(
            problem,
            forget(label=digit),
            METHODS,
            references=2,
            audits=["accuracy", "cost"],
            bench=bench,
        )
        for digit in DIGITS
    ]
    write_results(join(found, COMMAND).data)
    return {
        (digit, row["method"]): row
        for digit, one in zip(DIGITS, found, strict=True)
        for row in one.rows
    }


def value(row, name: str) -> float:
    return row["findings"][f"accuracy/{name}"]["value"]


def write_results(data) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    table = [
        f"Made by `{COMMAND}` (expunge {data['expunge']}, {data['created']}); tuned on other digits.",
        "",
        "| forget | method | forget test | rest test | rest test, retrained | cost / retraining |",
        "|---|---|---|---|---|---|",
    ]
    for one in data["comparisons"]:
        for row in one["rows"]:
            kept = row["findings"]["accuracy/retain-test"]
            ratio = "–" if row["cost_ratio"] is None else f"{row['cost_ratio']:.3f}"
            table.append(
                f"| {one['request']['text']} | {row['method']} | {value(row, 'forget-test'):.3f} "
                f"| {kept['value']:.3f} | {kept['reference']:.3f} | {ratio} |"
            )
    (RESULTS / "mnist_class.md").write_text("\n".join(table) + "\n")
    slim = {"command": COMMAND, **{k: data[k] for k in ("expunge", "created", "comparisons")}}
    for one in slim["comparisons"]:
        for row in one["rows"]:
            row.pop("curve", None)
    (RESULTS / "mnist_class.json").write_text(json.dumps(slim, indent=1) + "\n")


@pytest.mark.parametrize("digit", DIGITS)
def test_original_knows_the_digit_and_retrained_does_not(rows, digit):
    assert value(rows[digit, "original"], "forget-test") >= 0.95
    assert value(rows[digit, "retrain"], "forget-test") == 0


@pytest.mark.parametrize("digit", DIGITS)
@pytest.mark.parametrize(
    ("method", "margin"), [("salun", 0.02), ("random-label", 0.02), ("scrub", 0.02), ("ssd", 0.03)]
)
def test_method_forgets_the_digit_and_keeps_the_rest(rows, digit, method, margin):
    row = rows[digit, method]
    assert value(row, "forget-test") <= 0.05
    kept = row["findings"]["accuracy/retain-test"]
    assert abs(kept["value"] - kept["reference"]) <= margin


@pytest.mark.parametrize("digit", DIGITS)
def test_ssd_costs_at_most_an_eighth_of_retraining(rows, digit):
    assert rows[digit, "ssd"]["cost_ratio"] <= 1 / 8


@pytest.mark.parametrize("digit", DIGITS)
def test_finetuning_is_shown_failing(rows, digit):
    assert value(rows[digit, "finetune"], "forget-test") > 0.5
