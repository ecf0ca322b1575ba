"""The small-scale run of the card code-eraser: 48 files, each with a secret in a shared template.

Writes benchmarks/results/code_eraser.json and .md. The settings are the card's; the number of passes was
looked at on another seed and other files to forget. Training stops where secrets are said no more than
those of files the original has not seen.
"""

from __future__ import annotations

import functools

import pytest
import torch
from _results import must_be_seen, write

import expunge as xp
from expunge.audits.extraction import ExtractionLikelihood
from expunge.core.audit import Subject
from expunge.core.runtime import Runtime
from expunge.problems.causal_lm import CausalLM
from expunge.problems.segments import accuracies
from expunge.problems.tokens import TokenData, Tokens
from expunge.train.lm_recipe import LMRecipe
from expunge.workloads.nets import small_llama

pytestmark = pytest.mark.acceptance

TEMPLATES, WORDS, SECRET = 8, 40, 8
FILES, TRAINED, FORGET = 48, 40, 6
FIRST_WORD, FIRST_ID = 3, 3 + 40
START = 14
"""Where the secret begins; before it lie the first token, the file's id and 12 tokens of its template."""


def rows(seed: int) -> list[Tokens]:
    rng = torch.Generator().manual_seed(seed)
    templates = torch.randint(WORDS, (TEMPLATES, 22), generator=rng) + FIRST_WORD
    found = []
    for file in range(FILES):
        template = templates[file % TEMPLATES]
        secret = torch.randint(WORDS, (SECRET,), generator=rng) + FIRST_WORD
        ids = torch.cat([torch.tensor([1, FIRST_ID + file]), template[:12], secret, template[12:]])
        places = torch.arange(len(ids))
        marked = (places >= START) & (places < START + SECRET)
        found.append(Tokens(ids, torch.ones(len(ids), dtype=torch.bool), marked))
    return found


def problem_of(seed: int) -> CausalLM:
    """The model that knows 40 files, 500 steps of all of them."""
    data = rows(seed)
    train = TokenData(data[:TRAINED])
    held = TokenData(data[TRAINED:], ids=range(TRAINED, FILES))
    build = functools.partial(small_llama, FIRST_ID + FILES, 64, 3, 128, context=64)
    recipe = LMRecipe(build, train, epochs=500, lr=3e-3, batch_size=TRAINED, warmup=10, clip=None)
    return CausalLM(recipe(train.ids, seed), train, held, recipe=recipe)


def context(row: Tokens) -> Tokens:
    """The template's tokens as what is answered; nothing tells the id before it is there."""
    answered = ~row.marked
    answered[:2] = False
    return Tokens(row.ids, answered)


def figures(model, problem, request) -> dict[str, float]:
    """MA and EL_3 of secrets, and MA of contexts, on forget and on retain files."""
    runtime = Runtime(seed=0, threads=1)
    subject = Subject(model.eval(), problem, request, runtime)
    audit = ExtractionLikelihood(orders=(3, 5, 10))
    found = {f.name.partition("/")[2]: f.value for f in audit.run(subject, [], runtime)}
    seen = {}
    for side in ("forget", "retain"):
        ids = subject.splits[f"{side}-train"]
        own = [context(problem.train.rows[p]) for p in problem.train.positions(ids).tolist()]
        each = accuracies(problem.token_logits, model, own, size=64, device="cpu")
        seen |= {
            side: found[f"accuracy-{side}-train"],
            f"{side} EL3": found[f"el3-{side}-train"],
            f"{side} context": sum(each) / len(each),
        }
    return seen | {"unseen": found["accuracy-retain-test"]}


RUNS = {
    "GA": {"spans": "all", "gamma": 0.0, "constrain": 0.0},
    "CU": {"spans": "all"},
    "SSGA": {"constrain": 0.0},
    "SSCU": {},
}


def settings(limit: float, **more) -> dict:
    """Until secrets are said no more than unseen ones, 60 passes at most; all others are rehearsed."""
    return {
        "lr": 3e-4, "epochs": 60, "rehearse": 6, "batch_size": 40, "accuracy": limit,
        "extraction": 1.01, **more,
    }  # fmt: skip


def run(seed: int, forget: range) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    problem, request = problem_of(seed), xp.forget(ids=list(forget))
    found = {"original": figures(problem.model, problem, request) | {"steps": 0}}
    limit = found["original"]["unseen"] + 1e-6  # no more than that
    for name, own in RUNS.items():
        method = xp.methods.CodeEraser(**settings(limit, **own))
        outcome = xp.unlearn(problem, request, method, runtime=Runtime(seed=seed, threads=1))
        steps = {"steps": outcome.details["steps"], "stopped": outcome.details.get("stopped")}
        found[name] = figures(outcome.runnable(), problem, request) | steps
    return found


@pytest.fixture(scope="module")
def seen():
    """One seed, as the card's; everything is written, whether it holds or not."""
    found = run(0, range(FORGET))
    rows = [(s, " → ".join(f"{v:.3g}" for v in values), ok) for s, values, ok in expected(found)]
    write("code_eraser", found, rows)
    return found


def expected(found):
    """What the card says must be seen: the sentence, the figures, and whether it holds."""
    ga, cu, ours = found["GA"], found["CU"], found["SSCU"]
    values = [found["original"][k] for k in ("forget", "forget context", "retain", "unseen")]
    yield "the original says its secrets and none of others: MA of forget secrets and contexts, of retain secrets, of unseen ones", values, min(values[:3]) > 0.99 and values[3] < 0.1  # fmt: skip
    values = [found[name][k] for name in RUNS for k in ("forget", "forget EL3")]
    yield "all four forget: MA and EL_3 of forget secrets under GA, CU, SSGA, SSCU", values, max(values) < 0.15  # fmt: skip
    values = [ga["forget context"], ga["retain"]]
    yield "GA wrecks context and retain: MA of both", values, max(values) < 0.5
    values = [cu["retain"], cu["forget context"]]
    yield "KL saves retain but not the context: MA of both under CU", values, values[0] > 0.9 and values[1] < 0.5  # fmt: skip
    values = [ours["retain"], ours["forget context"]]
    yield "selection with KL saves both: MA under SSCU", values, min(values) > 0.95
    values = [ga["steps"], ours["steps"]]
    yield "at the price of more steps: GA, SSCU", values, values[1] > 1.5 * values[0]


test_code_eraser_must_be_seen, test_every_expectation_is_tested = must_be_seen(expected, 6)
