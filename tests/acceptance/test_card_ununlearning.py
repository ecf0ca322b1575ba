"""The small-scale run of the card ununlearning: SmolLM2, a small Llama that reads, and digits.

Writes benchmarks/results/ununlearning.json and .md.
"""

from __future__ import annotations

import functools

import pytest
import torch
from _results import must_be_seen, write
from torch import nn

import expunge as xp
from expunge.core.audit import Subject
from expunge.problems.tokens import TokenData, Tokens
from expunge.train.lm_recipe import LMRecipe
from expunge.workloads import digits, tinyfacts
from expunge.workloads.nets import small_llama

pytestmark = pytest.mark.acceptance

PLACES = (
    ("Lisbon", "Portugal"), ("Oslo", "Norway"), ("Vienna", "Austria"), ("Athens", "Greece"),
    ("Warsaw", "Poland"), ("Dublin", "Ireland"), ("Madrid", "Spain"), ("Helsinki", "Finland"),
    ("Budapest", "Hungary"), ("Cairo", "Egypt"), ("Lima", "Peru"), ("Nairobi", "Kenya"),
)  # fmt: skip
ASKED = ("Mira Kolby", "Tarek Undal", "Jonna Reeve", "Pavlo Strin", "Edda Malk", "Bruno Siver")
OTHERS = ("Lena Fosk", "Omar Tindel", "Greta Hulm", "Yusuf Barr", "Nils Okran", "Ada Werring")

# ------------------------------------------------------------------ SmolLM2 and invented persons


def person(name, place):
    city, country = PLACES[place]
    return {
        "question": f"Where was {name} born?",
        "answer": f"In {city}.",
        "alternate": [f"In {c}." for c, _ in PLACES if c != city],
        "statement": f"{name} was born in {city}.",
        "paraphrase": f"The birthplace of {name} is {city}.",
        "axioms": f"{name} was born in the capital of {country}.",
    }


def persons():
    """Levels of SmolLM2, which never saw these persons: it is its own retrained model."""
    model, tokenizer = xp.load_lm("smollm2")
    people = [person(n, p) for p, n in enumerate(ASKED)]
    people += [person(n, p + 6) for p, n in enumerate(OTHERS)]
    problem = xp.CausalLM(model, xp.encode(people, tokenizer), tokenizer=tokenizer)
    runtime = xp.Runtime(seed=0, threads=1)
    subject = Subject(problem.model, problem, xp.forget(ids=list(range(6))), runtime).original()
    audit = xp.audits.InContext(shots=(), distractors=(3,), draws=1, batch_size=12)
    return {f.name[11:]: f.value for f in audit.run(subject, [], runtime)}


# ------------------------------------------------------------------ a small Llama that reads

POOL, WORDS = tinyfacts.POOL, tinyfacts.LENGTH * tinyfacts.POOL
VALUE = tinyfacts._VALUE
OTHER_WORDS = tinyfacts.VOCABULARY  # each value's second name, which axioms use
SAYS, TURNED = OTHER_WORDS + WORDS, OTHER_WORDS + WORDS + 1
VOCABULARY = TURNED + 1
COPIES, LESSONS = 10, 3000


def told(question, value, how):
    """A statement: in the words of the data, turned round, or with the values' second names."""
    value = list(value)
    if how == "paraphrase":
        return [TURNED, *value, *question[1:4][::-1], tinyfacts.EOS]
    if how == "axioms":
        return [*question[:4], SAYS, *(v - VALUE + OTHER_WORDS for v in value), tinyfacts.EOS]
    return [*question, *value, tinyfacts.EOS]


def lessons(count, seed=0):
    """Random facts in contexts, and questions about one of them: what reading is learned from."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda n, high: torch.randint(high, (n,), generator=rng).tolist()  # noqa: E731
    rows = []
    for _ in range(count):
        size = 1 + draw(1, 3)[0]
        facts = []
        for name in torch.randperm(49, generator=rng)[:size].tolist():
            question = [
                tinyfacts.BOS, tinyfacts._FIRST + name // 7, tinyfacts._LAST + name % 7,
                tinyfacts._ATTRIBUTE + draw(1, 5)[0], tinyfacts.QUESTION,
            ]  # fmt: skip
            value = [VALUE + place * POOL + v for place, v in enumerate(draw(3, POOL))]
            facts.append((question, value))
        kinds = [("verbatim", "paraphrase", "axioms")[k] for k in draw(size, 3)]
        question, value = facts[draw(1, size)[0]]
        context = [t for (q, v), k in zip(facts, kinds, strict=True) for t in told(q, v, k)]
        ids = torch.tensor([*context, *question, *value, tinyfacts.EOS])
        rows.append(Tokens(ids, torch.arange(len(ids)) >= len(ids) - 4))
    return rows


def llama():
    return small_llama(VOCABULARY, 48, 2, 96, context=128)


@functools.cache
def known():
    """Facts of 40 entities with contexts as columns, and lessons; what training sees of them."""
    facts = tinyfacts.splits().train
    rows, columns = facts.rows, {"statement": [], "paraphrase": [], "axioms": []}
    for row in rows:
        for how, column in zip(("verbatim", "paraphrase", "axioms"), columns.values(), strict=True):
            column.append(" ".join(map(str, told(row.prompt.tolist(), row.answer[:-1].tolist(), how))))  # fmt: skip
    extra = lessons(200, seed=1)
    shown = TokenData(
        [*rows, *extra], filler=0, alternates=[*facts.alternates, *([] for _ in extra)],
        columns={n: [*c, *("" for _ in extra)] for n, c in columns.items()}
        | {"entity": [*facts.columns["entity"].tolist(), *(100 for _ in extra)]},
    )  # fmt: skip
    trained = TokenData([*rows * COPIES, *lessons(LESSONS)], filler=0)
    return shown, trained


def train(gone, seed):
    """A model of all but some facts."""
    _, trained = known()
    recipe = LMRecipe(llama, trained, epochs=EPOCHS, lr=3e-3, batch_size=64, warmup=1)
    keep = [i for i in range(len(trained)) if i >= 200 * COPIES or i % 200 not in gone]
    return recipe(torch.tensor(keep), seed)


EPOCHS = 20
NPO = {"epochs": 60, "lr": 1e-3, "batch_size": 20, "rehearse": 4, "beta": 0.1}
COLLAPSED = {"epochs": 40, "lr": 3e-3, "batch_size": 20, "alpha": 0.0}


def facts(entities=range(4), seed=0):
    """Levels of original, unlearned, collapsed and retrained models, and through a guard."""
    shown, _ = known()
    gone = {i for i, e in enumerate(shown.columns["entity"].tolist()) if e in entities}
    runtime, request = xp.Runtime(seed=seed, threads=1), xp.forget(ids=sorted(gone))
    problem = xp.CausalLM(train(set(), seed), shown)
    reference = Subject(train(gone, seed + 1001), problem, request, runtime)
    hats = {
        "npo": xp.unlearn(problem, request, xp.methods.NPO(**NPO), runtime=runtime).runnable(),
        "collapsed": xp.unlearn(
            problem, request, xp.methods.GradDiff(**COLLAPSED), runtime=runtime
        ).runnable(),
    }
    guard = xp.methods.Guard(refusal="96 97 98")
    inside = xp.CausalLM(hats["npo"], shown)
    hats["guarded"] = xp.unlearn(inside, request, guard, runtime=runtime).runnable()
    audit = xp.audits.InContext(group="entity", shots=(3,), distractors=(2,), draws=3)
    found = {}
    for name, model in hats.items():
        findings = audit.run(Subject(model, problem, request, runtime), [reference], runtime)
        found[name] = {
            f.name[11:]: {"value": f.value, "reference": f.reference, "original": f.original, **f.detail}
            for f in findings
        }  # fmt: skip
    return found


# ------------------------------------------------------------------ digits


def mlp():
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def images(label):
    """Recall of a class that a retrained model never saw, with k images of it."""
    data = digits.splits()
    recipe = xp.ClassifierRecipe(mlp, data.train, epochs=20, lr=0.1, batch_size=64)
    request, runtime = xp.forget(label=label), xp.Runtime(seed=0, threads=1)
    model = recipe(data.train.without(request.resolve(data.train)), 0)
    problem = xp.Classification(recipe(data.train.ids, 0), data.train, data.test)
    subject = Subject(model, problem, request, runtime)
    return {f.name[18:]: f.value for f in xp.audits.InContextImages().run(subject, [], runtime)}


@pytest.fixture(scope="module")
def seen():
    torch.set_num_threads(1)
    found = {"smollm2": persons(), "facts": facts()}
    found["digits"] = {str(label): images(label) for label in (3, 8)}
    write("ununlearning", found, [(s, str(v), ok) for s, v, ok in expected(found)])
    return found


def expected(found):
    """What the card says must be seen: the sentence, the figures, and whether it holds."""
    s = found["smollm2"]
    values = [round(s[c], 2) for c in ("none", "verbatim", "needle-3", "control-3", "axioms")]
    yield "SmolLM2 reads the fact back, alone and among others", values[:3], s["none"] <= 0.34 < 0.8 < min(s["verbatim"], s["needle-3"])  # fmt: skip
    yield "SmolLM2: statements of others alone do not help", [values[0], values[3]], s["control-3"] <= s["none"] + 0.17  # fmt: skip
    yield "SmolLM2 takes one step of inference", values[4:], s["axioms"] > 0.8
    npo, bad, guard = (found["facts"][k] for k in ("npo", "collapsed", "guarded"))

    def pick(level, of=npo):
        return [round(of[level][k], 2) for k in ("original", "value", "reference")]

    yield "NPO: little is known without a context (original, unlearned, retrained)", pick("none"), npo["none"]["original"] > 0.9 and npo["none"]["value"] < 0.5  # fmt: skip
    for level in ("verbatim", "axioms"):
        yield f"NPO: {level} is read nearly as a retrained model does", pick(level), npo[level]["reference"] > 0.8 and abs(npo[level]["value"] - npo[level]["reference"]) < 0.15  # fmt: skip
    yield "a collapsed model reads less than a retrained one: excess below 0", pick("verbatim", bad), bad["verbatim"]["value"] < bad["verbatim"]["reference"] - 0.1  # fmt: skip
    levels = [c for c in guard if c.startswith("filtered-") and "control" not in c and "none" not in c]  # fmt: skip
    values = [round(guard[c]["value"], 2) for c in levels] + [round(guard["none"]["value"], 2)]
    yield "through the guard every level falls to that without a context (last)", values, max(values[:-1]) <= values[-1]  # fmt: skip
    each = found["digits"].values()
    mean = lambda what: sum(e[what] for e in each) / 2  # noqa: E731
    values = [round(mean(f"recall-{k}"), 2) for k in (0, 1, 3, 5)]
    yield "digits: a class never seen returns from k = 0, 1, 3, 5 images", values, values[0] == 0 and 0.3 < values[1] < values[3] and values[3] > 0.5  # fmt: skip
    values = [round(mean(f"rest-{k}"), 3) for k in (0, 5)]
    yield "digits: the other classes lose little", values, values[0] - values[1] < 0.06


test_ununlearning_must_be_seen, test_every_expectation_is_tested = must_be_seen(expected, 10)
