"""A report's dict as the suite layer makes it, with chosen behaviour for each method."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

SPLITS = {"forget-train": 400, "retain-train": 3600, "forget-test": 100, "retain-test": 900}
LAYERS = ["conv1", "conv2", "fc1", "fc2", "head"]
SCORES = ("loss", "confidence", "entropy", "modified-entropy", "correctness")

# accuracy on forget-train, retain-train, forget-test, retain-test; raw AUC; cost ratio
CLASS = {
    "original": ((1.0, 0.99, 0.97, 0.96), 0.55, None),
    "retrain": ((0.01, 0.99, 0.01, 0.96), 0.50, 1.0),
    "finetune": ((0.72, 0.99, 0.60, 0.96), 0.61, 0.21),
    "gradient-ascent": ((0.20, 0.80, 0.18, 0.71), 0.52, 0.08),
    "neggrad-plus": ((0.02, 0.98, 0.01, 0.95), 0.51, 0.33),
    "random-label": ((0.02, 0.98, 0.02, 0.95), 0.40, 0.24),
    "salun": ((0.01, 0.98, 0.01, 0.95), 0.49, 0.25),
    "scrub": ((0.00, 0.93, 0.00, 0.91), 0.50, 0.26),
    "ssd": ((0.01, 0.985, 0.02, 0.955), 0.52, 0.07),
    "exact-shards": ((0.0, 0.98, 0.01, 0.95), 0.50, 0.4),
}
RANDOM = {
    "original": ((1.0, 1.0, None, 0.96), 0.62, None),
    "retrain": ((0.95, 1.0, None, 0.95), 0.50, 1.0),
    "finetune": ((0.97, 1.0, None, 0.955), 0.57, 0.21),
    "gradient-ascent": ((0.99, 0.99, None, 0.95), 0.60, 0.08),
    "neggrad-plus": ((0.95, 0.99, None, 0.94), 0.52, 0.33),
    "random-label": ((0.70, 0.99, None, 0.94), 0.28, 0.24),
    "salun": ((0.82, 0.99, None, 0.945), 0.35, 0.25),
    "scrub": ((0.95, 0.99, None, 0.95), 0.51, 0.26),
    "ssd": ((0.94, 0.94, None, 0.90), 0.53, 0.07),
    "exact-shards": ((0.95, 0.99, None, 0.95), 0.50, 0.4),
}


def finding(value, reference=None, direction="reference", **more) -> dict[str, Any]:
    gap = None if value is None or reference is None else value - reference
    found = {
        "value": value, "reference": reference, "gap": gap, "low": None, "high": None,
        "direction": direction, "reason": None, "floor": None, "original": None, "detail": {},
    }  # fmt: skip
    return found | more


def make_data(comparisons: int = 2, references: int = 3, seeds: int = 1) -> dict[str, Any]:
    tables = [CLASS, RANDOM]
    return {
        "expunge": "0.1.0",
        "created": "2026-11-21T07:51:14+00:00",
        "command": "expunge demo --label 3",
        "report": None,
        "comparisons": [
            make_comparison(tables[i % 2], i, references, seeds) for i in range(comparisons)
        ],
    }


def make_comparison(table, number: int, references: int, seeds: int) -> dict[str, Any]:
    by_class = table is CLASS
    splits = dict(SPLITS) if by_class else {**SPLITS, "forget-test": 0}
    rows = []
    for method, (accuracies, auc, ratio) in table.items():
        if method == "retrain" and not references:
            continue
        for seed in range(1 if method in ("original", "retrain") else seeds):
            rows.append(
                make_row(method, seed, accuracies, auc, ratio, table, splits, references, by_class)
            )
    return {
        "workload": "mnist-class" if by_class else "mnist-random",
        "title": "mnist-class: forget label 3" if by_class else "mnist-random: forget 10 % at random",
        "request": {"label": [3], "text": "label 3"} if by_class else {"fraction": 0.1, "text": "10 % at random"},
        "classes": 10,
        "splits": splits,
        "references": [{"run": f"01ref{number}{i}", "seed": 1001 + i, "seconds": 12.3 + i} for i in range(references)],
        "rows": rows,
    }  # fmt: skip


def make_row(method, seed, accuracies, auc, ratio, table, splits, references, by_class):
    rng = random.Random(f"{method}{seed}{by_class}")
    plain = method in ("original", "retrain")
    ratio = ratio if references else None
    cost = {"seconds": 12.3 * (ratio or 0.1), "samples": 12000, "gradients": 8000, "peak_bytes": 40 << 20}  # fmt: skip
    if method == "original":
        cost = dict.fromkeys(cost)
    exact = method == "exact-shards"
    trains = not plain and method not in ("ssd",)
    return {
        "method": method,
        "seed": 1001 if method == "retrain" else seed,
        "run": f"01run{method[:6]}{seed}{int(by_class)}",
        "seconds": cost["seconds"],
        "cost_ratio": ratio,
        "intent": None if plain else "removal",
        "guarantee": "exact" if exact or method == "retrain" else None if plain else "empirical",
        "fidelity": None if plain else "faithful",
        "cost": cost,
        "settings": {} if plain else {"name": method, "passed": {"lr": 0.01}, "in_force": {"lr": 0.01, "epochs": 5}},
        "details": {} if plain else {"steps": 120},
        "notes": ["stopped: the loss passed its bound"] if method == "gradient-ascent" else [],
        "curve": [
            {"step": s, "epoch": s // 30, "loss": 2.2 * math.exp(-s / 40) + rng.uniform(0, 0.1), "lr": 0.01}
            for s in range(1, 121, 10)
        ] if trains else [],
        "findings": make_findings(method, accuracies, auc, table, splits, references, rng, cost, ratio),
    }  # fmt: skip


def make_findings(method, accuracies, auc, table, splits, references, rng, cost, ratio):
    why = None if references else "no retrained reference to compare with"
    ref = (lambda v: v) if references else (lambda v: None)
    found: dict[str, Any] = {}
    reference = dict(zip(splits, _order(table["retrain"][0]), strict=True))
    original = dict(zip(splits, _order(table["original"][0]), strict=True))
    for split, value in zip(splits, _order(accuracies), strict=True):
        n = splits[split]
        if not n or value is None:
            found[f"accuracy/{split}"] = finding(None, reason="no whole class was forgotten, so no test sample belongs to the request")  # fmt: skip
            continue
        half = 1.96 * math.sqrt(max(value * (1 - value), 0.002) / n)
        classes = ["3"] if split.startswith("forget") and len(splits) and splits["forget-test"] else [str(c) for c in range(10) if str(c) != "3" or not splits["forget-test"]]  # fmt: skip
        per_class = {c: [round(value * n / len(classes)), round(n / len(classes))] for c in classes}
        found[f"accuracy/{split}"] = finding(
            value, ref(reference[split]), low=max(0, value - half), high=min(1, value + half),
            floor=ref(0.004), original=original[split], reason=why, detail={"per_class": per_class, "n": n},
        )  # fmt: skip
    gap = abs(auc - 0.5)
    found["prediction-matrix/test"] = (
        finding(0.02 + 0.1 * gap, 0.02, "down", floor=0.03, detail={"matrix": _matrix(accuracies, rng)})
        if references
        else finding(None, direction="down", reason=why, detail={"matrix": _matrix(accuracies, rng)})
    )  # fmt: skip
    for split in ("forget-train", "forget-test", "retain-test"):
        for kind, scale in (("js", 1), ("kl", 3)):
            value = scale * (0.04 + (gap if split.startswith("forget") else 0.0))
            found[f"divergence/{kind}-{split}"] = (
                finding(value, 0.05 * scale, "down", low=value * 0.9, high=value * 1.1, floor=0.06 * scale)
                if references and splits.get(split)
                else finding(None, direction="down", reason=why or "no whole class was forgotten, so no test sample belongs to the request")
            )  # fmt: skip
    for score in SCORES:
        folded = max(auc, 1 - auc)
        found[f"membership/auc-{score}"] = finding(
            folded, ref(0.5), low=max(0.5, folded - 0.025), high=folded + 0.025, floor=ref(0.01),
            original=max(table["original"][1], 0.5), reason=why,
            detail={
                "auc": auc, "reference_auc": ref(0.5), "original_auc": table["original"][1],
                "auc_low": auc - 0.025, "auc_high": auc + 0.025, "threshold": -1.7,
                "histogram": _histogram(auc, rng),
            },
        )  # fmt: skip
    for attacker in ("svc", "logistic"):
        found[f"membership/efficacy-{attacker}"] = finding(0.5 + (0.5 - auc), ref(0.5), low=0.4, high=0.6, original=0.1, reason=why)  # fmt: skip
    values = [1 - 0.05 * i - (0.02 * i if method != "original" else 0) for i in range(len(LAYERS))]
    expected = [0.95 - 0.09 * i for i in range(len(LAYERS))]
    found["cka/original"] = finding(
        sum(values) / 5, ref(sum(expected) / 5), low=0.7, high=0.9, original=1.0, reason=why,
        detail={"layers": LAYERS, "values": values} | ({"reference_values": expected} if references else {}),
    )  # fmt: skip
    found["cka/reference"] = finding(0.8, 0.85, "up", floor=0.02) if references else finding(None, direction="up", reason=why)  # fmt: skip
    found["weight-distance/original"] = finding(0.2, ref(1.3), original=0.0, reason=why)
    found["weight-distance/reference"] = finding(1.3, 1.35, "down", floor=1.36) if references else finding(None, direction="down", reason=why)  # fmt: skip
    none = "the model was given, not made by a run"
    for name, key in (("seconds", "seconds"), ("samples", "samples"), ("gradients", "gradients"), ("peak-memory", "peak_bytes")):  # fmt: skip
        value = cost[key]
        found[f"cost/{name}"] = finding(value, ref(12.3) if name == "seconds" else None, "down", reason=None if value is not None else none)  # fmt: skip
    found["cost/ratio"] = finding(ratio, ref(1.0), "down", reason=None if ratio else none)
    return found


def _order(accuracies):
    """Into the order of SPLITS, which is that of the tables."""
    return accuracies


def _matrix(accuracies, rng):
    kept = accuracies[3]
    forgotten = kept if accuracies[2] is None else accuracies[2]
    matrix = []
    for i in range(10):
        share = forgotten if i == 3 else kept
        row = [(1 - share) / 9] * 10
        row[i] = share
        matrix.append(row)
    return matrix


def _histogram(auc, rng):
    edges = [-8 + 8 * i / 24 for i in range(25)]
    middle = [(a + b) / 2 for a, b in itertools.pairwise(edges)]

    def bump(centre, width):
        raw = [math.exp(-(((m - centre) / width) ** 2)) * rng.uniform(0.8, 1.2) for m in middle]
        return [x / sum(raw) for x in raw]

    return {
        "edges": edges,
        "forget": bump(-2 + 5 * (auc - 0.5), 1.2),
        "retain": bump(-0.8, 0.7),
        "nonmember": bump(-2.0, 1.4),
    }
