"""Peak memory of NPO with adapters on SmolLM2 beside plain fine-tuning with the same adapters.

    python benchmarks/lm_memory.py

Plain fine-tuning is a loop of peft and AdamW over batches as large as the forget batches. Each row is a
fresh process whose allocator gives back at once what is freed; memory is the growth of its resident
set over the loaded model. Beside it, the losses of one batch under the original by each kind of
reference. Writes `benchmarks/results/lm_memory.json` and `.md`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import expunge as xp
from expunge.core.data import Batch
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.train.adapters import attach
from expunge.train.reference import Reference
from expunge.workloads.corpora import make_corpus

RESULTS = Path(__file__).parent / "results"
SAMPLES, BATCH, LENGTH, STEPS = 16, 4, 128, 2
ROWS = ("plain", "npo, adapter off", "npo, cache", "npo, second copy")


def problem() -> xp.CausalLM:
    """SmolLM2 and texts of 128 tokens, made of what is asked and said about invented authors."""
    model, tokenizer = xp.load_lm("smollm2")
    rows = make_corpus("authors").splits["retain"]
    text = " ".join(f"{r['question']} {r['answer']}" for r in rows)
    data = xp.encode([{"text": text}], tokenizer, max_length=LENGTH, long="split")
    return xp.CausalLM(
        model, xp.TokenData(data.rows[:SAMPLES], filler=data.filler), tokenizer=tokenizer
    )


def plain(of: xp.CausalLM, runtime: Runtime) -> None:
    """What one writes with peft and torch alone."""
    from peft import LoraConfig, inject_adapter_in_model

    modules = of.role("linear")
    with runtime.metered() as cost:
        model = inject_adapter_in_model(
            LoraConfig(r=8, lora_alpha=16, target_modules=modules), of.model
        )
        model.train()
        moving = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(moving, lr=1e-4)
        for step in range(STEPS):
            batch = of.train.fetch(of.train.ids[step * BATCH : (step + 1) * BATCH])
            loss = model(**batch.x, labels=batch.y).loss
            loss.backward()
            nn.utils.clip_grad_norm_(moving, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    print(json.dumps({"bytes": cost.peak_bytes}))


def ours(of: xp.CausalLM, runtime: Runtime, reference: str) -> None:
    """NPO with a retain term over batches of the same size."""
    forget = xp.forget(ids=of.train.ids[: STEPS * BATCH].tolist())
    method = xp.methods.NPO(
        train="lora(8)", epochs=1, batch_size=BATCH, lr=1e-4, reference=reference
    )
    outcome = xp.unlearn(of, forget, method, runtime=runtime)
    print(json.dumps({"bytes": outcome.cost.peak_bytes, "seconds": outcome.cost.seconds}))


def losses(of: xp.CausalLM) -> None:
    """Likelihoods of one batch under the original by each kind of reference, after some steps."""
    view = View(of, xp.forget(ids=of.train.ids[:BATCH].tolist()), xp.methods.NPO().needs, Runtime())
    model = attach("lora(8)", view.model(), view, 0)
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(p, std=0.02)
    batch: Batch = of.train.fetch(of.train.ids[:BATCH])
    found: dict[str, Tensor] = {}
    for kind in ("copy", "adapter", "cache"):
        reference = Reference(view, kind, model, only_nll=True)
        reference.fill(model, [("train", batch)], Runtime(), batch.ids)
        found[kind] = reference.nll(model, batch)
    apart = {
        kind: float((found[kind] - found["copy"]).abs().max()) for kind in ("adapter", "cache")
    }
    moved = float((of.token_nll(model, batch)[0] - found["copy"]).abs().max())
    print(json.dumps({"apart": apart, "moved": moved}))


def child(row: str) -> None:
    """Measure one row in this process."""
    torch.set_num_threads(2)
    of, runtime = problem(), Runtime(threads=2)
    if row == "plain":
        plain(of, runtime)
    elif row == "losses":
        losses(of)
    else:
        kinds = {"npo, adapter off": "adapter", "npo, cache": "cache", "npo, second copy": "copy"}
        ours(of, runtime, kinds[row])


def measured(row: str) -> dict[str, float]:
    """What a fresh process finds for a row."""
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0",
                                "MALLOC_MMAP_THRESHOLD_": "65536"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__, row], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure every row and write the table."""
    found = {row: measured(row) for row in ROWS}
    apart = measured("losses")
    base = found["plain"]["bytes"]
    table = [
        f"Made by `python benchmarks/lm_memory.py`: SmolLM2-135M in float32, lora(8), {BATCH} × {LENGTH} "
        "tokens forget and as many retain a step.",
        "",
        "| | peak over the loaded model, MiB | of plain |",
        "|---|---|---|",
        *(
            f"| {row} | {f['bytes'] / 2**20:.0f} | {f['bytes'] / base:.2f} |"
            for row, f in found.items()
        ),
        "",
        "Largest difference of a token's loss under the original, to the second copy: adapter off "
        f"{apart['apart']['adapter']:.1e}, cache {apart['apart']['cache']:.1e} nats (the adapted model "
        f"itself is {apart['moved']:.2f} away).",
    ]
    RESULTS.mkdir(exist_ok=True)
    document = {"command": "python benchmarks/lm_memory.py", "rows": found, "losses": apart}
    (RESULTS / "lm_memory.json").write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / "lm_memory.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    child(sys.argv[1]) if len(sys.argv) > 1 else main()
