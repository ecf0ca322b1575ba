"""Corrective unlearning on the digits: a backdoor and two confused classes, of which a part is known.

Retraining (EU), fine-tuning on the rest (CF) and SSD at the best threshold of a grid, chosen by the sum of
both test accuracies, which nobody who has to choose can see. Two seeds. Writes
benchmarks/results/corrective.json, .md, and a picture each.
"""

from __future__ import annotations

from statistics import fmean

import pytest
from _results import RESULTS, must_be_seen, write

import expunge as xp
from expunge.report.identified import identified_picture
from expunge.store import Store
from expunge.suite.bench import Bench
from expunge.suite.identified import identified_curve

pytestmark = pytest.mark.acceptance
SHARES = (0.1, 0.5, 0.8, 1.0)
ALPHAS = (0.03, 0.1, 0.3, 1.0, 3.0)
SEEDS = (0, 1)
NAMES = {"original": "original", "retrain": "EU", "finetune": "CF"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    bench = Bench(Store.open(tmp_path_factory.mktemp("store")), xp.Runtime(threads=1))
    rows = {
        name: [r for seed in SEEDS for r in of_seed(bench, name, seed)]
        for name in ("digits-poison", "digits-confusion")
    }
    shown = [
        (sentence, " / ".join(f"{v:.2f}" for v in values), holds)
        for sentence, values, holds in expectations(rows)
    ]
    write(
        "corrective", {"rows": rows}, shown, more="\n\n".join(table(n, r) for n, r in rows.items())
    )
    for name, of in rows.items():
        picture = identified_picture(of).replace("<svg ", "<svg style='font: 12px sans-serif' ")
        (RESULTS / f"corrective_{name.removeprefix('digits-')}.svg").write_text(picture)
    return rows


def of_seed(bench, name, seed):
    """Rows of one original: EU, CF and the best SSD of each share."""
    problem = bench.workload(name, seed)
    rows = identified_curve(problem, ["finetune"], SHARES, seeds=[seed], bench=bench)
    rows = [r | {"method": NAMES[r["method"]]} for r in rows]
    grid = [
        r | {"method": "SSD", "alpha": alpha}
        for alpha in ALPHAS
        for r in identified_curve(
            problem, [{"name": "ssd", "alpha": alpha}], SHARES, seeds=[seed], bench=bench
        )
        if r["method"] == "ssd"
    ]
    for share in SHARES:
        there = [r for r in grid if r["share"] == share]
        rows.append(max(there, key=lambda r: r["affected"] + r["rest"]))
    return rows


def mean(rows, method, share, what="affected"):
    return fmean(r[what] for r in rows if (r["method"], r["share"]) == (method, share))


def table(name, rows) -> str:
    methods = ("original", "EU", "CF", "SSD")
    lines = [
        f"**{name}**: Acc_corr / Acc_retain, means over {len(SEEDS)} seeds.",
        "",
        f"| share known | {' | '.join(methods)} |",
        "|---|" + "---|" * len(methods),
    ]
    for share in SHARES:
        cells = [
            f"{mean(rows, m, share):.2f} / {mean(rows, m, share, 'rest'):.2f}" for m in methods
        ]
        lines.append(f"| {share:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def expectations(rows):
    poison, confusion = rows["digits-poison"], rows["digits-confusion"]
    values = [mean(poison, "EU", s) for s in SHARES]
    yield "EU on the backdoor jumps only where all is known", values, values[2] - values[0] <= 0.15 and values[3] - values[2] >= 0.3  # fmt: skip
    values = [mean(poison, "SSD", 0.5), mean(poison, "EU", 0.5)]
    yield "SSD beats EU on the backdoor at a half", values, values[0] >= values[1] + 0.2
    values = [mean(confusion, "SSD", s) for s in SHARES]
    yield "SSD never repairs the confusion", values, max(values) < 0.7
    values = [mean(confusion, "CF", 1.0)]
    yield "fine-tuning repairs the confusion where all is known", values, values[0] > 0.9
    values = [mean(poison, "CF", s) for s in SHARES]
    yield "fine-tuning does not remove the backdoor", values, max(values) <= 0.3


test_what_must_be_seen, test_every_expectation_is_tested = must_be_seen(expectations, 5)
