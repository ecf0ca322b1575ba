"""Steps of training and generation-based evaluation on SmolLM2, beside OpenUnlearning's code.

    python benchmarks/lm_speed.py --open-unlearning CHECKOUT

CHECKOUT is a clone of github.com/locuslab/open-unlearning, whose loss classes and evaluation function
are loaded and run as they are; what they import for deepspeed, hydra and the Trainer is stood in for
by empty modules. Model, batches, data, optimiser and clipping are the same on both sides, in one
process, in turns. Writes `benchmarks/results/lm_speed.json` and `.md`.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import json
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import expunge as xp
from expunge.core.data import Batch
from expunge.core.runtime import Runtime
from expunge.train.text import TextTraining
from expunge.workloads.corpora import make_corpus

RESULTS = Path(__file__).parent / "results"
BATCH, STEPS, TURNS = 4, 3, 3
NEW, PROMPTS = 200, 96
COMMON = {"epochs": 1, "batch_size": BATCH, "lr": 1e-5, "reference": "copy"}
METHODS: dict[str, tuple[Any, dict[str, Any], str, str, dict[str, Any]]] = {
    "grad-diff": (xp.methods.GradDiff, {}, "grad_diff", "GradDiff", {}),
    "npo": (xp.methods.NPO, {"beta": 0.1}, "npo", "NPO", {"beta": 0.1}),
    "simnpo": (xp.methods.SimNPO, {}, "simnpo", "SimNPO", {"beta": 4.5}),
    "undial": (xp.methods.UNDIAL, {}, "undial", "UNDIAL", {"beta": 10.0}),
}
"""Ours with its settings; theirs: module, class and settings."""


def theirs(checkout: Path) -> None:
    """Put stand-ins where their code imports what is not needed to compute a loss."""
    package = types.ModuleType("trainer")
    package.__path__ = [str(checkout / "src" / "trainer")]

    class Base:
        def __init__(self, model: nn.Module) -> None:
            from accelerate import Accelerator

            self.model, self.accelerator = model, Accelerator(cpu=True)
            self.is_deepspeed_enabled = False

    base = types.ModuleType("trainer.unlearn.base")
    base.UnlearnTrainer = Base
    omega = types.ModuleType("omegaconf")
    omega.OmegaConf = types.SimpleNamespace(to_container=lambda given, resolve: dict(given))
    data = types.ModuleType("data.utils")
    data.IGNORE_INDEX = -100
    sys.modules |= {"trainer": package, "trainer.unlearn.base": base, "omegaconf": omega,
                    "data": types.ModuleType("data"), "data.utils": data}  # fmt: skip
    evals = types.ModuleType("evals")
    evals.__path__ = [str(checkout / "src" / "evals")]
    metrics = types.ModuleType("evals.metrics")
    metrics.__path__ = [str(checkout / "src" / "evals" / "metrics")]
    sys.modules |= {"evals": evals, "evals.metrics": metrics}


def timed_steps(problem: xp.CausalLM, name: str, more: dict[str, Any]) -> list[float]:
    """Seconds of our steps after the first, from the moment a batch is given to the next."""
    moments: list[float] = []
    of, settings = METHODS[name][:2]

    class Timed(of):  # type: ignore[misc]
        def pairs(self, *given: Any) -> Iterator[tuple[Batch, ...]]:
            for batches in TextTraining.pairs(self, *given):
                moments.append(time.perf_counter())
                yield batches
            moments.append(time.perf_counter())

    request = xp.forget(ids=problem.train.ids[: BATCH * (STEPS + 1)].tolist())
    xp.unlearn(problem, request, Timed(**COMMON, **settings, **more), runtime=Runtime())
    return [b - a for a, b in itertools.pairwise(moments[1:])]


def their_steps(problem: xp.CausalLM, name: str) -> list[float]:
    """Seconds of the same steps with their loss, a plain loop around it."""
    module, kind, settings = METHODS[name][2:]
    model = copy.deepcopy(problem.model).train()
    found = getattr(importlib.import_module(f"trainer.unlearn.{module}"), kind)
    trainer = found(model=model, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)
    seconds = []
    ids = problem.train.ids
    for step in range(STEPS + 1):
        first = step * BATCH
        sides = {}
        for side, start in (("forget", first), ("retain", BATCH * (STEPS + 1) + first)):
            batch = problem.train.fetch(ids[start : start + BATCH])
            sides[side] = {**batch.x, "labels": batch.y}
        begin = time.perf_counter()
        trainer.compute_loss(model, sides).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def steps(problem: xp.CausalLM, names: list[str], turns: int) -> dict[str, Any]:
    """Ratios of step times, ours to theirs, of each method."""
    found = {}
    for name in names:
        ours, packed, other = [], [], []
        for _ in range(turns):
            ours.append(statistics.median(timed_steps(problem, name, {})))
            problem.packing = True
            packed.append(statistics.median(timed_steps(problem, name, {})))
            problem.packing = False
            other.append(statistics.median(their_steps(problem, name)))
        ratios = [a / b for a, b in zip(ours, other, strict=True)]
        found[name] = {
            "ours": ours, "packed": packed, "theirs": other,
            "ratio": statistics.median(ratios), "ratios": ratios,
            "packed_ratio": statistics.median(a / b for a, b in zip(packed, other, strict=True)),
        }  # fmt: skip
        print(name, json.dumps(found[name]), flush=True)
    return found


def generation(problem: xp.CausalLM, prompts: int, most: int) -> dict[str, Any]:
    """Seconds of both evaluations of the same questions, and how many answers are the same."""
    from rouge_score.rouge_scorer import RougeScorer

    from expunge.audits.rouge import compare

    asked = problem.train.rows[:prompts]
    begin = time.perf_counter()
    said = problem.texts(problem.generate(problem.model, [r.prompt for r in asked], tokens=most))
    wanted = problem.texts([r.answer for r in asked])
    scorer = RougeScorer(["rougeL"])
    ours = [compare(scorer, w, s) for w, s in zip(wanted, said, strict=True)]
    seconds = {"ours": time.perf_counter() - begin}
    utils = importlib.import_module("evals.metrics.utils")
    begin, theirs_said = time.perf_counter(), []
    for start in range(0, len(asked), 32):  # 32 is what its configurations ask for
        some = asked[start : start + 32]
        width = max(len(r.prompt) for r in some)
        ids = torch.full((len(some), width), problem.train.filler)
        mask = torch.zeros_like(ids)
        for n, row in enumerate(some):
            ids[n, width - len(row.prompt) :] = row.prompt
            mask[n, width - len(row.prompt) :] = 1
        longest = max(len(r) for r in some)
        labels = torch.full((len(some), longest), -100)
        for n, row in enumerate(some):
            labels[n, : len(row.answer)] = row.answer
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        settings = {"do_sample": False, "top_p": None, "temperature": None,
                    "max_new_tokens": most, "use_cache": True}  # fmt: skip
        found = utils.eval_text_similarity(problem.model, problem.tokenizer, batch, settings)
        theirs_said += [f["generation"] for f in found]
    seconds["theirs"] = time.perf_counter() - begin
    same = sum(a.strip() == b.strip() for a, b in zip(said, theirs_said, strict=True))
    tokens = sum(len(problem.tokenizer(s)["input_ids"]) for s in said)
    return {
        "seconds": seconds, "tokens": tokens, "most": most, "prompts": len(asked), "same": same,
        "ratio": seconds["theirs"] / seconds["ours"],
        "tokens_per_second": {k: tokens / v for k, v in seconds.items()},
        "mean_recall": sum(o[0] for o in ours) / len(ours),
        "first_difference": next(
            ([a, b] for a, b in zip(said, theirs_said, strict=True) if a.strip() != b.strip()), None
        ),
    }  # fmt: skip


def main() -> None:
    """Run both and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--open-unlearning", type=Path)
    parser.add_argument("--only", choices=("steps", "generation"))
    parser.add_argument("--methods", default=",".join(METHODS), help="names with commas")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--tokens", type=int, default=NEW, help="most new tokens of an answer")
    given = parser.parse_args()
    if given.open_unlearning is None:
        print("nothing to compare with; pass --open-unlearning CHECKOUT")
        return
    theirs(given.open_unlearning)
    git = ["git", "-C", str(given.open_unlearning), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    model, tokenizer = xp.load_lm("smollm2")
    splits = make_corpus("authors").splits
    rows = splits["forget"] + splits["retain"]
    data = xp.encode(rows, tokenizer, chat=True)
    problem = xp.CausalLM(model, data, tokenizer=tokenizer)
    found: dict[str, Any] = {"command": "python benchmarks/lm_speed.py --open-unlearning CHECKOUT",
                             "commit": commit}  # fmt: skip
    path = RESULTS / "lm_speed.json"
    if path.exists():
        found = json.loads(path.read_text()) | found
    if given.only != "steps":
        found["generation"] = generation(problem, given.prompts, given.tokens)
        print(json.dumps(found["generation"]), flush=True)
    if given.only != "generation":
        found["steps"] = steps(problem, given.methods.split(","), given.turns)
        found["turns"] = given.turns
    path.write_text(json.dumps(found, indent=1) + "\n")
    write_table(found)


def write_table(found: dict[str, Any]) -> None:
    """Write the table of what was found."""
    lines = [
        f"Made by `{found['command']}` (their commit {found['commit']}). SmolLM2-135M in float32, "
        f"questions about invented authors.",
    ]
    if "steps" in found:
        lines += [
            "",
            f"Seconds of a step over {BATCH} forget and {BATCH} retain samples, all weights, AdamW; "
            f"median of {found['turns']} turns of {STEPS} steps.",
            "",
            "| method | ours | packed | theirs | ours / theirs | packed / theirs |",
            "|---|---|---|---|---|---|",
            *(
                f"| {n} | {statistics.median(s['ours']):.2f} | {statistics.median(s['packed']):.2f} "
                f"| {statistics.median(s['theirs']):.2f} | {s['ratio']:.2f} | {s['packed_ratio']:.2f} |"
                for n, s in found["steps"].items()
            ),
        ]
    if "generation" in found:
        g = found["generation"]
        lines += [
            "",
            f"ROUGE of greedy answers to {g['prompts']} questions, up to {g['most']} new tokens: ours "
            f"{g['seconds']['ours']:.0f} s ({g['tokens_per_second']['ours']:.0f} tokens/s), theirs "
            f"{g['seconds']['theirs']:.0f} s ({g['tokens_per_second']['theirs']:.0f} tokens/s): "
            f"{g['ratio']:.2f} times as fast. {g['same']} of {g['prompts']} answers are the same to the "
            "letter.",
        ]
    (RESULTS / "lm_speed.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
