"""Invented authors: the tiny model over three seeds, and SmolLM2-135M taught 20 of them.

Both against a model that never saw the forgotten people. Answers about invented people are made by
pattern ("NAME was born in PLACE."), so that ROUGE stays high without the fact; the share of answers
said exactly stands beside it. Settings are the workloads', found on
other people. Writes benchmarks/results/authors.json and .md, and keeps what is done in a store, so
that a run that was stopped goes on (`EXPUNGE_STORE` names another folder).
"""

from __future__ import annotations

import datetime as dt
import os
from pathlib import Path

import pytest
from _results import must_be_seen, write

import expunge as xp
from expunge.core.runtime import JsonLines, Runtime
from expunge.store import Store
from expunge.suite.bench import Bench
from expunge.workloads import registry

pytestmark = pytest.mark.acceptance

METHODS = ("npo", "simnpo", "grad-diff", "rmu", "undial")
PARTS = {
    "forget": "rouge/recall-forget-train",
    "forget exact": "rouge/exact-forget-train",
    "retain": "rouge/recall-retain-train",
    "held out": "rouge/value-retain-test",
}
MOST = 30 * 60
"""Seconds that the run on SmolLM2 may take, trainings and audits included."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    kept = os.environ.get("EXPUNGE_STORE") or tmp_path_factory.mktemp("store")
    return Bench(Store.open(Path(kept)), Runtime(reporter=JsonLines()))


def compared(bench, name, **more):
    """Mean and interval of ROUGE of each model, and what the retrained one has."""
    problem = bench.workload(name)
    found = xp.compare(
        problem, registry.get(name).request, list(METHODS), bench=bench, audits=[xp.audits.Rouge(tokens=24)], **more,
    )  # fmt: skip
    rows: dict = {}
    for row in found.data["comparisons"][0]["rows"]:
        values = row["findings"]
        kept = {
            part: {k: values[key][k] for k in ("value", "low", "high")}
            for part, key in PARTS.items()
        }
        rows.setdefault(row["method"], []).append(kept | {"seconds": row["seconds"]})
    return {"rows": rows, "seconds": elapsed(bench, name)}


def elapsed(bench, name) -> float:
    """Seconds from the start of the original's training to the last audit, however often it was resumed."""
    runs = bench.store.runs(problem=name)
    first, last = (pick(runs, key=lambda r: r.created) for pick in (min, max))
    spent = dt.datetime.fromisoformat(last.created) - dt.datetime.fromisoformat(first.created)
    return spent.total_seconds() + first.record["cost"]["seconds"]


def mean(rows, part):
    return sum(row[part]["value"] for row in rows) / len(rows)


@pytest.fixture(scope="module")
def seen(bench):
    """Everything is written, whether it holds or not."""
    found = {
        "smollm2": compared(bench, "authors-smollm2", seeds=[0], references=1),
        "tiny": compared(bench, "authors", seeds=[0, 1, 2], references=2),
    }
    shown = [
        (sentence, " / ".join(f"{v:.3g}" for v in values), holds)
        for sentence, values, holds in expectations(found)
    ]
    tables = [table(name, of["rows"]) for name, of in found.items()]
    write("authors", found, shown, more="\n\n".join(tables))
    return found


def table(name, rows) -> str:
    """ROUGE-L recall with its interval by model; of several seeds the mean and the range."""
    lines = [
        f"**{name}**",
        "",
        "| | forget | forget, exact | retain | held out, value said | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for method, runs in rows.items():
        cells = []
        for part in PARTS:
            values = [run[part]["value"] for run in runs]
            low, high = (runs[0][part][end] for end in ("low", "high"))
            if len(runs) > 1:
                low, high = min(values), max(values)
            cells.append(f"{sum(values) / len(values):.3f} ({low:.3f}–{high:.3f})")
        lines.append(f"| {method} | {' | '.join(cells)} | {runs[0]['seconds'] or 0:.0f} |")
    return "\n".join(lines)


def expectations(found):
    """The sentence, the figures, and whether it holds."""
    for name, of in found.items():
        rows = of["rows"]
        original, retrained = (
            {p: mean(rows[m], p) for p in PARTS} for m in ("original", "retrain")
        )
        values = [original["forget"], retrained["forget"]]
        yield f"{name}: forget ROUGE of the original is above .9, that of the retrained model .1 below", values, values[0] > 0.9 and values[0] >= values[1] + 0.1  # fmt: skip
        values = [original["forget exact"], retrained["forget exact"]]
        yield f"{name}: the original says most answers exactly, the retrained model few", values, values[0] > 0.6 > 0.3 > values[1]  # fmt: skip
        for method in METHODS:
            own = {p: mean(rows[method], p) for p in PARTS}
            values = [own["forget"], retrained["forget"]]
            yield f"{name}, {method}: forget ROUGE is within .1 above the retrained model's", values, values[0] <= values[1] + 0.1  # fmt: skip
            values = [own["forget exact"], retrained["forget exact"]]
            yield f"{name}, {method}: answers said exactly are within .2 above", values, values[0] <= values[1] + 0.2  # fmt: skip
            values = [own["retain"], retrained["retain"]]
            yield f"{name}, {method}: retain ROUGE is within .15 below", values, values[0] >= values[1] - 0.15  # fmt: skip
            if name == "smollm2":
                values = [own["held out"], retrained["held out"]]
                yield f"{name}, {method}: facts about the world are within .15 below", values, values[0] >= values[1] - 0.15  # fmt: skip
    seconds = found["smollm2"]["seconds"]
    yield "SmolLM2 in all takes at most 30 minutes", [seconds], seconds <= MOST


test_what_must_be_seen, test_every_expectation_is_tested = must_be_seen(
    expectations, 4 + 20 + 15 + 1
)
