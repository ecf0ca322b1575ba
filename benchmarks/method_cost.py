"""Time and memory of five methods beside plain loops that do the same arithmetic.

    python benchmarks/method_cost.py

Each plain loop is what one writes from the paper's equations with torch alone: same data order
length, batch sizes, epochs and optimiser, no checks, no curve, no checkpoints. Both sides leave the model they
are given as it is and work on a copy, made within the time that is measured. For time both run in turn in one
process, each first in every other turn; the ratio is the median over the turns, in CPU seconds, with the
interval of the median's order statistics. Memory is the growth of a fresh process whose allocator gives back
at once what is freed. Writes `benchmarks/results/method_cost.json` and `.md`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from scipy.stats import binom
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

import expunge as xp
from expunge.workloads.nets import small_resnet

RESULTS = Path(__file__).parent / "results"
LABEL, CLASSES, EPOCHS = 3, 10, 2

OURS = {
    "ssd (sample)": lambda: xp.methods.SSD(alpha=5.0),
    "ssd (sample, chunk 8)": lambda: xp.methods.SSD(alpha=5.0),
    "ssd (batch)": lambda: xp.methods.SSD(alpha=10.0, fisher="batch", batch_size=64),
    "salun": lambda: xp.methods.SalUn(epochs=EPOCHS, lr=0.01, batch_size=128),
    "scrub": lambda: xp.methods.SCRUB(epochs=EPOCHS, max_epochs=1, lr=0.001, batch_size=128),
    "bad-teacher": lambda: xp.methods.BadTeacher(epochs=EPOCHS, lr=1e-4, batch_size=128),
    "l1-sparse": lambda: xp.methods.L1Sparse(epochs=EPOCHS, lr=0.01, batch_size=128),
}


def sides(x: Tensor, y: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    forget = y == LABEL
    return (x[forget], y[forget]), (x[~forget], y[~forget])


def shuffled(side: tuple[Tensor, Tensor], size: int):
    x, y = side
    for places in torch.randperm(len(x)).split(size):
        yield x[places], y[places]


def plain_ssd(model: nn.Module, x: Tensor, y: Tensor, size: int, alpha: float) -> nn.Module:
    def importance(x: Tensor, y: Tensor) -> list[Tensor]:
        sums = [torch.zeros_like(p) for p in model.parameters()]
        batches = torch.randperm(len(x)).split(size)
        for places in batches:
            loss = cross_entropy(model(x[places]), y[places])
            for total, g in zip(sums, torch.autograd.grad(loss, model.parameters()), strict=True):
                total += g**2
        return [s / len(batches) for s in sums]

    model.eval()
    (xf, yf), _ = sides(x, y)
    part, whole = importance(xf, yf), importance(x, y)
    with torch.no_grad():
        for p, f, d in zip(model.parameters(), part, whole, strict=True):
            chosen = f > alpha * d
            p[chosen] *= (d[chosen] / f[chosen]).clamp(max=1)
    return model


def plain_salun(model: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    forget, retain = sides(x, y)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for xb, yb in shuffled(forget, 128):
        loss = cross_entropy(model(xb), yb)
        for t, g in zip(total, torch.autograd.grad(loss, model.parameters()), strict=True):
            t += g
    flat = torch.cat([t.abs().flatten() for t in total])
    cut = flat.kthvalue(len(flat) // 2).values
    masks = [t.abs() > cut for t in total]
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()
    for _ in range(EPOCHS):
        relabelled = (forget[0], torch.randint(CLASSES, (len(forget[0]),)))
        for side in (relabelled, retain):
            for xb, yb in shuffled(side, 128):
                optimizer.zero_grad()
                cross_entropy(model(xb), yb).backward()
                optimizer.step()
                with torch.no_grad():  # frozen weights go back, as the corrected code does
                    for p, m, s in zip(model.parameters(), masks, start, strict=True):
                        p.copy_(torch.where(m, p, s))
    return model


def kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    p, q = softmax(teacher / temperature, 1), log_softmax(student / temperature, 1)
    return kl_div(q, p, reduction="batchmean") * temperature**2


def plain_scrub(model: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    forget, retain = sides(x, y)
    teacher = copy.deepcopy(model).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=5e-4)
    model.train()
    for epoch in range(EPOCHS):
        for side, size, sign in ((forget, 32, -1.0), (retain, 128, 1.0)):
            if sign < 0 and epoch >= 1:
                continue
            for xb, yb in shuffled(side, size):
                with torch.no_grad():
                    target = teacher(xb)
                optimizer.zero_grad()
                out = model(xb)
                loss = (
                    -kl(target, out, 4.0)
                    if sign < 0
                    else 0.99 * cross_entropy(out, yb) + 0.001 * kl(target, out, 4.0)
                )
                loss.backward()
                optimizer.step()
    return model


def plain_bad_teacher(model: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    forget, retain = sides(x, y)
    teacher, bad = copy.deepcopy(model).eval(), small_resnet().eval()
    some = torch.randperm(len(retain[0]))[: round(0.3 * len(retain[0]))]
    both = torch.cat([forget[0], retain[0][some]])
    flag = torch.cat([torch.ones(len(forget[0])), torch.zeros(len(some))])[:, None]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    model.train()
    for _ in range(EPOCHS):
        for places in torch.randperm(len(both)).split(128):
            xb, u = both[places], flag[places]
            with torch.no_grad():
                target = u * softmax(bad(xb), 1) + (1 - u) * softmax(teacher(xb), 1)
            optimizer.zero_grad()
            kl_div(log_softmax(model(xb), 1), target, reduction="batchmean").backward()
            optimizer.step()
    return model


def plain_l1(model: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    _, retain = sides(x, y)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()
    for epoch in range(EPOCHS):
        gamma = 5e-4 * (1 - epoch / EPOCHS)
        for xb, yb in shuffled(retain, 128):
            optimizer.zero_grad()
            size = torch.cat([p.flatten() for p in model.parameters()]).abs().sum()
            (cross_entropy(model(xb), yb) + gamma * size).backward()
            optimizer.step()
    return model


PLAIN = {
    "ssd (sample)": lambda m, x, y: plain_ssd(m, x, y, 1, 5.0),
    "ssd (sample, chunk 8)": lambda m, x, y: plain_ssd(m, x, y, 1, 5.0),
    "ssd (batch)": lambda m, x, y: plain_ssd(m, x, y, 64, 10.0),
    "salun": plain_salun,
    "scrub": plain_scrub,
    "bad-teacher": plain_bad_teacher,
    "l1-sparse": plain_l1,
}


def run(side: str, name: str, model: nn.Module, samples: int) -> xp.Cost:
    x, y = torch.randn(samples, 1, 28, 28), torch.arange(samples) % CLASSES
    runtime = xp.Runtime(threads=1, chunk=8 if "chunk 8" in name else None)
    if side == "ours":
        problem = xp.Classification(model, (x, y), build=small_resnet)
        return xp.unlearn(problem, xp.forget(label=LABEL), OURS[name](), runtime=runtime).cost
    with runtime.metered() as cost:
        PLAIN[name](copy.deepcopy(model), x, y)
    return cost


def probe(sides: list[str], name: str, samples: int, repeats: int) -> None:
    """Run sides of one method in turn in this fresh process, after a small run that warms up."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = small_resnet().eval()
    for side in sides:
        run(side, name, model, 120)
    found: dict[str, list[xp.Cost]] = {side: [] for side in sides}
    for turn in range(repeats):
        for side in sides[:: 1 if turn % 2 else -1]:
            found[side].append(run(side, name, model, samples))
    print(json.dumps({side: [vars(c) for c in costs] for side, costs in found.items()}))


def fresh(sides: list[str], name: str, samples: int, repeats: int) -> dict[str, list[dict]]:
    words = [",".join(sides), name, str(samples), str(repeats)]
    command = [sys.executable, __file__, "--probe", *words]
    # one sample alone is a measure of memory: then what is freed has to leave the process
    limits = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "16384"}
    env = os.environ | (limits if len(sides) == 1 else {})
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout)


def measure(names: list[str], samples: int, repeats: int) -> list[dict]:
    rows = []
    for name in names:
        turns = fresh(["ours", "plain"], name, samples, repeats)
        row = {"method": name, "turns": turns}
        for side, costs in turns.items():
            middle = statistics.median(c["processor"] for c in costs)
            row[f"{side}_ms_per_sample"] = 1e3 * middle / samples
            peaks = [fresh([side], name, samples, 1)[side][0]["peak_bytes"] for _ in range(3)]
            row[f"{side}_peak_bytes"] = statistics.median(peaks)
        pairs = zip(turns["ours"], turns["plain"], strict=True)
        ratios = sorted(a["processor"] / b["processor"] for a, b in pairs)
        low, high = binom.interval(0.95, len(ratios), 0.5)
        row["time_ratio"] = statistics.median(ratios)
        row["interval"] = [ratios[int(low)], ratios[min(int(high), len(ratios) - 1)]]
        rows.append(row)
        print(f"{name}: {row['time_ratio']:.2f} of the plain loop's time", flush=True)
    return rows


def table(result: dict) -> str:
    lines = [
        "# Five methods beside plain loops",
        "",
        f"Small ResNet, {result['samples']:,} images, {EPOCHS} epochs, float32, one thread; medians of "
        f"{result['repeats']} turns. Below 1: ours is faster. Peaks are growth of a fresh process while it runs.",
        "",
        "| method | ours, CPU ms a sample | plain loop | ratio | 95 % interval | ours, peak MiB | plain loop |",
        "|---|---:|---:|---:|---|---:|---:|",
    ]
    lines += [
        f"| {r['method']} | {r['ours_ms_per_sample']:.3f} | {r['plain_ms_per_sample']:.3f} "
        f"| {r['time_ratio']:.2f} | {r['interval'][0]:.2f} … {r['interval'][1]:.2f} "
        f"| {r['ours_peak_bytes'] / 2**20:.1f} | {r['plain_peak_bytes'] / 2**20:.1f} |"
        for r in result["rows"]
    ]
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    return "\n".join([*lines, "", f"Made by `{result['command']}` with {versions}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--methods", nargs="+", default=list(OURS))
    parser.add_argument("--probe", nargs=4)
    arguments = parser.parse_args()
    if arguments.probe:
        sides, name, samples, repeats = arguments.probe
        return probe(sides.split(","), name, int(samples), int(repeats))
    result = {
        "command": "python benchmarks/method_cost.py",
        "samples": arguments.samples,
        "repeats": arguments.repeats,
        "versions": {"expunge": xp.__version__, "torch": version("torch")},
        "rows": measure(arguments.methods, arguments.samples, arguments.repeats),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "method_cost.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "method_cost.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
