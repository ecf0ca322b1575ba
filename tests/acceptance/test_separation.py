"""Audits tell forgetting from its appearance: a masked output, a retrained model, the original.

On the digits workload, against four retrained models. Writes benchmarks/results/separation.json and .md,
and a report in the folder that EXPUNGE_REPORT names, if any.
"""

from __future__ import annotations

import os

import pytest
from _results import must_be_seen, write
from _tricks import OutputMask

import expunge as xp
from expunge.report.verdict import closer, judge
from expunge.workloads import registry

pytestmark = pytest.mark.acceptance
ACCURACY = ("accuracy/forget-train", "accuracy/retain-train", "accuracy/forget-test", "accuracy/retain-test")  # fmt: skip
DEEP = ("representation/cka-original", "recovery/forget", "relearn-time/updates")
"""What a masked output has to be caught by: features, few samples, relearning."""
MODELS = ("original", "output-mask", "retrain")


@pytest.fixture(scope="module")
def seen():
    problem = registry.get("digits-class").problem(0)
    found = xp.compare(
        problem, xp.forget(label=3), [OutputMask()], references=4,
        audits=[
            xp.audits.Accuracy(), xp.audits.Representation(), xp.audits.Recovery(tasks=100),
            xp.audits.RelearnTime(batch_size=64, lr=0.002), xp.audits.Membership(),
        ],
    )  # fmt: skip
    if folder := os.environ.get("EXPUNGE_REPORT"):
        found.report(folder)
    rows = {}
    for row in found.data["comparisons"][0]["rows"]:
        findings = row["findings"]
        rows[row["method"]] = {
            name: {key: findings[name][key] for key in ("value", "low", "high", "reference")}
            | {"state": judge(name, findings[name]).state}
            for name in (*ACCURACY, *DEEP)
        } | {"closer": closer(row)}
    shown = [
        (sentence, " / ".join(values), holds) for sentence, values, holds in expectations(rows)
    ]
    write("separation", {"rows": rows}, shown, more=table(rows))
    return rows


def table(rows) -> str:
    lines = ["| | " + " | ".join(MODELS) + " | retrained |", "|---|---|---|---|---|"]
    for name in (*ACCURACY, *DEEP):
        cells = [f"{rows[m][name]['value']:.3f} {rows[m][name]['state']}" for m in MODELS]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {rows['output-mask'][name]['reference']:.3f} |"
        )
    return "\n".join(lines)


def expectations(rows):
    def states(model, names):
        return [rows[model][name]["state"] for name in names]

    found = states("output-mask", ACCURACY)
    yield "a masked output passes accuracy", found, set(found) == {"matches"}
    for name in DEEP:
        found = states("output-mask", [name])
        yield f"a masked output is caught by {name}", found, found[0] not in ("matches", "unjudged")
    found = [str(n) for n in rows["output-mask"]["closer"]]
    yield "the verdict on the masked output names them", found, {"representation/cka-original", "recovery/forget"} <= set(found)  # fmt: skip
    found = states("retrain", (*ACCURACY, *DEEP))
    yield "a retrained model passes all", found, set(found) == {"matches"}
    failed = (*(n for n in ACCURACY if "forget" in n), *DEEP)
    found = states("original", failed)
    yield "doing nothing fails all that is about what was to be forgotten", found, not {"matches", "unjudged"} & set(found)  # fmt: skip


test_what_must_be_seen, test_every_expectation_is_tested = must_be_seen(expectations, 7)
